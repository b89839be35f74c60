"""Text to tokens: renders conversations as training does, and keeps what users wrote from becoming control tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from common.chat import default_template
from common.errors import FailedPrecondition, InvalidArgument, Violation

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"  # private use: no text that means anything holds them


class Prompt(str):
    """A rendered conversation. `literal` are the spans in it that spell control tokens but are to be read as text."""

    literal: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, literal: Sequence[tuple[int, int]] = ()) -> Prompt:
        """Mark `text` as rendered."""
        self = super().__new__(cls, text)
        self.literal = tuple(literal)
        return self

    def __reduce__(self) -> tuple[type[Prompt], tuple[str, tuple[tuple[int, int], ...]]]:
        return Prompt, (str(self), self.literal)

    def followed_by(self, other: Prompt) -> Prompt:
        """Return both texts as one prompt."""
        shift = len(self)
        return Prompt(self + other, (*self.literal, *((start + shift, end + shift) for start, end in other.literal)))

    def since(self, start: int) -> Prompt:
        """Return what follows the first `start` characters."""
        return Prompt(self[start:], [(a - start, b - start) for a, b in self.literal if a >= start])


class PromptCodec:
    """Renders and tokenises for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a flag of the tokenizer is switched between calls
        self._control = _control_pattern(tokenizer)
        self.has_template = bool(tokenizer.chat_template)
        template = default_template(tokenizer.chat_template)
        self.takes_tools = bool(re.search(r"\btools\b", template))
        self._probe = self._generation_prompt = ""
        if self.has_template:
            probe = [{"role": "user", "content": "x"}]
            self._probe = self._apply(probe, True)
            plain = self._apply(probe, False)
            self._generation_prompt = self._probe[len(plain) :] if self._probe.startswith(plain) else ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """Render `messages` by the chat template. Control tokens that a message spells are marked as plain text.

        Raises InvalidArgument where there are `tools` and the template has no place for them.
        """
        if not self.has_template:
            raise FailedPrecondition(
                "this model has no chat template, so it cannot answer conversations; send a prompt instead "
                "(/v1/completions), or import the model with a chat template",
                "NO_CHAT_TEMPLATE",
            )
        if not messages:
            raise InvalidArgument.of([Violation("messages", "must hold at least one message")])
        spelled: list[str] = []

        def hide(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"{_OPEN}{len(spelled) - 1}{_CLOSE}"

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                text = value.replace(_OPEN, "\ufffd").replace(_CLOSE, "\ufffd")
                return self._control.sub(hide, text) if self._control else text
            if isinstance(value, Mapping):
                return {key: hidden(item) for key, item in value.items()}
            return [hidden(item) for item in value] if isinstance(value, list | tuple) else value

        if tools and not self.takes_tools:
            raise InvalidArgument.of([Violation("tools", "the model's chat template has no place for tools")], "NO_TOOLS")
        said = [{key: value if key == "role" else hidden(value) for key, value in message.items()} for message in messages]
        rendered = self._apply(said, generation_prompt, [hidden(tool) for tool in tools])
        return _reveal(rendered, spelled) if spelled else Prompt(rendered)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered or raw prompt. A raw one gets the tokenizer's own start token if it lacks it."""
        if not isinstance(text, Prompt):
            bos = self._tokenizer.bos_token
            return self._ids(text, False, add_special=not (bos and text.startswith(bos)))
        ids: list[int] = []
        position = 0
        for start, end in text.literal:
            ids += self._ids(text[position:start], False)
            ids += self._ids(text[start:end], True)
            position = end
        return ids + self._ids(text[position:], False)

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Return the tokens of prompt, completion and end of turn as training makes them, and where the completion starts."""
        ids = self.encode(prompt)
        chat = self.has_template and (
            isinstance(prompt, Prompt) or (bool(self._generation_prompt) and prompt.endswith(self._generation_prompt))
        )
        if chat:
            whole = self.encode((prompt if isinstance(prompt, Prompt) else Prompt(prompt)).followed_by(self.answer(completion)))
        else:
            eos = self._tokenizer.eos_token or ""
            whole = self.encode(prompt + completion + ("" if eos and completion.endswith(eos) else eos))
        start = 0  # where they part, as in training: tokens may merge across the border
        for left, right in zip(ids, whole, strict=False):
            if left != right:
                break
            start += 1
        return whole, min(start, len(whole) - 1)

    def answer(self, completion: str) -> Prompt:
        """Return what follows a rendered prompt when the assistant answers `completion`: its text and the end of turn."""
        whole = self.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": completion}], False)
        if whole.startswith(self._probe):
            return whole.since(len(self._probe))
        start = whole.rfind(completion) if completion else -1
        return whole.since(start) if start >= 0 else Prompt(completion)

    def end_of_turn(self) -> int | None:
        """Return the control token that ends an answer, where the chat template has one."""
        if not self.has_template:
            return None
        mark = "answer"
        _, found, tail = self.answer(mark).rpartition(mark)
        ids = self._ids(tail, False) if found else []
        return ids[0] if ids and ids[0] in self._tokenizer.added_tokens_decoder else None

    def _apply(self, messages: list[dict[str, Any]], generation_prompt: bool, tools: list[Any] | None = None) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except Exception as error:  # the template decides what it raises
            raise InvalidArgument.of(
                [Violation("messages", f"the model's chat template refuses this conversation: {str(error)[:300]}")]
            ) from error

    def _ids(self, text: str, literal: bool, add_special: bool = False) -> list[int]:
        if not text and not add_special:
            return []
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=add_special, split_special_tokens=literal, verbose=False)
        return list(encoded["input_ids"])


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Match whatever text the tokenizer would read as a control token (any case: a normaliser may fold it)."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    texts.discard("")
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text))), re.IGNORECASE)


def _reveal(rendered: str, spelled: Sequence[str]) -> Prompt:
    parts: list[str] = []
    literal: list[tuple[int, int]] = []
    length = position = 0
    for match in re.finditer(f"{_OPEN}(\\d+){_CLOSE}", rendered):
        before, text = rendered[position : match.start()], spelled[int(match[1])]
        parts += [before, text]
        length += len(before)
        literal.append((length, length + len(text)))
        length += len(text)
        position = match.end()
    return Prompt("".join([*parts, rendered[position:]]), literal)
