"""`cluster.yaml` by Ray's own check, and by what the rest of the project calls things."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def check(config):
    """What `ray up` does with a file before it touches a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(config):
    prepared = check(config)
    workers = len(config["provider"]["worker_ips"])
    node_type = prepared["available_node_types"][prepared["head_node_type"]]
    assert (node_type["min_workers"], node_type["max_workers"]) == (workers, workers)


def test_the_check_is_a_check(config):
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        check(config | {"head_start_ray_comands": []})
    with pytest.raises(ValidationError):
        check(config | {"idle_timeout_minutes": "five"})


def test_every_start_of_ray_asks_for_the_token(config):
    for phase in ("head_start_ray_commands", "worker_start_ray_commands"):
        [start] = [command for command in config[phase] if "ray start" in command]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in start
        assert "LUTHIER_NODE_HOME=" in start
    assert any("--address=$RAY_HEAD_IP:6379" in command for command in config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_the_coordinator_joins_that_ray_with_settings_that_exist(config):
    from common.settings import Settings

    start = coordinator_command(config)
    settings = dict(re.findall(r"\bLUTHIER_([A-Z_]+)=(\S+)", start))
    assert {name.lower() for name in settings} <= set(Settings.model_fields)
    assert settings["ADVERTISE"] == f"{config['provider']['head_ip']}:{settings['PORT']}"
    [head] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert f"--dashboard-port={settings['RAY_ADDRESS'].rpartition(':')[2]}" in head


def coordinator_command(config) -> str:
    [start] = [command for command in config["head_start_ray_commands"] if "-m coordinator" in command]
    return start


def test_the_commands_of_the_coordinator_work_and_a_second_time_replace_it(config, tmp_path):
    """As Ray has a shell on the head run them, with nothing of Ray there yet: the coordinator answers all the same."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    (tmp_path / "luthier").mkdir()
    (tmp_path / "luthier" / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".luthier").mkdir()
    (tmp_path / ".luthier" / "cluster-token").write_text("0" * 64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {"7420": str(port), "0.0.0.0": "127.0.0.1", "file:///mnt/luthier": (tmp_path / "mnt").as_uri(), ":8265": ":1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUTHIER_", "RAY_"))}
    pid_file = tmp_path / ".luthier" / "stack" / "pid"
    pids = []
    try:
        for _ in range(2):
            for command in config["head_start_ray_commands"]:
                if "ray s" in command:
                    continue
                for old, new in changes.items():
                    command = command.replace(old, new)
                subprocess.run(
                    ["bash", "--login", "-c", "-i", command], env={**kept, "HOME": str(tmp_path)}, check=True, timeout=60
                )
            pids.append(int(pid_file.read_text()))
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    assert pids[0] != pids[1]
    key = tmp_path / ".luthier" / "stack" / "admin.key"
    assert key.read_text().startswith("lut_")
    assert key.stat().st_mode & 0o077 == 0


def test_what_has_to_be_filled_in_is_marked():
    text = (ROOT / "cluster.yaml").read_text()
    marked = [line for line in text.splitlines() if "FILL IN" in line]
    for field in ("head_ip", "worker_ips", "ssh_user", "ssh_private_key", "LUTHIER_STORAGE_URI", "LUTHIER_ADVERTISE"):
        assert any(field in line for line in marked), field
