"""What Prometheus is told of this process (`exposition.py` adds what the records say, and answers).

Names and units follow Prometheus's own rules (seconds, `_total`), those of calls the gRPC ecosystem's. Labels have few values:
never a job's name, nor anything else that a user chose.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector

REGISTRY = CollectorRegistry()
"""This process's figures, and nobody else's: Ray's client library fills the default registry with its own."""

ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
Info("luthier_build", "Version of Luthier.", registry=REGISTRY).info({"version": version("luthier")})

HANDLED = Counter(
    "luthier_grpc_server_handled", "Calls that were answered, by method and status code.", ["method", "code"], registry=REGISTRY
)
HANDLING = Histogram(
    "luthier_grpc_server_handling_seconds", "Time to the answer of calls with one answer.", ["method"], registry=REGISTRY
)
STREAMS = Gauge("luthier_grpc_server_streams", "Streams that are open: watches and log followers.", ["method"], registry=REGISTRY)
COMMIT = Histogram(
    "luthier_store_commit_seconds",
    "Time of a group of changes, from the first one to its durable commit.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
GROUP = Histogram(
    "luthier_store_group_size", "Changes that shared a commit.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=REGISTRY
)
FAILED = Counter("luthier_store_changes_failed", "Changes that the database did not take.", registry=REGISTRY)
PLANNING = Histogram("luthier_scheduler_plan_seconds", "Time to read the situation and decide.", registry=REGISTRY)
ROUND_FAILED = Counter("luthier_scheduler_rounds_failed", "Rounds of the reconciler that broke off.", registry=REGISTRY)
STARTS = Counter("luthier_scheduler_starts", "Runs that were begun.", registry=REGISTRY)
PREEMPTIONS = Counter("luthier_scheduler_preemptions", "Runs that were asked to give their place up.", registry=REGISTRY)
RUN_ENDS = Counter(
    "luthier_runs_ended_by_coordinator", "Runs without an outcome of their own, by why.", ["reason"], registry=REGISTRY
)

_GAUGES: dict[str, Gauge] = {}


def watch(name: str, description: str, read: Callable[[], float]) -> None:
    """A figure of this process that is read when Prometheus asks. A later one of the name takes the place of an earlier one."""
    gauge = _GAUGES.get(name) or Gauge(name, description, registry=REGISTRY)
    _GAUGES[name] = gauge
    gauge.set_function(read)
