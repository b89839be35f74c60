"""Answers Prometheus: the instruments of `metrics.py`, and what the records say at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector
from sqlmodel import Session, col, func, select

from common.errors import FailedPrecondition, Unavailable
from coordinator.jobs.states import State
from coordinator.metrics import REGISTRY
from coordinator.store.database import Store
from coordinator.store.tables import Endpoint, Job, now
from luthier.v1 import endpoint_pb2

ENDPOINT_STATES = tuple(name for name, number in endpoint_pb2.EndpointState.items() if number)


class StoreFigures(Collector):
    """What the records say, read in one transaction when Prometheus asks. Where they cannot be read, it is told only that."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Jobs and endpoints by state, and how long the one at the end of its patience has waited."""
        up = GaugeMetricFamily("luthier_store_up", "Whether the records can be read.")
        try:
            jobs, oldest, endpoints = self._store.read_now(_read)
        except Unavailable:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        by_state = GaugeMetricFamily("luthier_jobs", "Jobs in the records, by state.", labels=["state"])
        for state in State:
            by_state.add_metric([state.value.lower()], jobs.get(state.value, 0))
        yield by_state
        waited = 0.0 if oldest is None else (now() - oldest).total_seconds()
        yield GaugeMetricFamily("luthier_queue_oldest_wait_seconds", "Since when the oldest queued job waits.", value=waited)
        deployed = GaugeMetricFamily("luthier_endpoints", "Endpoints, by state.", labels=["state"])
        for name in ENDPOINT_STATES:
            deployed.add_metric([name.removeprefix("ENDPOINT_STATE_").lower()], endpoints.get(name, 0))
        yield deployed


def _read(session: Session) -> tuple[dict[str, int], datetime | None, dict[str, int]]:
    jobs = dict(session.exec(select(Job.state, func.count()).group_by(Job.state)).all())
    oldest = session.exec(select(func.min(col(Job.create_time))).where(Job.state == State.QUEUED.value)).one()
    endpoints = dict(session.exec(select(Endpoint.state, func.count()).group_by(Endpoint.state)).all())
    return jobs, oldest, endpoints


@contextmanager
def exposed(host: str, port: int | None, store: Store) -> Iterator[str]:
    """Answer `GET /metrics` in a thread of its own, at the host:port that is given; nowhere without a port.

    Raises FailedPrecondition where the port is taken.
    """
    if port is None:
        yield ""
        return
    figures = StoreFigures(store)
    REGISTRY.register(figures)
    try:
        server, thread = start_http_server(port, addr=host, registry=REGISTRY)
    except OSError as error:
        REGISTRY.unregister(figures)
        why = f"cannot listen on {host}:{port} for metrics ({error.strerror}); choose another LUTHIER_METRICS_PORT"
        raise FailedPrecondition(why, "PORT_TAKEN") from None

    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        REGISTRY.unregister(figures)
