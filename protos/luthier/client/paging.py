"""Lists without pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar


class _Request(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


R = TypeVar("R", bound=_Request)
P = TypeVar("P", bound=_Page)
T = TypeVar("T")


def page_through(call: Callable[[R], P], request: R, items: Callable[[P], Iterable[T]]) -> Iterator[T]:
    """Yield the items of every page, asking for the next page when it is needed."""
    while True:
        page = call(request)
        yield from items(page)
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
