"""From a model id to the application that answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from serving.gateway.errors import ApiError, overloaded
from serving.gateway.snapshot import Endpoint, Key, Route, Snapshot


def find_endpoint(model: str, key: Key, snapshot: Snapshot) -> Endpoint:
    """Return the endpoint `model` of the key's project, or raise a 404: another project's looks like none."""
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
