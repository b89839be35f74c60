"""The report link against a real gRPC server that goes away, loses answers, refuses and wishes."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest

from agents import link as link_module
from agents.failures import RunCancelled, check_wish
from agents.link import Link, LinkConfig, LinkHandler, claim
from common.errors import FailedPrecondition
from luthier.agent.v1 import agent_pb2, agent_pb2_grpc
from luthier.v1 import job_pb2, sweep_pb2
from tests.support.fake_coordinator import TOKEN, FakeCoordinator

SECRET = "s" * 40


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    coordinator = FakeCoordinator()
    coordinator.secret = SECRET
    with coordinator:
        yield coordinator


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(link_module, "LAST_BACKOFF", 0.1)


def _link(fake: FakeCoordinator, source: str = "rank-0", **more: object) -> Link:
    config = LinkConfig(fake.address, fake.job_uid, fake.run, SECRET, interval=0.02)
    return Link(config, source, on_stale=lambda: None, **more)  # type: ignore[arg-type]


def _eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come to pass"
        time.sleep(0.01)


def _checkpoint(step: int) -> job_pb2.Checkpoint:
    return job_pb2.Checkpoint(run=1, step=step, uri=f"file:///c/{step}")


def test_with_two_coordinators_a_run_goes_on_with_the_one_that_lives(fake: FakeCoordinator) -> None:
    other = grpc.server(futures.ThreadPoolExecutor(2))
    agent_pb2_grpc.add_AgentServiceServicer_to_server(fake, other)  # the same records
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    config = LinkConfig(f"ipv4:{fake.address},127.0.0.1:{port}", fake.job_uid, fake.run, SECRET, interval=0.02)
    with Link(config, "rank-0", on_stale=lambda: None) as link:
        link.metrics(1, {"loss": 2.0})
        assert link.flush(5)
        fake.stop()
        link.metrics(2, {"loss": 1.0})
        assert link.flush(10)
    other.stop(0)
    assert [report.sequence for report in fake.reports["rank-0"]] == [1, 2]


def test_reports_are_numbered_from_one_without_gaps_per_source(fake: FakeCoordinator) -> None:
    with _link(fake, "rank-0") as first, _link(fake, "rank-1") as second:
        for step in range(1, 31):
            first.metrics(step, {"loss": 1.0 / step})
            second.checkpoint(_checkpoint(step))
        assert first.flush(5)
        assert second.flush(5)
    for source in ("rank-0", "rank-1"):
        assert [report.sequence for report in fake.reports[source]] == list(range(1, 31))
    assert [point.step for point in fake.of("rank-0", "metrics")] == list(range(1, 31))
    assert all(report.time.seconds for report in fake.reports["rank-0"])


def test_a_lost_answer_repeats_the_same_numbers_and_nothing_is_applied_twice(fake: FakeCoordinator) -> None:
    with _link(fake) as link:
        _eventually(lambda: bool(fake.calls))
        fake.lose_answers = 3
        link.phase("training")
        link.checkpoint(_checkpoint(1))
        assert link.flush(5)
    sent = [call.reports[0].sequence for call in fake.calls if call.reports]
    assert sent.count(1) >= 2, "the batch was not sent again"
    assert [report.WhichOneof("body") for report in fake.reports["rank-0"]] == ["phase", "checkpoint"]


def test_work_goes_on_while_the_coordinator_is_away_and_everything_arrives_when_it_is_back(fake: FakeCoordinator) -> None:
    with _link(fake) as link:
        link.phase("training")
        assert link.flush(5)
        fake.stop()
        began = time.monotonic()
        for step in range(200):
            link.metrics(step, {"loss": 0.5})
            link.log("info", f"step {step}")
        link.checkpoint(_checkpoint(7))
        assert time.monotonic() - began < 1.0, "reporting blocked on the network"
        assert not link.flush(0.3)
        fake.start()
        assert link.flush(10)
    assert [point.step for point in fake.of("rank-0", "metrics")] == list(range(200))
    lines = [line.message for report in fake.of("rank-0", "log") for line in report.lines]
    assert lines == [f"step {step}" for step in range(200)]
    assert fake.of("rank-0", "checkpoint")[0].step == 7


def test_progress_and_trials_keep_the_latest_word_only(fake: FakeCoordinator) -> None:
    fake.stop()
    with _link(fake) as link:
        for step in range(1, 101):
            link.progress(job_pb2.Progress(step=step))
            link.trial(sweep_pb2.Trial(id=f"trial-0000{step % 2}", seconds=step))
        fake.start()
        assert link.flush(10)
    assert [progress.step for progress in fake.of("rank-0", "progress")] == [100]
    assert sorted(trial.seconds for trial in fake.of("rank-0", "trial")) == [99, 100]


def test_of_where_a_rank_stands_the_latest_word_counts(fake: FakeCoordinator) -> None:
    fake.stop()
    with _link(fake) as link:
        for seconds in (5.0, 10.0, 0.0):
            link.standing(agent_pb2.StandingReport(moves=3, seconds=seconds))
        fake.start()
        assert link.flush(5)
    assert [standing.seconds for standing in fake.of("rank-0", "standing")] == [0.0]


def test_progress_of_an_old_phase_does_not_arrive_after_the_new_phase(fake: FakeCoordinator) -> None:
    fake.stop()
    with _link(fake) as link:
        link.progress(job_pb2.Progress(step=5, phase="training"))
        link.phase("saving")
        fake.start()
        assert link.flush(10)
    assert [report.WhichOneof("body") for report in fake.reports["rank-0"]] == ["progress", "phase"]


def test_the_oldest_log_lines_are_dropped_and_counted(fake: FakeCoordinator) -> None:
    fake.stop()
    with _link(fake) as link:
        for number in range(1000):
            link.log("info", f"{number:04d} " + "x" * 5000)
        link.phase("training")
        fake.start()
        assert link.flush(20)
    lines = [line.message for report in fake.of("rank-0", "log") for line in report.lines]
    kept = [line for line in lines if line.endswith("x")]
    dropped = [line for line in lines if "dropped" in line]
    assert kept[-1].startswith("0999")
    assert dropped == [f"{1000 - len(kept)} older log lines were dropped while the coordinator was away"]
    assert all(call.ByteSize() < 2**20 for call in fake.calls)
    assert fake.of("rank-0", "phase"), "what matters was dropped with the logs"


def test_figures_are_thinned_rather_than_kept_without_bound(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.spool.MAX_METRICS", 100)
    fake.stop()
    with _link(fake) as link:
        for step in range(1000):
            link.metrics(step, {"loss": 1.0})
        fake.start()
        assert link.flush(10)
    steps = [point.step for point in fake.of("rank-0", "metrics")]
    assert len(steps) <= 101
    assert steps == sorted(steps)
    assert steps[-1] == 999


def test_a_stale_run_stops_the_link_and_calls_on_stale(fake: FakeCoordinator) -> None:
    called = threading.Event()
    config = LinkConfig(fake.address, fake.job_uid, fake.run, SECRET, interval=0.02)
    with Link(config, "rank-0", on_stale=called.set) as link:
        fake.stale = True
        assert called.wait(5)
        calls = len(fake.calls)
        link.metrics(1, {"loss": 1.0})
        assert not link.flush(0.2) or not fake.reports["rank-0"]
        with pytest.raises(FailedPrecondition):
            link.outcome(agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED))
        assert len(fake.calls) == calls


def test_a_wish_is_heard_by_heartbeat_with_its_reason(fake: FakeCoordinator) -> None:
    with _link(fake, heartbeat=0.02) as link:
        check_wish(link)
        fake.wish, fake.wish_reason = agent_pb2.WISH_CANCEL, job_pb2.END_REASON_TIME_LIMIT
        assert link.wished.wait(5)
        assert link.wish_reason == job_pb2.END_REASON_TIME_LIMIT
        with pytest.raises(RunCancelled) as caught:
            check_wish(link)
        assert caught.value.reason == job_pb2.END_REASON_TIME_LIMIT


def test_the_outcome_waits_until_the_coordinator_is_back_and_nothing_follows_it(fake: FakeCoordinator) -> None:
    with _link(fake, "driver", heartbeat=0.02) as link:
        link.log("info", "before")
        fake.stop()
        thread = threading.Thread(target=link.outcome, args=(agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED),))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        link.log("info", "after")
        fake.start()
        thread.join(10)
        assert not thread.is_alive()
        link.log("info", "much after")
        calls = len(fake.calls)
        time.sleep(0.2)
        assert len(fake.calls) == calls, "the link still calls after the end"
    assert fake.outcome is not None
    assert fake.reports["driver"][-1].HasField("outcome")
    assert [line.message for report in fake.of("driver", "log") for line in report.lines] == ["before"]
    assert not link.stale.is_set()


def test_one_bad_report_does_not_hold_up_the_others(fake: FakeCoordinator) -> None:
    fake.stop()
    fake.refuse_message = "poison"
    with _link(fake) as link:
        link.phase("good-1")
        link.phase("poison")
        link.phase("good-2")
        fake.start()
        assert link.flush(10)
    assert [phase.phase for phase in fake.of("rank-0", "phase")] == ["good-1", "good-2"]
    assert [report.sequence for report in fake.reports["rank-0"]] == [1, 2]


def test_a_process_that_takes_over_a_source_goes_on_with_its_numbers(fake: FakeCoordinator) -> None:
    with _link(fake) as link:
        link.phase("one")
        link.phase("two")
        assert link.flush(5)
    with _link(fake) as link:
        link.phase("three")
        assert link.flush(5)
    assert [phase.phase for phase in fake.of("rank-0", "phase")] == ["one", "two", "three"]


def test_claim_survives_a_lost_answer_and_is_refused_with_a_wrong_token(fake: FakeCoordinator) -> None:
    fake.secret, fake.lose_answers = "", 1
    link, response = claim(fake.address, fake.job_uid, fake.run, TOKEN)
    with link:
        assert response.report_interval == link.config.interval
        assert len(link.config.session_secret) >= 32
        assert link.source == "driver"
        with pytest.raises(FailedPrecondition, match="claimed already"):
            claim(fake.address, fake.job_uid, fake.run, TOKEN)
        with pytest.raises(FailedPrecondition, match="does not claim"):
            claim(fake.address, fake.job_uid, fake.run, "wrong")


def test_the_config_pickles_and_does_not_print_its_secret(fake: FakeCoordinator) -> None:
    config = LinkConfig("h:1", "job", 3, SECRET)
    assert pickle.loads(pickle.dumps(config)) == config
    assert SECRET not in repr(config)


def test_python_logging_reaches_the_coordinator(fake: FakeCoordinator) -> None:
    logger = logging.getLogger("agents.test")
    with _link(fake) as link:
        handler = LinkHandler(link)
        logger.addHandler(handler)
        noisy = logging.getLogger("library")
        noisy.addHandler(handler)
        try:
            noisy.setLevel(logging.DEBUG)
            noisy.info("how the library does")
            logger.warning("loss is %s", 3)
            logger.debug("not this")
        finally:
            logger.removeHandler(handler)
            noisy.removeHandler(handler)
        assert link.flush(5)
    lines = [line for report in fake.of("rank-0", "log") for line in report.lines]
    assert [(line.level, line.message, line.source) for line in lines] == [("warning", "loss is 3", "rank-0")]
