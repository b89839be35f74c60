"""A job keeps the trace of the call that made it, and what is done for it later belongs to that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from sqlmodel import Session

from common import tracing
from coordinator.__main__ import _add_trace
from coordinator.cluster.serve_config import GATEWAY_APP
from coordinator.endpoints.reconcile import Deployer
from coordinator.jobs.reconcile import Reconciler
from coordinator.notify import Notifier
from coordinator.services.agent import AgentService
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.vault import Vault
from luthier.agent.v1 import agent_pb2
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import SECRET, now_of, secret_of
from tests.support.otlp import Collector, collecting

NewJob = Callable[..., tables.Job]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        tracing.start("luthier-coordinator", collector.endpoint, ratio=0.0)
        yield collector
        tracing.stop()


async def test_its_launch_and_its_claim_belong_to_the_trace_of_the_call_that_made_it(
    collector: Collector, loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob, vault: Vault
) -> None:
    with tracing.span("CreateJob", PARENT) as made:
        job = new_job()
        expected = tracing.traceparent(made)
    await loop.round()
    token = ray.environments[f"luthier-{job.uid}-r1"]["LUTHIER_CLAIM_TOKEN"]
    request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=1, claim_token=token, session_secret=SECRET)
    service = AgentService(store, Notifier(), secret_of(store), "mem://", vault)
    claimed = await service.ClaimRun(request, None)  # type: ignore[arg-type]
    assert claimed.trace_parent == now_of(store, job).trace_parent == expected
    tracing.stop()
    (launch,) = [span for span in collector.spans if span.name == "launch"]
    assert (launch.trace_id, launch.failed) == (TRACE, "")
    assert launch.attributes == {"luthier.project": "default", "luthier.job": job.job_id, "luthier.run": 1}
    assert launch.parent_id == expected.split("-")[2]


async def test_a_launch_that_ray_does_not_take_is_marked_and_logged_with_its_trace(
    collector: Collector, loop: Reconciler, ray: FakeRay, new_job: NewJob, caplog: pytest.LogCaptureFixture
) -> None:
    with tracing.span("CreateJob", PARENT):
        new_job()
    caplog.handler.addFilter(_add_trace)
    refuse, ray.submit = ray.submit, None  # type: ignore[assignment,method-assign]

    def down(*arguments: object) -> bool:
        ray.down = True
        try:
            return refuse(*arguments)  # type: ignore[arg-type]
        finally:
            ray.down = False

    ray.submit = down  # type: ignore[assignment,method-assign]
    await loop.round()
    caplog.handler.removeFilter(_add_trace)
    (said,) = [record for record in caplog.records if "is not submitted yet" in record.getMessage()]
    assert said.trace == f" [trace {TRACE}]"
    tracing.stop()
    assert [span.failed for span in collector.spans if span.name == "launch"] == ["UNAVAILABLE"]


async def test_a_write_says_how_long_it_waited_and_what_is_no_part_of_a_trace_makes_no_span(
    collector: Collector, store: Store
) -> None:
    def work(session: Session) -> None:
        session.add(tables.StackFact(key="k", value="v"))

    await store.write(work)
    with tracing.span("call", PARENT):
        await store.write(lambda session: None)
    tracing.stop()
    (write,) = [span for span in collector.spans if span.name == "store.write"]
    assert write.trace_id == TRACE
    assert write.attributes["luthier.store.together"] == 1
    assert 0 <= write.attributes["luthier.store.wait_seconds"] <= write.seconds
    assert 0 < write.attributes["luthier.store.record_seconds"] <= write.seconds + 0.01


def test_lines_of_the_log_that_belong_to_no_trace_are_as_they_were() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "said", (), None)
    assert _add_trace(record)
    assert record.trace == ""


async def test_the_gateway_and_replicas_are_told_where_traces_go(store: Store, ray: FakeRay, leadership: Leadership) -> None:
    def deployed(session: Session) -> None:
        moment = tables.now()
        row = tables.Endpoint(project_id="default", id="desk", state="DEPLOYING", create_time=moment, update_time=moment)
        row.desired = {
            "endpoint": {"routes": [{"model_version": "m@1", "weight": 1}]},
            "artifacts": {"m@1": {"uri": "mem://m", "content_hash": "c"}},
        }
        session.add(row)

    store.write_now(deployed)
    environment = tracing.environment("http://collector:4317", 0.5)
    assert environment == {"LUTHIER_OTLP_ENDPOINT": "http://collector:4317", "LUTHIER_TRACE_SAMPLE_RATIO": "0.5"}
    for given in ({}, environment):
        deployer = Deployer(store, ray, Notifier(), leadership, "127.0.0.1", 8000, "secret", given)  # type: ignore[arg-type]
        await deployer.round()
        (gateway,) = [app for app in ray.configs[-1]["applications"] if app["name"] == GATEWAY_APP]
        assert gateway["runtime_env"] == ({"env_vars": given} if given else {})
