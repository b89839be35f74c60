"""A Ray head with an autoscaler whose machines are processes on this one: Ray's own fake provider (`fake_multinode`)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.stack import processes, ray_head
from cli.stack.ports import ray_block
from cli.stack.state import RayState

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The id that Ray's fake provider expects of the head."""


@contextmanager
def running(node_types: dict[str, dict[str, Any]], idle_minutes: float) -> Iterator[RayState]:
    """Run a head without a CPU of its own, which may start nodes of some types (as in cluster.yaml). Nothing of it is left."""
    # Not below pytest's own folders: Ray's socket paths have to stay short.
    home = Path(tempfile.mkdtemp(prefix="la-", dir="/tmp"))
    try:
        with ray_block() as ports:
            state = ray_head.describe(home, 0, ports)
            config = home / "autoscaler.json"
            config.write_text(json.dumps(_config(state, node_types, idle_minutes)))
            (home / "node").mkdir(mode=0o700)
            command = [*ray_head.command(state), f"--autoscaling-config={config}"]
            environment = ray_head.environment(state, home, os.environ) | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            }
            process = processes.spawn(command, environment, home, ray_head.PART)
            ray_head.wait_until_up(state, process, home, timeout=120)
        yield state
    finally:
        processes.reap(home, folders=[str(home)])
        shutil.rmtree(home, ignore_errors=True)


def _config(state: RayState, node_types: dict[str, dict[str, Any]], idle_minutes: float) -> dict[str, Any]:
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": 8,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            # By its class: the defaults that Ray reads for `fake_multinode` are not in its wheel.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": state.gcs,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {"ray.head.default": head, **node_types},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 20,
        "auth": {},
        **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
        **{name: [] for name in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")},
        "cluster_synced_files": [],
        **{name: {} for name in ("file_mounts", "docker")},
    }
