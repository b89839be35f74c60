"""What is remembered of the queue is what a fresh look would find."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlmodel import Session, select

from coordinator.jobs import change, records, situation, wishes
from coordinator.jobs.states import EndReason, State
from coordinator.scheduling.model import Situation
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.tables import now
from luthier.v1 import job_pb2

NewJob = Callable[..., tables.Job]
Work = Callable[[Session, str], object]


def raise_priority(session: Session, uid: str) -> bool:
    request = job_pb2.UpdateJobRequest(job=job_pb2.Job(priority=50))
    request.update_mask.paths.append("priority")
    return change.Change.of(request).apply(session, uid)


CHANGES: dict[str, Work] = {
    "starts": lambda session, uid: records.move(session, uid, State.STARTING, "starts", next_run=1),
    "cancelled": lambda session, uid: wishes.wish_end(session, uid, EndReason.USER),
    "on hold": lambda session, uid: wishes.wish_pause(session, uid, EndReason.USER, "paused"),
    "told": lambda session, uid: records.tell_reasons(session, {uid: "4 GPUs"}),
    "more urgent": raise_priority,
}


def look(store: Store, memory: situation.Records, moment: object) -> Situation:
    return store.read_now(lambda session: memory.read(session, [], moment))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(store: Store, new_job: NewJob, what: str) -> None:
    memory, moment = situation.Records(), now()
    changed, other = new_job(), new_job()
    look(store, memory, moment)
    before = look(store, memory, moment)
    assert {waiting.uid for waiting in before.queue} == {changed.uid, other.uid}

    store.write_now(lambda session: CHANGES[what](session, changed.uid))

    fresh = situation.Records()
    expected, found = look(store, fresh, moment), look(store, memory, moment)
    assert sorted(found.queue, key=lambda each: each.uid) == sorted(expected.queue, key=lambda each: each.uid)
    assert memory.told == fresh.told
    assert found.queue != before.queue or what == "told"


def test_a_new_job_is_seen_beside_many(store: Store, new_job: NewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(situation, "FEW", 3)
    memory, moment = situation.Records(), now()
    uids = {new_job().uid for _ in range(8)}
    assert {waiting.uid for waiting in look(store, memory, moment).queue} == uids
    uids.add(new_job().uid)
    assert {waiting.uid for waiting in look(store, memory, moment).queue} == uids


def test_reasons_are_told_to_whom_they_are_news_and_in_order(store: Store, new_job: NewJob) -> None:
    first, second, third = new_job(), new_job(), new_job()
    store.write_now(lambda session: records.move(session, third.uid, State.STARTING, "starts", next_run=1))
    reasons = {first.uid: "4 GPUs", second.uid: "its turn", third.uid: "its turn"}
    told = store.write_now(lambda session: records.tell_reasons(session, reasons))
    assert sorted(told) == sorted([first.uid, second.uid])
    assert store.write_now(lambda session: records.tell_reasons(session, reasons)) == []

    events = store.read_now(lambda session: list(session.exec(select(tables.JobEvent)).all()))
    waiting = [event for event in events if event.type == job_pb2.JOB_EVENT_TYPE_WAITING]
    assert {event.job_uid: event.message for event in waiting} == {
        first.uid: "waits for 4 GPUs",
        second.uid: "waits for its turn",
    }
    assert sorted(event.project_sequence for event in events) == list(range(1, len(events) + 1))
    for uid in (first.uid, second.uid, third.uid):
        numbers = sorted(event.sequence for event in events if event.job_uid == uid)
        assert numbers == list(range(1, len(numbers) + 1))
        assert store.read_now(lambda session, uid=uid: session.get_one(tables.Job, uid)).sequence == numbers[-1]  # type: ignore[misc]
