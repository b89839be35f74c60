"""Status and keys as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from cli.render.text import ago, enum_text, facts, number, plain_table, when
from luthier.client import short_name
from luthier.v1.admin_pb2 import GetStatusResponse, Key, RayNode, Role


def status_table(status: GetStatusResponse) -> Table:
    """What runs and where."""
    ray = status.ray
    connected = Text("connected", "green") if ray.connected else Text(f"not connected: {ray.error}", "red")
    return facts(
        [
            ("coordinator", f"{status.coordinator.address}  pid {status.coordinator.pid}, {status.coordinator.store}"),
            ("", _rank(status)),
            ("metrics", f"http://{address}/metrics" if (address := status.coordinator.metrics_address) else ""),
            ("started", ago(status.coordinator.start_time)),
            ("gateway", f"{status.gateway.url}  {status.gateway.state.replace('_', ' ')}"),
            ("ray", ray.address),
            ("", connected),
            ("cpus", f"{number(ray.cpus_free)} of {number(ray.cpus)} free on {ray.nodes} nodes" if ray.nodes else ""),
            ("gpus", f"{number(ray.gpus_free)} of {number(ray.gpus)} free" if ray.gpus else ""),
            ("autoscaler", ray.autoscaler),
            (
                "jobs",
                ", ".join(f"{count} {state.removeprefix('JOB_STATE_').lower()}" for state, count in sorted(status.jobs.items())),
            ),
            ("versions", ", ".join(f"{name} {version}" for name, version in sorted(status.versions.items()))),
        ]
    )


def nodes_table(nodes: Iterable[RayNode]) -> Table:
    """Nodes of the cluster, one a row."""
    table = plain_table("node", "CPUs", "GPUs", "labels")
    for node in sorted(nodes, key=lambda node: (-node.gpus, -node.cpus, node.id)):
        # Every node has the label with its id, and nobody asks for a node by that.
        labels = [f"{name}={value}" for name, value in sorted(node.labels.items()) if name != "ray.io/node-id"]
        table.add_row(node.id[:12], number(node.cpus), number(node.gpus), ", ".join(labels) or "none")
    return table


def _rank(status: GetStatusResponse) -> str:
    """Whether the one that answers leads; nothing before anybody does."""
    coordinator = status.coordinator
    if not coordinator.leader:
        return ""
    return (
        f"leads, epoch {coordinator.epoch}" if coordinator.leads else f"follows {coordinator.leader}, epoch {coordinator.epoch}"
    )


def _limits(key: Key) -> str:
    """What it may ask of endpoints in a minute."""
    kinds = (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
    return ", ".join(f"{most} {kind}/min" for kind, most in kinds if most)


def keys_table(keys: Iterable[Key]) -> Table:
    """Keys, one a row."""
    table = plain_table("key", "for", "member", "role", "scopes", "limits", "made", "expires", "revoked")
    for key in keys:
        table.add_row(
            short_name(key.name),
            key.display_name,
            key.member,
            enum_text(Role.Name(key.role), "ROLE_"),
            ", ".join(key.scopes) or "all",
            _limits(key),
            ago(key.create_time),
            when(key.expire_time) or "never",
            when(key.revoke_time),
        )
    return table
