"""The requests that are taken, with OpenAI's names. What is not supported and would change the answer is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from serving.engines.base import SamplingParams
from serving.gateway.errors import ApiError, bad_request
from serving.wire import Ask

MAX_PROMPTS = 128
MAX_STOPS = 4

#: Parameters without effect on the answer: taken and ignored.
HARMLESS = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
#: Parameters that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class _Common(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None

    @property
    def sticky(self) -> str:
        """Who asks, for routes that are to stay the same for one user; empty where the request does not say."""
        extra = self.model_extra or {}
        named = next((extra[name] for name in ("user", "safety_identifier") if extra.get(name)), "")
        return named if isinstance(named, str) else ""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, max_tokens: int | None) -> SamplingParams:
        """Return how to generate; OpenAI's defaults are temperature 1 and top_p 1."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOPS:
            raise bad_request(f"'stop' takes at most {MAX_STOPS} strings.", "stop")
        if not all(stop):
            raise bad_request("'stop' must not hold an empty string.", "stop")
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
        )


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: StrictStr


class ChatMessage(BaseModel):
    """One message of a conversation. `developer` is another word for `system`; tools are not supported."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def ask(self) -> Ask:
        """Return what a replica is asked."""
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return Ask(self.params(min(limits, default=None)), messages=tuple(message.plain() for message in self.messages))


class CompletionRequest(_Common):
    """POST /v1/completions. Prompts are raw: control tokens in them count as such."""

    prompt: StrictStr | list[StrictStr]

    def ask(self) -> Ask:
        """Return what a replica is asked; the default of 16 tokens is OpenAI's."""
        prompts = (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise bad_request(f"'prompt' takes 1 to {MAX_PROMPTS} prompts.", "prompt")
        if not all(prompts):
            raise bad_request("'prompt' must not be empty.", "prompt")
        if self.stream and len(prompts) > 1:
            raise bad_request("A stream takes one prompt; send several requests, or leave 'stream' out.", "prompt")
        return Ask(self.params(16 if self.max_tokens is None else self.max_tokens), prompts=prompts)


Parsed = TypeVar("Parsed", ChatRequest, CompletionRequest)


class Feedback(BaseModel):
    """POST /v1/feedback: how good an answer was, by the `id` in it or by its x-request-id."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    score: Annotated[Number, Field(ge=0, le=1)]
    comment: Annotated[StrictStr, Field(max_length=4000)] | None = None


def parse_feedback(body: bytes) -> Feedback:
    """Read feedback, or raise a 400 that names the parameter."""
    try:
        return Feedback.model_validate_json(body)
    except ValidationError as error:
        raise _told(error) from error


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """Read a request, or raise a 400 that names the parameter."""
    try:
        content = json.loads(body)
        if b"\\u" in body:  # half a surrogate pair is no text: neither tokenizers nor answers can carry it
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise bad_request("The body has to be a JSON object.")
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        raise _told(error) from error
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value)
    if request.n not in (None, 1):
        raise bad_request("'n' has to be 1: one answer a request.", "n")
    if request.stream_options is not None and not request.stream:
        raise bad_request("'stream_options' is only allowed with 'stream': true.", "stream_options")
    return request


def _check_extra(name: str, value: Any) -> None:
    if value is None or name in HARMLESS:
        return
    if name not in UNSUPPORTED:
        raise bad_request(f"Unrecognized request argument supplied: {name[:100]}", name[:100], "unknown_parameter")
    if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in UNSUPPORTED[name]):
        raise bad_request(f"'{name}' is not supported by this server; leave it out.", name, "unsupported_parameter")


def _told(error: ValidationError) -> ApiError:
    # Of a union, the branch that got deepest into the value knows best what is wrong.
    first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(found["loc"]))
    parts = [part for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in ("str", "constrained-str")))]
    where = ""
    for part in parts:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    message = f"Missing required parameter: '{where}'." if first["type"] == "missing" else f"Invalid '{where}': {first['msg']}."
    return bad_request(message, where or None, "missing_required_parameter" if first["type"] == "missing" else "invalid_value")
