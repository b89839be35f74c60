"""The requests that are taken, with OpenAI's names. What is not supported and would change the answer is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from serving.engines.base import MAX_TOP_LOGPROBS, SamplingParams
from serving.gateway.errors import ApiError, bad_request
from serving.wire import Ask

MAX_PROMPTS = 128
MAX_STOPS = 4
MAX_ANSWERS = 16
MAX_TOOLS = 128

#: Parameters without effect on the answer: taken and ignored.
HARMLESS = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
#: Parameters that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}

Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class TextFormat(BaseModel):
    """Any text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]

    def schema_text(self) -> str:
        """What the text has to follow: nothing."""
        return ""


class JsonFormat(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]

    def schema_text(self) -> str:
        """What the text has to follow."""
        return '{"type": "object"}'


class NamedSchema(BaseModel):
    """A JSON schema with a name. It is followed in any case, so `strict` changes nothing."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: StrictBool | None = None


class SchemaFormat(BaseModel):
    """JSON by a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def schema_text(self) -> str:
        """What the text has to follow."""
        return json.dumps(self.json_schema.schema_)


class _Common(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_ANSWERS)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None  # not OpenAI's, but everybody else's
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = Field(None, discriminator="type")
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

    @property
    def told_logprobs(self) -> int | None:
        """How many likely tokens are to be told with each token; None for not even its own likelihood."""
        raise NotImplementedError

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
            top_k=self.top_k or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            top_logprobs=self.told_logprobs,
            json_schema=self.response_format.schema_text() if self.response_format else "",
        )


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: StrictStr


class CalledFunction(BaseModel):
    """What a call calls."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    arguments: StrictStr = "{}"


class Called(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="forbid")

    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message of a conversation. `developer` is another word for `system`."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: None = None
    refusal: None = None
    tool_calls: list[Called] | None = None
    tool_call_id: StrictStr | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        where = f"messages[{place}]"
        if self.tool_calls and self.role != "assistant":
            raise bad_request(f"'{where}.tool_calls' is for messages of the assistant.", f"{where}.tool_calls")
        if self.content is None and not self.tool_calls:
            raise bad_request(f"Missing required parameter: '{where}.content'.", f"{where}.content", "missing_required_parameter")
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, where)},
                }
                for call in self.tool_calls
            ]
        return message


class Function(BaseModel):
    """A tool's name, what it is for, and the JSON schema of its arguments."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool that may be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }


class ChosenFunction(BaseModel):
    """The name of a tool."""

    name: StrictStr


class ToolChoice(BaseModel):
    """One tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    @property
    def told_logprobs(self) -> int | None:
        """How many likely tokens are to be told with each token."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def ask(self) -> Ask:
        """Return what a replica is asked."""
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return Ask(
            self.params(min(limits, default=None)),
            messages=tuple(message.plain(place) for place, message in enumerate(self.messages)),
            n=self.n or 1,
            tools=tuple(tool.plain() for tool in self.tools or ()) if self.tool_choice != "none" else (),
            must_call=self._must_call(),
        )

    def _must_call(self) -> bool | str:
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return False
        if not self.tools:
            raise bad_request("'tool_choice' needs 'tools'.", "tool_choice")
        if self.response_format is not None and self.response_format.schema_text():
            raise bad_request(
                "'tool_choice' makes the answer call a tool, which cannot follow a 'response_format' too.", "tool_choice"
            )
        if choice == "required":
            return True
        assert isinstance(choice, ToolChoice)
        if choice.function.name not in {tool.function.name for tool in self.tools}:
            raise bad_request(f"'tool_choice' names {choice.function.name[:64]!r}, which is not among the tools.", "tool_choice")
        return choice.function.name


class CompletionRequest(_Common):
    """POST /v1/completions. Prompts are raw: control tokens in them count as such."""

    prompt: StrictStr | list[StrictStr]
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | StrictBool | None = None

    @property
    def told_logprobs(self) -> int | None:
        """How many likely tokens are to be told with each token."""
        if isinstance(self.logprobs, bool):
            return 0 if self.logprobs else None
        return self.logprobs

    def ask(self) -> Ask:
        """Return what a replica is asked; the default of 16 tokens is OpenAI's."""
        prompts = (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise bad_request(f"'prompt' takes 1 to {MAX_PROMPTS} prompts.", "prompt")
        if not all(prompts):
            raise bad_request("'prompt' must not be empty.", "prompt")
        if self.stream and len(prompts) > 1:
            raise bad_request("A stream takes one prompt; send several requests, or leave 'stream' out.", "prompt")
        return Ask(self.params(16 if self.max_tokens is None else self.max_tokens), prompts=prompts, n=self.n or 1)


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
    if request.stream_options is not None and not request.stream:
        raise bad_request("'stream_options' is only allowed with 'stream': true.", "stream_options")
    return request


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in given):
        raise bad_request("'logit_bias' has to name tokens by their numbers.", "logit_bias")
    return tuple(sorted((int(token), bias) for token, bias in given.items()))


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise bad_request(f"'{where}.tool_calls' has arguments that are no JSON: {str(error)[:200]}", where) from error
    if not isinstance(found, dict):
        raise bad_request(f"'{where}.tool_calls' has arguments that are no JSON object.", where)
    return found


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
