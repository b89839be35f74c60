"""Starting and stopping a whole local stack."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from cli.failures import Failure
from cli.machine import compiler, headers
from cli.signals import stoppable
from cli.stack import coordinator, ray_head
from cli.stack.ports import LOOPBACK, choose, is_free, ray_block
from cli.stack.processes import members, reap, stop
from cli.stack.state import ProcessRef, RayState, StackState, locked, read_state, state_path, write_state
from common.settings import Settings

PORT, GATEWAY_PORT = 7420, 8000
COORDINATOR_GRACE = 15.0
RAY_GRACE = 25.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What `luthier up` was asked for."""

    port: int | None = None
    gateway_port: int | None = None
    num_cpus: int | None = None
    ray_address: str = ""
    ray_token_path: Path | None = None
    storage_uri: str = ""


def prepare_home(home: Path) -> None:
    """Make the home, readable by its owner only."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not home.is_dir():
        raise Failure(f"{home} is not a folder; choose another with --home")
    home.chmod(0o700)


def up(home: Path, wishes: Wishes, say: Say) -> StackState:
    """Start what of the home's stack does not run, wait until all of it answers, and return it."""
    prepare_home(home)
    with stoppable(), locked(home):
        state = read_state(home)
        if state is None or not state.alive:
            return _start(home, wishes, state, say)
        if wishes.port not in (None, state.port) or wishes.gateway_port not in (None, state.gateway_port):
            raise Failure(f"a stack of {home} runs at {state.server} already; `luthier down` stops it")
        return _complete(home, state, say)


def _start(home: Path, wishes: Wishes, before: StackState | None, say: Say) -> StackState:
    """Start everything anew."""
    if not wishes.ray_address:
        for check in (compiler(), headers()):
            if not check.ok:
                raise Failure(f"{check.detail}; {check.advice}")
    if before is not None:
        reap(home, folders=[before.ray.temp_dir])
    settings = Settings(home=home)
    given = settings.model_fields_set
    port = wishes.port or (settings.port if "port" in given else None)
    gateway_port = wishes.gateway_port or (settings.gateway_port if "gateway_port" in given else None)
    joined = _joined(wishes, settings)
    with ExitStack() as reserved:
        chosen = choose("coordinator", "--port", port, PORT, home, reserved)
        chosen_gateway = choose("gateway", "--gateway-port", gateway_port, GATEWAY_PORT, home, reserved, taken=[chosen])
        for what, wished, usual, got in (
            ("coordinator", port, PORT, chosen),
            ("gateway", gateway_port, GATEWAY_PORT, chosen_gateway),
        ):
            if not wished and got != usual:
                say(f"port {usual} is in use; the {what} takes {got}")
        coordinator.ensure_admin_key(home)
        ray = joined or _new_ray(home, wishes, reserved)
        state = StackState(
            server=f"{LOOPBACK}:{chosen}",
            gateway_url=f"http://{LOOPBACK}:{chosen_gateway}/v1",
            ray=ray,
            storage_uri=wishes.storage_uri,
        )
        try:
            # Both at once: the coordinator answers before Ray is there.
            return _complete(home, state, say)
        except BaseException:
            _sweep(home, state)
            state_path(home).unlink(missing_ok=True)
            raise


def _joined(wishes: Wishes, settings: Settings) -> RayState | None:
    """The existing cluster to use, checked; None where the stack is to have a Ray of its own."""
    address = wishes.ray_address or settings.ray_address
    if not address:
        return None
    if not address.startswith(("http://", "https://")):
        raise Failure(f"{address!r} is not the URL of a Ray dashboard; it looks like http://head:8265", status=2)
    path = wishes.ray_token_path or settings.ray_token_path
    if path is not None and not path.is_file():
        raise Failure(f"there is no file {path} with Ray's token; name it with --ray-token-path", status=2)
    token_path = str(path.expanduser().absolute()) if path else ""
    if not ray_head.answers(address, token_path, timeout=10):
        raise Failure(f"no Ray answers at {address}; is it the dashboard's address (port 8265 by default)?", status=5)
    return RayState(address=address.rstrip("/"), token_path=token_path)


def _new_ray(home: Path, wishes: Wishes, reserved: ExitStack) -> RayState:
    ports = reserved.enter_context(ray_block())
    return ray_head.describe(home, wishes.num_cpus or ray_head.logical_cpus(), ports)


def _complete(home: Path, state: StackState, say: Say) -> StackState:
    """Start the parts that do not run, on the addresses of `state`, and wait until they answer."""
    ray_process, coordinator_process = state.ray_process, state.coordinator_process
    start_ray = state.ray.local and (ray_process is None or ray_process.process() is None)
    start_coordinator = coordinator_process is None or coordinator_process.process() is None
    if start_coordinator:
        coordinator.check_tls(Settings(home=home))
    if not start_ray and not start_coordinator:
        say(f"the stack of {home} runs already")
    if start_ray:
        reap(home, part=ray_head.PART, folders=[state.ray.temp_dir])
        ray_process = ray_head.start(state.ray, home)
    if start_coordinator:
        reap(home, part=coordinator.PART)
        _wait_for_port(state.port)
        coordinator_process = coordinator.start(state, home)
    state = state.with_processes(coordinator_process, ray_process)
    # Before waiting, so that `luthier down` finds everything even after a kill of this very process.
    write_state(home, state)
    assert coordinator_process is not None
    if start_coordinator:
        coordinator.wait_until_serving(state, coordinator_process, home)
        say(f"coordinator at {state.server}")
    if start_ray and ray_process is not None:
        ray_head.wait_until_up(state.ray, ray_process, home)
        say(f"Ray at {state.ray.address}")
    return state


def _wait_for_port(port: int) -> None:
    """Give a killed coordinator's port a moment to come free."""
    end = time.monotonic() + 5
    while not is_free(port):
        if time.monotonic() > end:
            raise Failure(
                f"port {port} of the coordinator is in use by another program; stop it, or `luthier down` and choose a --port"
            )
        time.sleep(0.1)


def down(home: Path, say: Say) -> list[int]:
    """Stop everything of the home's stack and return the ids of the processes that ran. Data stays."""
    if not home.is_dir():
        return []
    with locked(home):
        state = read_state(home)
        folders = [state.ray.temp_dir] if state else []
        running = [process.pid for process in members(home, folders=folders)]
        if state is not None:
            _sweep(home, state, say)
        else:
            reap(home)
        state_path(home).unlink(missing_ok=True)
        return running


def _sweep(home: Path, state: StackState, say: Say | None = None) -> None:
    """Stop the coordinator, then Ray, then whatever is left."""
    fresh = read_state(home) or state
    parts: tuple[tuple[str, ProcessRef | None, float], ...] = (
        ("coordinator", fresh.coordinator_process, COORDINATOR_GRACE),
        ("Ray", fresh.ray_process, RAY_GRACE),
    )
    for name, ref, grace in parts:
        process: psutil.Process | None = ref.process() if ref else None
        if process is not None:
            ended = stop(process, grace)
            if say is not None:
                say(f"{name} stopped" if ended else f"{name} does not stop by itself and is killed")
    reap(home, folders=[fresh.ray.temp_dir])
