"""The Ray of a local stack: one node on loopback, with a token, on ports of its own."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil

from cli.failures import NOT_ALLOWED, Failure
from cli.stack.ports import LOOPBACK
from cli.stack.processes import last_lines, spawn
from cli.stack.state import ProcessRef, RayState

PART = "ray"
SOCKET_LIMIT = 107
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.sock"
SESSIONS_KEPT = 3

# Settings of other clusters, and what must not reach every worker of this one.
NOT_INHERITED = (
    *("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NAMESPACE"),
    *("LUTHIER_TOKEN", "LUTHIER_SERVER", "LUTHIER_STORE_URL", "LUTHIER_HOME", "LUTHIER_OUTPUT", "LUTHIER_PROJECT"),
)


def logical_cpus() -> int:
    """CPUs that Ray is told of: two more than there are, since drivers, gateway and replicas mostly wait."""
    return (os.cpu_count() or 1) + 2


def write_secret(path: Path, content: str) -> None:
    """Write a file that only its owner can read, and never over an existing one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)


def ensure_token(home: Path) -> Path:
    """The file with Ray's token, made if absent."""
    path = home / "ray" / "token"
    if not path.exists():
        write_secret(path, secrets.token_hex(32))
    return path


def temp_dir(home: Path) -> Path:
    """The folder for Ray's sessions: in the home, or where its socket paths would be too long, below one in /tmp.

    Ray opens this folder to everybody, so it is the folder around it that keeps others out.
    """
    guard = home / "ray"
    if len(os.fsencode(guard)) + len("/s") + len(LONGEST_SOCKET) > SOCKET_LIMIT:
        guard = Path(f"/tmp/luthier-{hashlib.sha256(os.fsencode(home)).hexdigest()[:10]}")  # noqa: S108 - checked below
    guard.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = guard.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Failure(
            f"{guard} is not a folder of yours that nobody else can enter; remove it, or choose a --home with a short path"
        )
    folder = guard / "s"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def environment(state: RayState, home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of Ray's processes, and through them of agents, gateway and replicas."""
    values = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
    proxy = Path(state.temp_dir) / "haproxy"
    return values | {
        # Programs of this environment (ninja, for DeepSpeed's ops) come first.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "LUTHIER_NODE_HOME": str(home / "node"),
        "RAY_ADDRESS": state.gcs,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": state.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Draining waits for work to move to another node, and here is none.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # The only switch that keeps a Linux node on loopback: --node-ip-address turns 127.0.0.1 into the host's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": str(state.ports["autoscaler_metrics"]),
        "DASHBOARD_METRIC_PORT": str(state.ports["dashboard_metrics"]),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(state.ports["haproxy_stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(state.ports["haproxy_metrics"]),
    }


def command(state: RayState) -> list[str]:
    """The command line of Ray's head."""
    ports = state.ports
    flags = {
        "node-ip-address": LOOPBACK,
        "port": ports["gcs"],
        "dashboard-host": LOOPBACK,
        "dashboard-port": ports["dashboard"],
        "dashboard-agent-listen-port": ports["dashboard_agent"],
        "dashboard-agent-grpc-port": ports["dashboard_agent_grpc"],
        "node-manager-port": ports["node_manager"],
        "object-manager-port": ports["object_manager"],
        "ray-client-server-port": ports["ray_client"],
        "metrics-export-port": ports["metrics_export"],
        "runtime-env-agent-port": ports["runtime_env_agent"],
        "min-worker-port": ports["min_worker"],
        "max-worker-port": ports["max_worker"],
        "temp-dir": state.temp_dir,
        "num-cpus": state.num_cpus,
        # Rows travel through storage, not through Ray's object store; the memory is better left to training.
        "object-store-memory": max(128 * 2**20, min(2**30, psutil.virtual_memory().total // 10)),
        "log-style": "record",
        "log-color": "false",
    }
    ray = str(Path(sys.executable).parent / "ray")
    return [ray, "start", "--head", "--block", "--disable-usage-stats", *(f"--{name}={value}" for name, value in flags.items())]


def describe(home: Path, num_cpus: int, ports: Mapping[str, int]) -> RayState:
    """The Ray that a home is to have."""
    return RayState(
        address=f"http://{LOOPBACK}:{ports['dashboard']}",
        token_path=str(ensure_token(home)),
        gcs=f"{LOOPBACK}:{ports['gcs']}",
        temp_dir=str(temp_dir(home)),
        num_cpus=num_cpus,
        ports=dict(ports),
    )


def start(state: RayState, home: Path) -> ProcessRef:
    """Start Ray's head; `wait_until_up` tells when it answers."""
    prune_sessions(Path(state.temp_dir))
    (home / "node").mkdir(mode=0o700, exist_ok=True)
    return spawn(command(state), environment(state, home, os.environ), home, PART)


def prune_sessions(folder: Path) -> None:
    """Remove what earlier sessions left behind, but for the latest."""
    sessions = sorted((path for path in folder.glob("session_2*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for old in sessions[SESSIONS_KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def answers(address: str, token_path: str, timeout: float = 2.0) -> bool:
    """Whether Ray's dashboard answers at an address. Raises Failure where it refuses the token."""
    token = Path(token_path).read_text(encoding="utf-8").strip() if token_path else ""
    request = urllib.request.Request(  # noqa: S310 - an address that the operator gave
        f"{address.rstrip('/')}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    opener = (
        urllib.request.build_opener(urllib.request.ProxyHandler({})) if LOOPBACK in address else urllib.request.build_opener()
    )
    try:
        with opener.open(request, timeout=timeout) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise Failure(
                f"Ray at {address} refuses the token; name the right file with --ray-token-path", NOT_ALLOWED
            ) from error
        return False
    except (OSError, ValueError):
        return False


def wait_until_up(state: RayState, process: ProcessRef, home: Path, timeout: float = 90.0) -> None:
    """Wait until Ray answers. Raises Failure with the end of its log where it does not."""
    end = time.monotonic() + timeout
    while not answers(state.address, state.token_path):
        if process.process() is None:
            raise Failure(f"Ray did not start: {last_lines(home, PART)}; see {home / 'logs' / 'ray.log'}")
        if time.monotonic() > end:
            raise Failure(f"Ray does not answer after {timeout:.0f} s; see {home / 'logs' / 'ray.log'}")
        time.sleep(0.2)
