"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from common.errors import FailedPrecondition, InvalidArgument, LuthierError, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An HTTP answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong; `param` is the field."""
    return ApiError(400, message, code, param)


def unauthenticated(message: str, code: str | None = "invalid_api_key") -> ApiError:
    """No key, or one that does not count."""
    return ApiError(401, message, code, headers={"www-authenticate": "Bearer"})


def overloaded(message: str, status: int = 503, retry_after_s: int = 1) -> ApiError:
    """Too much at once (429), or nothing there that could answer now (503)."""
    kind, code = ("rate_limit_error", "rate_limit_exceeded") if status == 429 else ("server_error", "unavailable")
    return ApiError(status, message, code, kind=kind, headers={"retry-after": str(retry_after_s)})


def from_exception(error: BaseException, request_id: str) -> ApiError:
    """Return what a client is told about `error`. Faults of our own go to the log; the client gets the id to ask about."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidArgument):
        param = error.violations[0].field if len(error.violations) == 1 else None
        code = "context_length_exceeded" if error.reason == "PROMPT_TOO_LONG" else None
        return bad_request(error.message, param, code)
    if isinstance(error, FailedPrecondition):
        return bad_request(error.message, code=error.reason.lower())
    if isinstance(error, ResourceExhausted):
        return overloaded(error.message, 429)
    if isinstance(error, Unavailable):
        return overloaded(error.message)
    if not isinstance(error, LuthierError):
        logger.error("request %s failed", request_id, exc_info=error)
    else:
        logger.error("request %s failed: %s", request_id, error.message)
    return ApiError(
        500, f"The server had an error. Ask about it with the id {request_id}.", "internal_error", kind="server_error"
    )
