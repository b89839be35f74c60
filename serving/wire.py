"""What the gateway and the replicas say to each other. No Ray, no torch: it only has to pickle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.engines.base import Completion, Piece, SamplingParams


@dataclass(frozen=True)
class AdapterRef:
    """A LoRA adapter on the model of a replica. With the SHA-256 of its manifest it is one content for ever."""

    uri: str
    sha256: str
    chat_template_sha256: str = ""  # as on record; has to be the model's own

    @property
    def name(self) -> str:
        """What it is called in a running batch."""
        return self.sha256 or self.uri


@dataclass(frozen=True)
class Ask:
    """Either a conversation (`messages`) or raw `prompts`, and how to generate: `n` answers to each."""

    params: SamplingParams
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str, ...] = ()
    n: int = 1
    tools: tuple[dict[str, Any], ...] = ()
    # Call a tool, whichever or the one of that name; needs `tools`.
    must_call: bool | str = False
    # W3C traceparent of the request; empty where nobody traces.
    trace_parent: str = ""
    # What to answer with beside the model; None for the model alone.
    adapter: AdapterRef | None = None


@dataclass(frozen=True)
class Started:
    """First event of a stream: the request was accepted, and its prompt has so many tokens.

    `calls` says how the model writes calls of tools; empty where it was given none.
    """

    prompt_tokens: int
    calls: str = ""


Event = Started | Piece | Completion
"""A stream: Started, pieces, and a completion for each answer, after the last piece of it."""


@dataclass(frozen=True)
class ModelArgs:
    """What a replica is told when it starts: where the artifacts are, with the SHA-256 of their manifests."""

    artifact_uri: str
    artifact_sha256: str = ""
    base_uri: str = ""
    base_sha256: str = ""
    device: str = "auto"
    threads: int = 1
    chat_template_sha256: str = ""  # as on record; empty where none is


@dataclass(frozen=True)
class GatewayArgs:
    """What the gateway is told when it starts. What changes while it runs comes in its snapshot."""

    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0  # for the whole of a body to arrive
    max_in_flight: int = 512
    request_timeout_s: float = 600.0
    cache_bytes: int = 64 * 2**20  # of answers that are kept; 0 keeps none
    cache_seconds: float = 3600.0
    names_requests: bool = False  # Serve's proxy writes x-request-id on every answer itself

    @classmethod
    def of(cls, args: dict[str, Any]) -> GatewayArgs:
        """Read Serve's application arguments."""
        return cls(**args)
