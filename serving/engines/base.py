"""What an engine is: one loaded model that renders, generates, streams and scores. No torch here."""

from __future__ import annotations

import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from common.errors import FailedPrecondition, InvalidArgument, Violation

FinishReason = Literal["stop", "length", "cancelled"]

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. Temperature 0 is greedy; the same seed gives the same text whatever else is in the batch."""

    max_tokens: int | None = 256  # None: as far as the context reaches
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0  # 0: all
    presence_penalty: float = 0.0  # taken from the logits of tokens that were generated already
    frequency_penalty: float = 0.0  # the same, for each time
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens, and what is added to their logits
    top_logprobs: int | None = None  # how many likely tokens are told with each token; None: not even its own likelihood
    # What the text has to follow: a JSON schema as JSON, or a grammar in llguidance's dialect of Lark; empty for anything.
    json_schema: str = ""
    grammar: str = ""

    def __post_init__(self) -> None:
        bad: list[Violation] = []
        if self.top_k < 0:
            bad.append(Violation("top_k", f"must be at least 0, is {self.top_k}"))
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                bad.append(Violation(name, f"must be between -2 and 2, is {getattr(self, name)}"))
        if any(token < 0 or not -100 <= bias <= 100 for token, bias in self.logit_bias):
            bad.append(Violation("logit_bias", "must give tokens values between -100 and 100"))
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            bad.append(Violation("top_logprobs", f"must be between 0 and {MAX_TOP_LOGPROBS}, is {self.top_logprobs}"))
        if self.json_schema and self.grammar:
            bad.append(Violation("grammar", "must not stand beside a JSON schema"))
        if self.max_tokens is not None and self.max_tokens < 1:
            bad.append(Violation("max_tokens", f"must be at least 1, is {self.max_tokens}"))
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            bad.append(Violation("temperature", f"must be between 0 and 2, is {self.temperature}"))
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            bad.append(Violation("top_p", f"must be above 0 and at most 1, is {self.top_p}"))
        if any(not text for text in self.stop):
            bad.append(Violation("stop", "must not hold an empty string"))
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            bad.append(Violation("seed", "must fit in 64 bits"))
        if bad:
            raise InvalidArgument.of(bad)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

    @property
    def constrained(self) -> bool:
        """Whether the text has to follow something."""
        return bool(self.json_schema or self.grammar)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability before temperature and the like, and the likeliest tokens at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a text on its way. `index` is the answer's, where several are given to one prompt."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclass(frozen=True)
class Completion:
    """Generated text. `finish_reason` is `stop` (end of turn or a stop string), `length`, or `cancelled`."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    calls: str = ""  # how the model writes calls of tools, where it was given some


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities of a completion's tokens (its end of turn among them), and their number."""

    logprob: float
    tokens: int


@dataclass
class Request:
    """One prompt on its way. `on_piece` gets the text as it comes, from the engine's thread; `cancel` ends it early."""

    prompt: str
    params: SamplingParams
    on_piece: Callable[[Piece], None] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    # W3C traceparent of whoever asks; empty where nobody traces.
    trace_parent: str = ""
    # Adapter to answer with, of those that were added to the running batch; empty for the model as it was loaded.
    adapter: str = ""


Done = Callable[[Completion | BaseException], None]
"""Gets a request's completion, or the error."""


class Lanes(ABC):
    """Requests that an engine carries out together. One thread works on them."""

    @abstractmethod
    def join(self, request: Request, done: Done) -> None:
        """Take a request in; `done` is called once, from `step` or from here."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether there is anything to do."""

    def add_adapter(self, name: str, folder: Path, pinned: bool = False) -> Callable[[], None]:
        """Read an adapter of the model, in any thread, and return what makes it ready, for the thread that works on the batch.

        Raises InvalidArgument where it does not apply in full, FailedPrecondition where the model takes none. What is returned
        raises ResourceExhausted where there is no room.
        """
        raise FailedPrecondition("this model takes no adapters beside itself", "NO_ADAPTERS")

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter is ready for use."""
        return False

    @abstractmethod
    def step(self) -> None:
        """Go on by a token where the model allows for that, else by a batch. Where it raises, all requests have got the error."""


class Engine(ABC):
    """One loaded model. Methods may be called from several threads, but for `run` and those of `lanes`."""

    #: SHA-256 of the chat template, empty where the model has none.
    chat_template_sha256: str
    #: Most tokens that prompt and completion may have together.
    max_length: int
    #: How it writes calls of tools (tool_calls.py); empty where nobody knows.
    tool_style: str = ""

    @abstractmethod
    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt for a conversation, as the model's chat template writes it, ready for the answer.

        Raises InvalidArgument where the template takes no `tools`.
        """

    @abstractmethod
    def check(self, prompt: str) -> int:
        """Return the number of tokens of `prompt`; raises InvalidArgument where it leaves no room for an answer."""

    def check_params(self, params: SamplingParams) -> None:
        """Raise InvalidArgument where a request could not be generated so."""
        return

    @abstractmethod
    def lanes(self) -> Lanes:
        """Return a running batch, which is empty."""

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Carry out `requests` and return their completions in order. Raises the first error."""
        found: list[Completion | BaseException | None] = [None] * len(requests)
        lanes = self.lanes()
        for number, request in enumerate(requests):
            lanes.join(request, partial(found.__setitem__, number))
        while lanes.busy:
            lanes.step()
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return cast("list[Completion]", found)

    @abstractmethod
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Return how likely each completion is after its prompt, rendered as in training."""

    @abstractmethod
    def score_choices(self, choices: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[list[Score]]:
        """Return how likely each of several completions is after its prompt; what they share is computed once.

        A choice is a prompt and its alternatives, each a text and a number of characters of it: only the tokens that begin
        before that many characters count. Where that is the whole text, so does its end of turn.
        """

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Completion]:
        """Complete each of `prompts`, in order."""
        return self.run([Request(prompt, params) for prompt in prompts])

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str | Completion]:
        """Yield the text as it comes, and the whole Completion last. Closing the iterator ends the generation."""
        self.check(prompt)
        events: queue.SimpleQueue[str | Completion | BaseException] = queue.SimpleQueue()
        request = Request(prompt, params, on_piece=lambda piece: events.put(piece.text))

        def work() -> None:
            try:
                events.put(self.run([request])[0])
            except BaseException as error:  # handed over to the reader's thread, which raises it
                events.put(error)

        thread = threading.Thread(target=work, name="engine-stream", daemon=True)
        thread.start()
        try:
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            request.cancel.set()
            thread.join()
