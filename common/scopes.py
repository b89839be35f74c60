"""Scopes of a key: what of a project it may touch, whatever its role. Coordinator and gateway read them alike.

`jobs` is everything about jobs that the key's role allows, `jobs:read` only looking at them, `endpoints/shop` only querying that
one endpoint. A key without scopes is bound by its role alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from common.names import ID

NOUNS = ("jobs", "datasets", "models", "endpoints", "secrets", "keys", "members", "projects")
READ = ":read"
ENDPOINTS = "endpoints"
MOST = 32
"""Scopes of one key."""


def endpoint(name: str) -> str:
    """The scope of querying one endpoint."""
    return f"{ENDPOINTS}/{name}"


def problem(scope: str) -> str:
    """What is wrong with a scope, and what would be right; empty where nothing is."""
    noun, slash, name = scope.partition("/")
    if slash and noun == ENDPOINTS:
        return "" if ID.fullmatch(name) else f"{name[:80]!r} is not the name of an endpoint"
    if scope.removesuffix(READ) in NOUNS:
        return ""
    return f"{scope[:80]!r} is no scope; there are {', '.join(NOUNS)}, each also with {READ}, and {ENDPOINTS}/NAME"


def covers(held: str, wanted: str) -> bool:
    """Whether who holds one scope has all that another one gives."""
    return wanted == held or (held in NOUNS and (wanted == held + READ or wanted.startswith(f"{held}/")))


def allowed(held: Collection[str], wanted: str) -> bool:
    """Whether a key with these scopes may do what needs `wanted`."""
    return not held or any(covers(each, wanted) for each in held)


def beyond(held: Collection[str], wanted: Sequence[str]) -> list[str]:
    """What of `wanted` a key with the scopes `held` does not have itself; `all` where no scopes, hence all, are wanted."""
    if held and not wanted:
        return ["all"]
    return [each for each in wanted if not allowed(held, each)]
