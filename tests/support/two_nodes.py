"""Run as a script: a Ray cluster of two nodes on this machine, each with a home of its own, until standard input closes.

Prints one line of JSON with the dashboard's address. The homes are kept apart by an audit hook in every Python process of a node
(see `fence.py`): opening anything below a forbidden folder raises there, and is written down.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(root: Path) -> None:
    """Start, tell, wait, stop."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(root / "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The cluster writes its address below here, where no other program looks for a running Ray.
    os.environ["RAY_TMPDIR"] = str(root)
    (root / "ray").mkdir()
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    def of_node(name: str, other: str) -> dict[str, str]:
        home = root / name
        (home / "user").mkdir(parents=True)
        return {
            "HOME": str(home / "user"),
            "LUTHIER_NODE_HOME": str(home),
            "PYTHONPATH": str(root / "fence"),
            "FENCE_FORBIDDEN": os.pathsep.join([str(root / other), str(root / "coordinator")]),
            "FENCE_LOG": str(root / "trespasses"),
        }

    common = {"temp_dir": str(root / "r"), "node_ip_address": "127.0.0.1"}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": int(sys.argv[2]),
            "env_vars": of_node("node-a", "node-b"),
            **common,
        },
    )
    cluster.add_node(num_cpus=2, labels={"zone": "b"}, env_vars=of_node("node-b", "node-a"), **common)
    cluster.wait_for_nodes()
    # As `ray start` does, and `Cluster` does not: a job's supervisor finds its cluster by this file. Without it the supervisor
    # takes any Ray that runs on the machine, which is another test's stack every other time.
    write_ray_address(cluster.gcs_address, common["temp_dir"])
    print(json.dumps({"dashboard": f"http://{cluster.head_node.webui_url}"}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
