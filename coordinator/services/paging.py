"""Pages of a listing."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from common.errors import InvalidArgument, Violation


def page_size(asked: int, default: int = 50, most: int = 1000) -> int:
    """Rows of a page; InvalidArgument where the number asked for is out of range."""
    if not 0 <= asked <= most:
        raise InvalidArgument.of([Violation("page_size", f"{asked} is not between 1 and {most}")])
    return asked or default


def encode(*after: Any) -> str:
    """A page token: the sort key of the last row sent."""
    return base64.urlsafe_b64encode(json.dumps(after).encode()).decode().rstrip("=")


def decode(token: str, length: int) -> list[Any] | None:
    """What `encode` was given, None for the first page; InvalidArgument for a token that is not ours."""
    if not token:
        return None
    try:
        after = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError):
        after = None
    if not isinstance(after, list) or len(after) != length:
        raise InvalidArgument.of([Violation("page_token", "not a token of this listing; begin without one")])
    return after
