"""What Ray Serve imports: `build_gateway` and `build_model` make the two kinds of application."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from common import tracing
from serving.gateway.backend import ServeBackend
from serving.gateway.http import GatewayState, create_app
from serving.gateway.snapshot import Snapshot
from serving.replica import ModelReplica
from serving.wire import GatewayArgs, ModelArgs


@serve.ingress()
class Gateway:
    """The ingress of the stack. Its snapshot arrives as Serve's user_config, without a restart."""

    def __init__(self, args: GatewayArgs) -> None:
        tracing.start_from_environment("luthier-gateway")
        self._backend = ServeBackend()
        self._state = GatewayState(args, self._backend)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._state)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new snapshot whole."""
        snapshot = Snapshot.of(user_config)
        self._backend.keep(snapshot.apps())
        self._state.take(snapshot)


# The coordinator's rendered configuration overrides these options; they are what a bare `serve run` gets.
GatewayDeployment = serve.deployment(name="Gateway", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1024)(Gateway)
ModelDeployment = serve.deployment(name="Model", ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=16)(ModelReplica)


def build_gateway(args: dict[str, Any]) -> Application:
    """Make the gateway application from GatewayArgs."""
    return GatewayDeployment.bind(GatewayArgs.of(args))


def build_model(args: dict[str, Any]) -> Application:
    """Make the application of one model version from ModelArgs."""
    return ModelDeployment.bind(ModelArgs(**args))
