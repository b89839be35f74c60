"""The coordinator of a local stack as a process."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.failures import USAGE, Failure
from cli.stack.ports import LOOPBACK
from cli.stack.processes import last_lines, spawn
from cli.stack.ray_head import NOT_INHERITED, write_secret
from cli.stack.state import ProcessRef, StackState
from common.settings import Settings
from luthier.client import Client, LuthierError
from luthier.client.channel import bare_channel
from luthier.client.tls import Tls

PART = "coordinator"


def ensure_admin_key(home: Path) -> Path:
    """The file with the admin key, made if absent. The coordinator reads it and stores its hash."""
    path = home / "admin.key"
    if not path.exists():
        write_secret(path, f"lut_{secrets.token_urlsafe(32)}\n")
    return path


def environment(state: StackState, home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of the coordinator: its settings, and Ray's token for its own connections to Ray."""
    kept = set(NOT_INHERITED) - {"LUTHIER_STORE_URL"}
    values = {name: value for name, value in inherited.items() if name not in kept}
    values |= {
        "PYTHONUNBUFFERED": "1",
        "LUTHIER_HOME": str(home),
        "LUTHIER_HOST": LOOPBACK,
        "LUTHIER_PORT": str(state.port),
        "LUTHIER_GATEWAY_HOST": LOOPBACK,
        "LUTHIER_GATEWAY_PORT": str(state.gateway_port),
        "LUTHIER_METRICS_PORT": values.get("LUTHIER_METRICS_PORT", "0"),
        "LUTHIER_RAY_ADDRESS": state.ray.address,
        "LUTHIER_AGENT_PYTHON": sys.executable if state.ray.local else values.get("LUTHIER_AGENT_PYTHON", "python"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Said in so many words, because Ray turns tokens on by itself where it finds a token file.
        "RAY_AUTH_MODE": "token" if state.ray.token_path else "disabled",
    }
    if state.ray.token_path:
        values |= {"LUTHIER_RAY_TOKEN_PATH": state.ray.token_path, "RAY_AUTH_TOKEN_PATH": state.ray.token_path}
    if state.storage_uri:
        values["LUTHIER_STORAGE_URI"] = state.storage_uri
    return values


def check_tls(settings: Settings) -> None:
    """Raise Failure where this process could not talk to the coordinator that it is about to start."""
    tls = Tls.of()
    missing = []
    if settings.tls_cert is not None and not tls.ca:
        missing.append("LUTHIER_CA to the file with the CA of its certificate")
    if settings.tls_client_ca is not None and not (tls.cert and tls.key):
        missing.append(f"LUTHIER_CERT and LUTHIER_KEY to the files of a certificate that {settings.tls_client_ca} knows")
    if missing:
        kind = "mutual TLS" if settings.tls_client_ca is not None else "TLS"
        raise Failure(f"the coordinator is set up for {kind}, and `luthier` has to talk to it: set {', '.join(missing)}", USAGE)
    if settings.tls_cert is None and tls.ca:
        raise Failure("LUTHIER_CA is set, and the coordinator is not set up for TLS: set LUTHIER_TLS_CERT, or unset it", USAGE)
    tls.credentials()


def start(state: StackState, home: Path) -> ProcessRef:
    """Start the coordinator; `wait_until_serving` tells when it answers."""
    return spawn([sys.executable, "-m", "coordinator"], environment(state, home, os.environ), home, PART)


def serving(server: str, timeout: float = 2.0) -> bool:
    """Whether a coordinator at host:port says that it serves."""
    with bare_channel(server, [("grpc.enable_http_proxy", 0)], Tls.of()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its calls are not typed
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def wait_until_serving(state: StackState, process: ProcessRef, home: Path, timeout: float = 60.0) -> None:
    """Wait until this very coordinator serves. Raises Failure with the end of its log where it does not."""
    end = time.monotonic() + timeout
    log = home / "logs" / "coordinator.log"
    while not (serving(state.server, timeout=0.5) and _pid(state.server, home) == process.pid):
        if process.process() is None:
            raise Failure(f"the coordinator did not start: {_last_words(home)}; see {log}")
        if time.monotonic() > end:
            raise Failure(f"the coordinator does not serve after {timeout:.0f} s; see {log}")
        time.sleep(0.1)


def _last_words(home: Path) -> str:
    """Why a coordinator ended: the one line that it says itself, or else the end of its log."""
    said = last_lines(home, PART, 1)
    return said.removeprefix("error: ") if said.startswith("error: ") else last_lines(home, PART)


def _pid(server: str, home: Path) -> int:
    """Process id of the coordinator that answers at host:port; 0 where it is not this home's, and refuses its key."""
    with Client(server, ensure_admin_key(home).read_text(encoding="utf-8").strip(), timeout=5) as client:
        try:
            return client.status().coordinator.pid
        except LuthierError:
            return 0
