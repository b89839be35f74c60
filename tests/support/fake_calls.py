"""What the fake services share: failures with their details, the record of calls, and paging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from tests.support.fake_services import FakeCoordinator


@dataclass
class Failure:
    """What a call answers instead of doing anything."""

    code: grpc.StatusCode
    message: str = "made to fail"
    reason: str = ""
    violations: tuple[tuple[str, str], ...] = ()
    bare: bool = False


@dataclass
class Recorded:
    """A call that arrived."""

    method: str
    request: Any
    metadata: dict[str, str]


def refuse(context: grpc.ServicerContext, failure: Failure) -> NoReturn:
    """End a call with a status and its details, the way the coordinator does."""
    if failure.bare:
        context.abort(failure.code, failure.message)
    details = []
    for item in (
        error_details_pb2.ErrorInfo(reason=failure.reason or failure.code.name, domain="luthier", metadata={"id": "c-1"}),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in failure.violations]
        ),
    ):
        packed = any_pb2.Any()
        packed.Pack(item)
        details.append(packed)
    context.abort_with_status(
        rpc_status.to_status(status_pb2.Status(code=failure.code.value[0], message=failure.message, details=details))
    )
    raise AssertionError("abort_with_status returns to nobody")


def page(items: list[Any], request: Any) -> tuple[list[Any], str]:
    start, size = int(request.page_token or 0), request.page_size or 50
    return items[start : start + size], str(start + size) if start + size < len(items) else ""


class Service:
    def __init__(self, fake: FakeCoordinator) -> None:
        self.fake = fake
