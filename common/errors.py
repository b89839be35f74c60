"""Errors that reach a user, one class per gRPC code.

LuthierError
├── InvalidArgument      the request is wrong whatever the state (field violations say where)
├── OutOfRange           the history asked for is gone
├── NotFound             no such thing, or not yours
├── AlreadyExists        the name or request_id is taken by something else
├── FailedPrecondition   right request, wrong moment
├── Aborted              somebody changed it in the meantime; read it again
├── Unauthenticated      no key, or one that does not count
├── PermissionDenied     the key's role does not allow it
├── ResourceExhausted    too large or too many
├── Unavailable          something we depend on does not answer; try again
└── Internal             our fault
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Violation:
    """One bad field: its path in the request (`job.finetune.method`), and what is wrong with it."""

    field: str
    description: str


class LuthierError(Exception):
    """An error whose message a user reads. Survives pickling, so it may cross Ray and process borders.

    `reason` is a stable UPPER_SNAKE_CASE word for programs, `metadata` what else they may want to know, `grpc_code` the name of
    the gRPC status code.
    """

    grpc_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        reason: str = "",
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.grpc_code
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[type[LuthierError], tuple[Any, ...]]:
        return type(self), (self.message, self.reason, self.violations, self.metadata)


class InvalidArgument(LuthierError):
    """The request is wrong whatever the state of the system."""

    grpc_code = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, violations: Sequence[Violation], reason: str = "INVALID_ARGUMENT") -> InvalidArgument:
        """Build the error from its violations; the message lists them in one line."""
        return cls("; ".join(f"{v.field}: {v.description}" for v in violations), reason, violations)


class OutOfRange(LuthierError):
    """The history before the number asked for is no longer kept."""

    grpc_code = "OUT_OF_RANGE"


class NotFound(LuthierError):
    """There is no such thing, or it belongs to another project."""

    grpc_code = "NOT_FOUND"


class AlreadyExists(LuthierError):
    """The name or request id is taken by something else."""

    grpc_code = "ALREADY_EXISTS"


class FailedPrecondition(LuthierError):
    """The request is right but the state does not allow it."""

    grpc_code = "FAILED_PRECONDITION"


class Aborted(LuthierError):
    """Somebody changed it since it was read."""

    grpc_code = "ABORTED"


class Unauthenticated(LuthierError):
    """No key, or one that does not count."""

    grpc_code = "UNAUTHENTICATED"


class PermissionDenied(LuthierError):
    """The key's role does not allow it."""

    grpc_code = "PERMISSION_DENIED"


class ResourceExhausted(LuthierError):
    """Too large or too many."""

    grpc_code = "RESOURCE_EXHAUSTED"


class Unavailable(LuthierError):
    """Something this depends on does not answer now."""

    grpc_code = "UNAVAILABLE"


class Internal(LuthierError):
    """A fault of Luthier's own."""

    grpc_code = "INTERNAL"
