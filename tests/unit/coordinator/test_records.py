"""Events are numbered without gaps, moves follow the table, requests make one job, runs are claimed once, reports count once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlmodel import Session, SQLModel, col, select

from common.errors import AlreadyExists, FailedPrecondition, PermissionDenied
from coordinator.jobs import records, report
from coordinator.jobs.resolve import registered
from coordinator.jobs.states import ACTIVE, MOVES, SOURCES, TERMINAL, EndReason, State
from coordinator.jobs.tokens import claim_token
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

NewJob = Callable[..., tables.Job]
SECRET = "s" * 40


def events(store: Store, uid: str) -> list[tables.JobEvent]:
    query = select(tables.JobEvent).where(tables.JobEvent.job_uid == uid).order_by(col(tables.JobEvent.sequence))
    return list(store.read_now(lambda session: session.exec(query).all()))


def job_of(store: Store, uid: str) -> tables.Job:
    return store.read_now(lambda session: session.get_one(tables.Job, uid))


def start(store: Store, job: tables.Job) -> str:
    """Bring a job to RUNNING by a claim; return the stack's secret."""

    def work(session: Session) -> str:
        assert records.move(session, job.uid, State.STARTING, "go", next_run=1)
        session.add(tables.JobRun(job_uid=job.uid, run=1, submission_id=f"s-{job.uid}", create_time=tables.now()))
        return session.get_one(tables.StackFact, "secret").value

    secret = store.write_now(work)
    store.write_now(lambda session: report.claim(session, secret, claim_request(secret, job)))
    return secret


def claim_request(secret: str, job: tables.Job, session_secret: str = SECRET) -> agent_pb2.ClaimRunRequest:
    token = claim_token(secret, job.uid, 1)
    return agent_pb2.ClaimRunRequest(job_uid=job.uid, run=1, claim_token=token, session_secret=session_secret)


def send(
    store: Store, job: tables.Job, *reports: agent_pb2.Report, source: str = "driver", run: int = 1
) -> tuple[tables.Job, int]:
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=run, source=source, session_secret=SECRET, reports=reports)
    return store.write_now(lambda session: report.apply(session, request))


def phase(sequence: int, word: str) -> agent_pb2.Report:
    return agent_pb2.Report(sequence=sequence, phase=agent_pb2.PhaseReport(phase=word))


def outcome(sequence: int, state: str = "SUCCEEDED", **fields: object) -> agent_pb2.Report:
    value = job_pb2.JobState.Value(f"JOB_STATE_{state}")
    reason = job_pb2.END_REASON_COMPLETED if state == "SUCCEEDED" else job_pb2.END_REASON_ERROR
    return agent_pb2.Report(sequence=sequence, outcome=agent_pb2.OutcomeReport(state=value, end_reason=reason, **fields))  # type: ignore[arg-type]


def test_the_migrated_schema_is_that_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []


def test_the_reverse_of_the_table_is_derived_from_it() -> None:
    assert {(source, to) for to, sources in SOURCES.items() for source in sources} == {
        (source, to) for source, targets in MOVES.items() for to in targets
    }
    assert {state.value for state in TERMINAL} == {"SUCCEEDED", "FAILED", "CANCELLED"}
    assert all(MOVES[state] >= {State.FAILED, State.CANCELLED} for state in ACTIVE)


@pytest.mark.parametrize("to", list(State))
def test_a_job_moves_only_as_the_table_allows(store: Store, new_job: NewJob, to: State) -> None:
    job = new_job()
    moved = store.write_now(lambda session: records.move(session, job.uid, to, "?"))
    assert moved == (to in MOVES[State.QUEUED])
    assert len(events(store, job.uid)) == (2 if moved else 1)


def test_events_of_many_threads_are_numbered_without_gaps(store: Store, new_job: NewJob) -> None:
    job = new_job()

    def add() -> None:
        for _ in range(10):
            store.write_now(lambda session: records.add_event(session, job.uid, job_pb2.JOB_EVENT_TYPE_WARNING, "x"))

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.sequence for event in events(store, job.uid)] == list(range(1, 82))


def test_a_request_made_again_makes_no_second_job(store: Store, new_job: NewJob) -> None:
    assert new_job(request_id="r1").uid == new_job(request_id="r1").uid
    with pytest.raises(AlreadyExists, match=r"differs in job\.finetune\.workers"):
        new_job(request_id="r1", workers=2)


def test_a_run_is_claimed_by_one_process_only(store: Store, new_job: NewJob) -> None:
    job = new_job()
    secret = start(store, job)
    again = store.write_now(lambda session: report.claim(session, secret, claim_request(secret, job)))
    assert again.state == State.RUNNING
    with pytest.raises(PermissionDenied, match="claimed already"):
        store.write_now(lambda session: report.claim(session, secret, claim_request(secret, job, "t" * 40)))
    forged = claim_request("another secret", job)
    with pytest.raises(PermissionDenied, match="does not claim"):
        store.write_now(lambda session: report.claim(session, secret, forged))


def test_a_repeated_report_counts_once_and_a_missing_one_is_asked_for(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    before = len(events(store, job.uid))
    send(store, job, phase(1, "loading"), phase(2, "training"))
    _, last = send(store, job, phase(2, "training"), phase(3, "saving"))
    assert last == 3
    assert [event.message for event in events(store, job.uid)[before:]] == ["loading", "training", "saving"]
    with pytest.raises(FailedPrecondition, match="report 4 of driver is missing"):
        send(store, job, phase(5, "x"))


def test_sources_are_numbered_apart(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    send(store, job, phase(1, "a"))
    _, last = send(store, job, phase(1, "b"), source="rank-0")
    assert last == 1


def test_a_stale_run_and_a_wrong_secret_are_refused(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    with pytest.raises(PermissionDenied):
        send(store, job, phase(1, "x"), run=2)
    store.write_now(lambda session: records.move(session, job.uid, State.QUEUED, "again"))
    store.write_now(lambda session: records.move(session, job.uid, State.STARTING, "again", next_run=2))
    with pytest.raises(FailedPrecondition, match="run 1 no longer counts"):
        send(store, job, phase(1, "x"))


def test_success_registers_the_model_in_the_same_breath(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    made = agent_pb2.ProducedModel(uri="file:///m", content_hash="c" * 64, model_kind="full", metrics={"eval_loss": 0.5})
    row, _ = send(store, job, outcome(1, model=made))
    assert (row.state, row.end_reason, row.result["model_version"]) == ("SUCCEEDED", "COMPLETED", "m@1")
    version = store.read_now(lambda session: session.get_one(tables.ModelVersion, ("default", "m", 1)))
    assert version.job_uid == job.uid
    assert version.document["metrics"] == {"eval_loss": 0.5}
    # The answer was lost and the agent says it again: nothing happens twice.
    row, last = send(store, job, outcome(1, model=made))
    assert last == 1
    assert store.read_now(lambda session: session.get_one(tables.Model, ("default", "m"))).latest == 1
    terminal = [event for event in events(store, job.uid) if State(event.state) in TERMINAL]
    assert len(terminal) == 1


@pytest.mark.parametrize("kind", ["full", "adapter", "reward"])
def test_a_model_is_registered_as_what_it_is(store: Store, new_job: NewJob, kind: str) -> None:
    job = new_job()
    start(store, job)
    send(store, job, outcome(1, model=agent_pb2.ProducedModel(uri="file:///m", content_hash="c" * 64, model_kind=kind)))
    version = store.read_now(lambda session: session.get_one(tables.ModelVersion, ("default", "m", 1)))
    assert registered(version).model_kind == kind


def test_the_failure_that_came_first_is_the_root_cause(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    for rank, second, message in ((0, 20, "connection closed by peer"), (1, 10, "the real one")):
        failure = agent_pb2.Report(
            sequence=1, failure=job_pb2.JobError(code="TRAINING_ERROR", message=message, source=f"rank-{rank}")
        )
        failure.time.seconds = 1_700_000_000 + second
        send(store, job, failure, source=f"rank-{rank}")
    row, _ = send(store, job, outcome(1, "FAILED", error=job_pb2.JobError(code="TRAINING_ERROR", message="a worker died")))
    assert (row.error["message"], row.error["source"], row.end_reason) == ("the real one", "rank-1", EndReason.ERROR)


def test_a_driver_that_names_the_process_knows_better_than_its_peers(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    complaint = agent_pb2.Report(sequence=1, failure=job_pb2.JobError(message="connection closed by peer", source="rank-0"))
    send(store, job, complaint, source="rank-0")
    error = job_pb2.JobError(code="WORKER_LOST", message="the process of rank-1 was killed", source="rank-1")
    row, _ = send(store, job, outcome(1, "FAILED", error=error))
    assert row.error["source"] == "rank-1"


def test_progress_is_overwritten_and_metrics_are_kept(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    for number in (1, 2):
        progress = agent_pb2.Report(sequence=2 * number - 1, progress=job_pb2.Progress(step=number, loss=1 / number))
        point = agent_pb2.Report(sequence=2 * number, metrics=job_pb2.MetricPoint(step=number, values={"loss": 1 / number}))
        send(store, job, progress, point)
    assert job_of(store, job.uid).progress == {"step": "2", "loss": 0.5}
    rows = store.read_now(lambda session: session.exec(select(tables.Metric).order_by(col(tables.Metric.id))).all())
    assert [(row.step, row.figures["loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]


def test_the_ranks_of_a_trial_do_not_speak_for_the_sweep(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job)
    before = len(events(store, job.uid))
    send(store, job, phase(1, "training"), source="trial-00001/rank-0")
    assert len(events(store, job.uid)) == before
