"""From exceptions to one plain line and an exit status."""

from __future__ import annotations

import grpc

import common.errors
from luthier.client import LuthierError

DONE, FAILED, USAGE, NOT_FOUND, NOT_ALLOWED, UNREACHABLE = range(6)

STATUS_OF_CODE: dict[str, int] = {
    "INVALID_ARGUMENT": USAGE,
    "OUT_OF_RANGE": USAGE,
    "NOT_FOUND": NOT_FOUND,
    "UNAUTHENTICATED": NOT_ALLOWED,
    "PERMISSION_DENIED": NOT_ALLOWED,
    "UNAVAILABLE": UNREACHABLE,
    "DEADLINE_EXCEEDED": UNREACHABLE,
}

HINTS: dict[str, str] = {
    "UNAUTHENTICATED": "set LUTHIER_TOKEN to a valid key, or --home to the home of the stack",
    "UNAVAILABLE": "check the address with --server or LUTHIER_SERVER, or start a stack with `luthier up`",
    "DEADLINE_EXCEEDED": "the coordinator is slow or unreachable; see `luthier status`",
}


class Failure(Exception):
    """A command cannot do what it was asked to; the message says why and what to do."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def explain(error: Exception) -> tuple[str, int]:
    """One line about `error`, and the exit status that goes with it."""
    if isinstance(error, Failure):
        return one_line(str(error)), error.status
    if isinstance(error, LuthierError):
        return _call_line(error), STATUS_OF_CODE.get(error.code.name, FAILED)
    if isinstance(error, common.errors.LuthierError):
        return one_line(error.message), STATUS_OF_CODE.get(error.grpc_code, FAILED)
    if isinstance(error, OSError):
        return one_line(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)), FAILED
    return one_line(f"{type(error).__name__}: {error} (a fault of luthier itself; --debug shows the stack trace)"), FAILED


def _call_line(error: LuthierError) -> str:
    parts = [error.message]
    parts += [f"{v.field}: {v.description}" for v in error.violations if v.description not in error.message]
    hint = HINTS.get(error.code.name)
    # A coordinator that answered has said itself what to do.
    if hint and (error.code is not grpc.StatusCode.UNAVAILABLE or "no coordinator answers" in error.message):
        parts.append(hint)
    return one_line("; ".join(parts))


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
