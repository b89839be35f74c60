"""`cluster.yaml` by Ray's own check, and by what the rest of the project calls things."""

from __future__ import annotations

import copy
import re
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

    [up] = [command for command in config["head_start_ray_commands"] if "luthier up" in command]
    settings = {name.removeprefix("LUTHIER_").lower() for name in re.findall(r"\b(LUTHIER_[A-Z_]+)=", up)}
    assert settings
    assert settings <= set(Settings.model_fields)
    assert f"LUTHIER_ADVERTISE={config['provider']['head_ip']}:7420" in up
    assert "--ray-address http://127.0.0.1:8265" in up


def test_what_has_to_be_filled_in_is_marked():
    text = (ROOT / "cluster.yaml").read_text()
    marked = [line for line in text.splitlines() if "FILL IN" in line]
    for field in ("head_ip", "worker_ips", "ssh_user", "ssh_private_key", "storage", "LUTHIER_ADVERTISE"):
        assert any(field in line for line in marked), field
