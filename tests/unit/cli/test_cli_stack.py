"""Ports, marks, reaping and the state of a stack; real processes, but neither Ray nor a coordinator."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from cli import machine
from cli.context import Cli, resolve
from cli.failures import Failure
from cli.stack import coordinator, ports, ray_head
from cli.stack.lifecycle import prepare_home
from cli.stack.processes import MARK, PART, last_lines, members, reap, spawn
from cli.stack.state import ProcessRef, RayState, StackState, locked, read_state, write_state
from tests.support.fake_services import FakeCoordinator

FAMILY = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
# One child that does not listen and has lost its mark, one grandchild whose parent ends at once.
subprocess.Popen([sys.executable, "-c", child], env={})
orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = (tmp_path / "home").resolve()
    prepare_home(home)
    yield home
    reap(home, grace=0)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def some_state(**values: object) -> StackState:
    ray = RayState(address="http://127.0.0.1:2", token_path="/t", gcs="127.0.0.1:1", temp_dir="/x", num_cpus=4, ports={"gcs": 1})
    return StackState(**({"server": "127.0.0.1:7420", "gateway_url": "http://127.0.0.1:8000/v1", "ray": ray} | values))  # type: ignore[arg-type]


def test_the_whole_family_is_found_by_its_mark_and_reaped(home: Path) -> None:
    ref = spawn([sys.executable, "-c", FAMILY], dict(os.environ), home, "ray")
    end = time.monotonic() + 20
    while "ready" not in last_lines(home, "ray", 5) or "deaf" not in last_lines(home, "ray", 5):
        assert time.monotonic() < end
        time.sleep(0.05)
    found = members(home)
    assert len(found) == 3
    assert ref.pid in {process.pid for process in found}
    assert members(home, part="coordinator") == []
    assert members(home.parent / "other") == []
    ended = reap(home, grace=1)
    assert set(ended) == {process.pid for process in found}
    assert members(home) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)
    assert ref.process() is None


def test_a_process_that_wiped_its_environment_is_known_by_its_log(home: Path) -> None:
    folder = home / "ray" / "s"
    folder.mkdir(parents=True)
    with (folder / "worker.out").open("w") as output:
        stray = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], env={}, stdout=output, start_new_session=True
        )
    try:
        assert members(home) == []
        assert [process.pid for process in members(home, folders=[str(folder)])] == [stray.pid]
        reap(home, folders=[str(folder)], grace=1)
        assert stray.poll() is not None
    finally:
        stray.kill()


def test_the_one_who_asks_is_never_reaped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pathlib import Path; from cli.stack.processes import reap; "
        "print(reap(Path(sys.argv[1]), grace=0)); print('alive')"
    )
    environment = {**os.environ, MARK: str(home), PART: "ray"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(home)], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["[]", "alive"]


def test_a_later_process_with_the_same_number_is_not_ours() -> None:
    own = psutil.Process()
    assert ProcessRef.of(own.pid).process() == own
    assert ProcessRef(own.pid, own.create_time() - 100).process() is None
    assert ProcessRef(2**22 + 1, 0).process() is None


def test_state_is_read_as_it_was_written_and_private(home: Path) -> None:
    state = some_state(coordinator_process=ProcessRef(1, 2.5), storage_uri="s3://b")
    write_state(home, state)
    assert read_state(home) == state
    assert stat.S_IMODE((home / "stack.json").stat().st_mode) == 0o600
    assert (state.port, state.gateway_port, state.ray.local) == (7420, 8000, True)
    content = json.loads((home / "stack.json").read_text())
    assert content["server"] == "127.0.0.1:7420"
    assert content["processes"]["coordinator"]["pid"] == 1
    assert read_state(home.parent) is None
    (home / "stack.json").write_text("{")
    with pytest.raises(Failure, match="remove it"):
        read_state(home)


def test_one_command_at_a_time(home: Path) -> None:
    with locked(home), pytest.raises(Failure, match="another `luthier up`"), locked(home):
        pass
    with locked(home):
        pass


def test_a_taken_port_is_an_error_that_names_it_and_the_way_out(home: Path, listener: int) -> None:
    with ExitStack() as reserved:
        assert not ports.is_free(listener)
        with pytest.raises(Failure, match=rf"port {listener} for the coordinator is in use.*--port"):
            ports.choose("coordinator", "--port", listener, 7420, home, reserved)
        near = ports.choose("coordinator", "--port", None, listener, home, reserved)
        assert listener < near <= listener + ports.NEARBY


def test_stacks_that_start_at_once_get_different_ports(home: Path, tmp_path: Path) -> None:
    with ExitStack() as first, ExitStack() as second:
        chosen = [
            ports.choose("gateway", "--gateway-port", None, 18_000, at, held) for at, held in ((home, first), (tmp_path, second))
        ]
    assert len(set(chosen)) == 2


def test_a_port_that_another_stack_will_use_later_is_taken(home: Path, tmp_path: Path) -> None:
    with ExitStack() as reserved:
        port = ports.choose("gateway", "--gateway-port", None, 18_500, home, reserved)
    state = some_state(gateway_url=f"http://127.0.0.1:{port}/v1", ray_process=ProcessRef.of(os.getpid()))
    write_state(home, state)
    with ExitStack() as reserved, pytest.raises(Failure, match="in use"):
        ports.choose("gateway", "--gateway-port", port, 18_500, tmp_path, reserved)
    write_state(home, state.with_processes(None, None))
    with ExitStack() as reserved:
        assert ports.choose("gateway", "--gateway-port", port, 18_500, tmp_path, reserved) == port


def test_a_port_of_grpc_is_taken_although_grpc_would_share_it(fake: FakeCoordinator) -> None:
    assert not ports.is_free(fake.port)
    fake.stop()
    assert ports.is_free(fake.port)


def test_rays_ports_are_distinct_and_two_stacks_get_different_ones() -> None:
    with ports.ray_block() as first, ports.ray_block() as second:
        assert len(set(first.values())) == len(first)
        assert set(ports.RAY_PORTS) | {"min_worker", "max_worker"} == set(first)
        spans = [range(min(block.values()), max(block.values()) + 1) for block in (first, second)]
        assert not set(spans[0]) & set(spans[1])
        named = {first[name] for name in ports.RAY_PORTS}
        assert not named & set(range(first["min_worker"], first["max_worker"] + 1))


def test_secrets_are_made_once_and_readable_by_their_owner_only(home: Path) -> None:
    key, token = coordinator.ensure_admin_key(home), ray_head.ensure_token(home)
    content = key.read_text().strip()
    assert content.startswith("lut_")
    assert len(content) == 4 + 43
    for path in (key, token):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert coordinator.ensure_admin_key(home).read_text().strip() == content
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_ray_gets_its_own_ports_token_and_folders_and_nobody_elses(home: Path) -> None:
    with ports.ray_block() as block:
        state = ray_head.describe(home, 4, block)
    inherited = {
        "RAY_ADDRESS": "other:1",
        "LUTHIER_TOKEN": "lut_secret",
        "LUTHIER_STORE_URL": "postgresql://u:p@h",
        "PATH": "/usr/bin",
    }
    environment = ray_head.environment(state, home, inherited)
    assert environment["RAY_ADDRESS"] == state.gcs == f"127.0.0.1:{block['gcs']}"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert Path(environment["RAY_AUTH_TOKEN_PATH"]) == home / "ray" / "token"
    assert environment["LUTHIER_NODE_HOME"] == str(home / "node")
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]
    assert not any("secret" in value or "u:p" in value for value in environment.values())
    proxies = {name: value for name, value in environment.items() if name.startswith("RAY_SERVE_HAPROXY") and "PORT" not in name}
    assert len(proxies) == 4
    assert all(value.startswith(state.temp_dir) for value in proxies.values())
    line = ray_head.command(state)
    assert "--head" in line
    assert f"--dashboard-port={block['dashboard']}" in line
    given = {int(part.rpartition("=")[2]) for part in line if "port=" in part}
    assert given == set(block.values()) - {
        block[name] for name in ("autoscaler_metrics", "dashboard_metrics", "haproxy_stats", "haproxy_metrics")
    }


def test_a_deep_home_gets_a_short_private_folder_for_sockets(home: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 20)
    folder = ray_head.temp_dir(deep)
    try:
        assert len(str(folder)) + len(ray_head.LONGEST_SOCKET) <= ray_head.SOCKET_LIMIT
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.chmod(0o777)  # as Ray does
        assert ray_head.temp_dir(deep) == folder
        folder.parent.chmod(0o755)
        with pytest.raises(Failure, match="nobody else can enter"):
            ray_head.temp_dir(deep)
    finally:
        folder.rmdir()
        folder.parent.rmdir()
    with tempfile.TemporaryDirectory(prefix="lt-") as short:
        assert ray_head.temp_dir(Path(short)) == Path(short) / "ray" / "s"


def test_old_sessions_are_removed(tmp_path: Path) -> None:
    for day in range(1, 6):
        (tmp_path / f"session_2026-01-0{day}_x").mkdir()
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_2026-01-05_x")
    ray_head.prune_sessions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["session_2026-01-04_x", "session_2026-01-05_x", "session_latest"]


def test_the_coordinator_is_told_everything_by_its_environment(home: Path) -> None:
    environment = coordinator.environment(
        some_state(storage_uri="s3://b"), home, {"LUTHIER_TOKEN": "x", "LUTHIER_STORE_URL": "postgresql://h"}
    )
    settings = {name.removeprefix("LUTHIER_"): value for name, value in environment.items() if name.startswith("LUTHIER_")}
    assert settings == {
        "HOME": str(home),
        "HOST": "127.0.0.1",
        "PORT": "7420",
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": "8000",
        "METRICS_PORT": "0",
        "RAY_ADDRESS": "http://127.0.0.1:2",
        "RAY_TOKEN_PATH": "/t",
        "AGENT_PYTHON": sys.executable,
        "STORAGE_URI": "s3://b",
        "STORE_URL": "postgresql://h",
    }
    assert environment["RAY_AUTH_MODE"] == "token"


def test_the_homes_key_is_shown_to_the_homes_coordinator_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_SERVER", raising=False)
    monkeypatch.delenv("LUTHIER_TOKEN", raising=False)
    key = coordinator.ensure_admin_key(home).read_text().strip()
    assert resolve(home, None, None, None, False).token == ""
    write_state(home, some_state(server="127.0.0.1:7999"))
    ours = resolve(home, None, None, None, False)
    assert (ours.server, ours.token) == ("127.0.0.1:7999", key)
    assert resolve(home, "elsewhere:7420", None, None, False).token == ""
    monkeypatch.setenv("LUTHIER_TOKEN", "lut_given")
    assert resolve(home, None, None, None, False).token == "lut_given"
    assert Cli(home=home, own_key=True).token == key


def test_a_missing_compiler_is_said_before_anything_starts(luthier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    monkeypatch.delenv("CXX", raising=False)
    ran = luthier("up", "--home", tmp_path / "h")
    assert ran.status == 1
    assert "error: no C++ compiler" in ran.stderr
    assert "CXX=g++" in ran.stderr
    assert not (tmp_path / "h" / "stack.json").exists()
    ran = luthier("doctor", "--home", tmp_path / "h", "-o", "json")
    assert ran.status == 1
    (check,) = [check for check in ran.json["checks"] if check["name"] == "compiler"]
    assert (check["ok"], check["needed"], check["advice"]) == (False, True, "set CXX=g++")


def test_train_says_it_too_where_the_job_would_run_here(luthier, fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "h"
    prepare_home(home)
    write_state(home, some_state(server=fake.address))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    ran = luthier("train", "--base", "builtin:tiny", "--dataset", "d", "--home", home)
    assert (ran.status, "no C++ compiler" in ran.stderr) == (1, True)
    assert not fake.jobs
    assert luthier("train", "--base", "builtin:tiny", "--dataset", "d", "--home", tmp_path / "other").status == 0


def test_up_refuses_what_cannot_work(luthier, tmp_path: Path, listener: int) -> None:
    home = tmp_path / "h"
    ran = luthier("up", "--home", home, "--port", str(listener))
    assert (ran.status, f"port {listener} for the coordinator is in use" in ran.stderr) == (1, True)
    ran = luthier("up", "--home", home, "--ray-address", "http://127.0.0.1:9")
    assert (ran.status, "no Ray answers at http://127.0.0.1:9" in ran.stderr) == (5, True)
    assert luthier("up", "--home", home, "--ray-address", "head:8265").status == 2
    ran = luthier("up", "--home", home, "--ray-address", "http://127.0.0.1:9", "--ray-token-path", tmp_path / "none")
    assert (ran.status, "there is no file" in ran.stderr) == (2, True)
    assert members(home.resolve()) == []


def test_a_coordinator_that_does_not_start_is_quoted_with_its_own_one_line(home: Path) -> None:
    say = "print('2026 INFO: something'); print('error: the store has schema 4711, and this version knows those up to 0015')"
    process = spawn([sys.executable, "-c", say], dict(os.environ), home, "coordinator")
    psutil.wait_procs([psutil.Process(process.pid)], timeout=20)
    with pytest.raises(Failure) as failure:
        coordinator.wait_until_serving(some_state(server="127.0.0.1:9"), process, home)
    assert str(failure.value).startswith("the coordinator did not start: the store has schema 4711, and this version knows those")
    assert "INFO" not in str(failure.value)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LUTHIER_TLS_CERT": "c.pem"}, "is set up for TLS, and `luthier` has to talk to it: set LUTHIER_CA to the file"),
        (
            {"LUTHIER_TLS_CERT": "c.pem", "LUTHIER_TLS_CLIENT_CA": "clients.pem", "LUTHIER_CA": "ca.pem"},
            "is set up for mutual TLS, and `luthier` has to talk to it: set LUTHIER_CERT and LUTHIER_KEY to the files",
        ),
        ({"LUTHIER_CA": "ca.pem"}, "LUTHIER_CA is set, and the coordinator is not set up for TLS"),
        ({"LUTHIER_TLS_CERT": "c.pem", "LUTHIER_CA": "/none.pem"}, "ca (LUTHIER_CA): cannot read /none.pem"),
    ],
)
def test_up_says_at_once_that_it_could_not_talk_to_what_it_would_start(
    luthier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray_head, "start", lambda *_: pytest.fail("Ray was started"))
    ran = luthier("up", "--home", tmp_path / "h")
    assert (ran.status, said in ran.stderr) == (2, True), ran.stderr
    assert not (tmp_path / "h" / "stack.json").exists()
    assert members((tmp_path / "h").resolve()) == []


def test_down_and_doctor_where_nothing_runs(luthier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_SERVER")
    assert luthier("down", "--home", tmp_path / "none", "-o", "json").json["stopped"] == []
    ran = luthier("doctor", "--home", tmp_path / "none", "-o", "json")
    assert {check["name"] for check in ran.json["checks"]} >= {
        "python",
        "compiler",
        "ninja",
        "ray",
        "disk",
        "memory",
        "port 7420",
        "gpu",
        "stack",
    }


def test_a_shadowed_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    code = "from cli.machine import shadowed; print([check.detail for check in shadowed() if not check.ok])"
    # cli itself is found before the path is changed.
    script = f"import sys, cli.machine; sys.path.insert(0, {str(tmp_path)!r}); sys.modules.pop('common', None); {code}"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert f"another package of that name lies at {tmp_path / 'common'}" in said
