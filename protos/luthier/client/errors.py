"""What a call can raise, one class per kind of failure.

LuthierError
├── InvalidArgument      the request is wrong whatever the state; `violations` name the fields
├── OutOfRange           the history asked for is gone
├── NotFound             no such thing, or not yours
├── AlreadyExists        the name or request_id is taken by something else
├── FailedPrecondition   right request, wrong moment
├── Aborted              somebody else changed it first; read it again
├── Unauthenticated      no key, or one that does not count
├── PermissionDenied     the key's role does not allow it
├── ResourceExhausted    too large or too many
├── Unavailable          the coordinator does not answer; try again
├── DeadlineExceeded     no answer in time
├── Cancelled            the call was given up
├── Unimplemented        the coordinator is older than this client
└── Internal             a fault of the coordinator's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Violation:
    """One bad field: its path in the request (`job.finetune.method`), and what is wrong with it."""

    field: str
    description: str


class LuthierError(Exception):
    """A call that did not succeed.

    `code` is the gRPC status, `reason` a stable UPPER_SNAKE_CASE word for programs, `message` one sentence for people,
    `violations` the fields to blame, `metadata` what else the coordinator said. Survives pickling.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason or code.name
        self.violations = violations
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.code, self.reason, self.violations, self.metadata)


class InvalidArgument(LuthierError):
    """The request is wrong whatever the state of the system."""


class OutOfRange(LuthierError):
    """The history before the number asked for was compacted."""


class NotFound(LuthierError):
    """There is no such thing, or it belongs to another project."""


class AlreadyExists(LuthierError):
    """The name or request id is taken by something else."""


class FailedPrecondition(LuthierError):
    """The request is right but the state does not allow it."""


class Aborted(LuthierError):
    """Somebody else changed it first."""


class Unauthenticated(LuthierError):
    """No key, or one that does not count."""


class PermissionDenied(LuthierError):
    """The key's role does not allow it."""


class ResourceExhausted(LuthierError):
    """Too large or too many."""


class Unavailable(LuthierError):
    """The coordinator, or something it depends on, does not answer now."""


class DeadlineExceeded(LuthierError):
    """There was no answer in time."""


class Cancelled(LuthierError):
    """The call was given up."""


class Unimplemented(LuthierError):
    """The coordinator does not know this call."""


class Internal(LuthierError):
    """A fault of the coordinator's own."""


CLASS_OF_CODE: dict[grpc.StatusCode, type[LuthierError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}


def from_call(call: grpc.RpcError, server: str = "", advice: Callable[[str], str] | None = None) -> LuthierError:
    """Return the error that a failed gRPC call stands for, with the details that travelled in its google.rpc.Status.

    `advice` is asked about gRPC's own words where there was no connection.
    """
    if not isinstance(call, grpc.Call):
        return Internal(str(call) or type(call).__name__)
    code = call.code() or grpc.StatusCode.UNKNOWN
    reason, metadata, violations = "", {}, []
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the status, so only the status counts
        status = None
    for detail in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [Violation(item.field, item.description) for item in bad.field_violations]
    message = (status.message if status is not None else "") or call.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and status is None and server:
        # gRPC's own text repeats the address over and over; its last part says why.
        why = (advice(message) if advice else "") or message.rsplit(": ", 1)[-1].lower()
        message = f"no coordinator answers at {server} ({why})"
    return CLASS_OF_CODE.get(code, Internal)(message, code, reason, tuple(violations), metadata)
