"""From a model id to the route that answers."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence

from common import scopes
from serving.gateway.errors import ApiError, overloaded
from serving.gateway.snapshot import Endpoint, Key, Route, Snapshot


def find_endpoint(model: str, key: Key, snapshot: Snapshot, query: bool = True) -> Endpoint:
    """Return the endpoint of the key's project that `model` names (`ENDPOINT` or `ENDPOINT@ALIAS`), or raise a 404.

    Another project's looks like none. With an alias, the endpoint has only the routes of the version that it stands for now. A
    403 where the key's scopes do not allow to query it, or without `query` to look at it, whether or not it exists.
    """
    name, at, alias = model.partition("@")
    if not (key.may_query(name) if query else key.may_see(name)):
        why = f"This API key lacks the scope {scopes.endpoint(name[:100])}."
        raise ApiError(403, why, "insufficient_scope", "model", "permission_error")
    endpoint = snapshot.endpoints.get((key.project, name))
    if endpoint is None:
        raise ApiError(
            404, f"The model `{model[:100]}` does not exist or you do not have access to it.", "model_not_found", "model"
        )
    if not at:
        return endpoint
    versions = endpoint.aliases.get(alias, frozenset())
    routes = tuple(route for route in endpoint.routes if route.model_version in versions)
    if not routes:
        why = f"The endpoint `{name[:100]}` serves no version that `{alias[:100]}` stands for now."
        raise ApiError(404, why, "model_not_found", "model")
    return Endpoint(endpoint.project, endpoint.endpoint, endpoint.create_time, routes)


def pick_route(endpoint: Endpoint, choose: random.Random, user: str = "", headers: Mapping[str, str] | None = None) -> Route:
    """Return the route of a request, or raise a 503 where none is ready.

    A route that wants headers is for those who send them all. Of the others one is chosen by weight: for a `user` always the same
    while the weights stay, and where they change as few users as possible move (weighted rendezvous hashing, Schindelhauer and
    Schomaker, 2005).
    """
    sent = headers or {}
    for route in endpoint.routes:
        if route.headers and not route.shadow and all(sent.get(name) == value for name, value in route.headers.items()):
            return route
    routes: Sequence[Route] = [route for route in endpoint.routes if route.weight > 0 and not route.headers and not route.shadow]
    if not routes:
        raise overloaded(f"The model `{endpoint.endpoint}` is not ready yet.", retry_after_s=5)
    if user:
        return max(routes, key=lambda route: _score(endpoint, route, user))
    return choose.choices(routes, [route.weight for route in routes])[0]


def shadows(endpoint: Endpoint) -> list[Route]:
    """Return the routes that get a copy."""
    return [route for route in endpoint.routes if route.shadow]


def _score(endpoint: Endpoint, route: Route, user: str) -> float:
    text = "\0".join((endpoint.project, endpoint.endpoint, route.model_version, user))
    drawn = (int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") + 1) / (2**64 + 1)
    return -route.weight / math.log(drawn)
