"""From a model id to the application that answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from common import scopes
from serving.gateway.errors import ApiError, overloaded
from serving.gateway.snapshot import Endpoint, Key, Route, Snapshot


def find_endpoint(model: str, key: Key, snapshot: Snapshot, query: bool = True) -> Endpoint:
    """Return the endpoint `model` of the key's project, or raise a 404: another project's looks like none.

    A 403 where the key's scopes do not allow to query it, or without `query` to look at it, whether or not it exists.
    """
    if not (key.may_query(model) if query else key.may_see(model)):
        why = f"This API key lacks the scope {scopes.endpoint(model[:100])}."
        raise ApiError(403, why, "insufficient_scope", "model", "permission_error")
    endpoint = snapshot.endpoints.get((key.project, model))
    if endpoint is None:
        raise ApiError(
            404, f"The model `{model[:100]}` does not exist or you do not have access to it.", "model_not_found", "model"
        )
    return endpoint


def pick_route(endpoint: Endpoint, choose: random.Random) -> Route:
    """Return a route, by weight, or raise a 503 where none is ready."""
    routes: Sequence[Route] = [route for route in endpoint.routes if route.weight > 0]
    if not routes:
        raise overloaded(f"The model `{endpoint.endpoint}` is not ready yet.", retry_after_s=5)
    return choose.choices(routes, [route.weight for route in routes])[0]
