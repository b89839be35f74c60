"""Each time of a schedule makes one job at most, whatever happens meanwhile; what came of it is written down."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlmodel import Session, col, select

from common.errors import Unavailable
from coordinator import secret_store
from coordinator.jobs.reconcile import Reconciler
from coordinator.notify import Notifier
from coordinator.schedules import fire
from coordinator.schedules.runner import ScheduleRunner
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.vault import Vault
from luthier.v1 import schedule_pb2
from tests.support.deleting import ended

START = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


class Clock:
    """What the test says the time is."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runner(store: Store, leadership: Leadership, loop: Reconciler, clock: Clock, vault: Vault) -> ScheduleRunner:
    return ScheduleRunner(store, Notifier(), leadership, loop, vault, clock)


def add(store: Store, name: str = "nightly", **values: object) -> None:
    row: dict[str, object] = {
        **{"project_id": "default", "id": name, "uid": f"uid-{name}", "cron": "@hourly", "time_zone": "UTC"},
        **{"overlap": schedule_pb2.OVERLAP_SKIP, "catch_up_seconds": 3600.0, "next_time": START + timedelta(hours=1)},
        **{"create_time": START, "update_time": START},
        "job": {"import_model": {"source": "builtin:tiny", "output_model": "m"}},
    }
    store.write_now(lambda session: session.add(tables.Schedule(**row | values)))


def jobs(store: Store) -> list[tables.Job]:
    query = select(tables.Job).order_by(col(tables.Job.create_time))
    return list(store.read_now(lambda session: session.exec(query).all()))


def schedule(store: Store, name: str = "nightly") -> tables.Schedule:
    return store.read_now(lambda session: session.get_one(tables.Schedule, ("default", name)))


def outcomes(store: Store, name: str = "nightly") -> list[tuple[str, str]]:
    """Times and what came of them, latest first."""
    return [(each["time"], each.get("error", "") or "made") for each in schedule(store, name).firings]


async def test_a_job_is_made_at_its_time_and_not_before(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store)
    clock.time = START + timedelta(minutes=59, seconds=59)
    await runner.round()
    assert jobs(store) == []
    clock.time = START + timedelta(hours=1)
    for _ in range(3):
        await runner.round()
    (job,) = jobs(store)
    assert (job.schedule, job.creator, job.kind, job.state) == ("nightly", "schedule nightly", "import_model", "QUEUED")
    assert schedule(store).next_time == START + timedelta(hours=2)
    assert outcomes(store) == [("2026-11-26T13:00:00Z", "made")]


async def test_while_the_last_job_has_not_ended_a_time_is_skipped(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store)
    for hour in (1, 2):
        clock.time = START + timedelta(hours=hour)
        await runner.round()
    (first,) = jobs(store)
    assert outcomes(store)[0] == ("2026-11-26T14:00:00Z", f"{first.job_id} of the time before has not ended")
    ended(store, first)
    clock.time = START + timedelta(hours=3)
    await runner.round()
    assert len(jobs(store)) == 2


async def test_it_may_be_replaced_or_left_to_run_beside(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store, "replace", overlap=schedule_pb2.OVERLAP_REPLACE)
    add(store, "allow", overlap=schedule_pb2.OVERLAP_ALLOW)
    for hour in (1, 2):
        clock.time = START + timedelta(hours=hour)
        await runner.round()
    states = {name: [job.state for job in jobs(store) if job.schedule == name] for name in ("replace", "allow")}
    assert states == {"replace": ["CANCELLED", "QUEUED"], "allow": ["QUEUED", "QUEUED"]}


async def test_of_times_missed_while_it_was_away_the_last_is_made_up_for(
    store: Store, runner: ScheduleRunner, clock: Clock
) -> None:
    add(store)
    clock.time = START + timedelta(hours=9, minutes=20)
    await runner.round()
    await runner.round()
    assert len(jobs(store)) == 1
    assert outcomes(store) == [("2026-11-26T21:00:00Z", "made")]
    assert schedule(store).next_time == START + timedelta(hours=10)


async def test_what_is_too_late_is_not_made_up_for(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store, catch_up_seconds=600.0)
    clock.time = START + timedelta(hours=9, minutes=20)
    await runner.round()
    assert jobs(store) == []
    assert outcomes(store)[0][1].startswith("missed: the coordinator was away")
    assert schedule(store).next_time == START + timedelta(hours=10)


async def test_a_clock_that_is_set_back_brings_no_time_twice(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store, overlap=schedule_pb2.OVERLAP_ALLOW)
    clock.time = START + timedelta(hours=1)
    await runner.round()
    for minutes in (0, 30, 60, 61):
        clock.time = START + timedelta(minutes=minutes)
        await runner.round()
    assert len(jobs(store)) == 1


async def test_what_cannot_be_created_is_said_and_not_tried_every_second(
    store: Store, runner: ScheduleRunner, clock: Clock
) -> None:
    add(store, job={"finetune": {"base": "builtin:tiny", "dataset": "gone", "method": "full"}})
    add(store, "good")
    clock.time = START + timedelta(hours=1)
    for _ in range(3):
        await runner.round()
    (why,) = [what for _, what in outcomes(store)]
    assert why.startswith("NOT_FOUND: job.finetune.dataset: there is no data set 'gone'")
    assert schedule(store).next_time == START + timedelta(hours=2)
    assert [job.schedule for job in jobs(store)] == ["good"]


async def test_a_paused_or_deleted_one_makes_nothing(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    add(store, "paused", paused=True, next_time=None)
    add(store, "deleted")
    store.write_now(lambda session: session.delete(session.get_one(tables.Schedule, ("default", "deleted"))))
    clock.time = START + timedelta(hours=5)
    await runner.round()
    assert jobs(store) == []


async def test_one_that_was_changed_between_look_and_write_is_left_to_the_next_look(
    store: Store, runner: ScheduleRunner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    clock.time = START + timedelta(hours=1)
    looked = store.read_now(lambda session: fire.due(session, clock.time))

    def pause(session: Session) -> None:
        row = session.get_one(tables.Schedule, ("default", "nightly"))
        row.paused, row.next_time, row.version = True, None, row.version + 1
        session.add(row)

    store.write_now(pause)
    monkeypatch.setattr(fire, "due", lambda session, now: looked)
    await runner.round()
    assert jobs(store) == []
    assert outcomes(store) == []


async def test_two_that_lead_one_after_the_other_make_one_job(
    store: Store, runner: ScheduleRunner, leadership: Leadership, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, overlap=schedule_pb2.OVERLAP_ALLOW)
    clock.time = START + timedelta(hours=1)
    looked = store.read_now(lambda session: fire.due(session, clock.time))
    await runner.round()
    # The other one read before the first one wrote.
    monkeypatch.setattr(fire, "due", lambda session, now: looked)
    await runner.round()
    assert len(jobs(store)) == 1


async def test_while_the_store_is_away_nothing_is_decided(
    store: Store, runner: ScheduleRunner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    clock.time = START + timedelta(hours=1)

    async def away(*_: object, **__: object) -> None:
        raise Unavailable("the hub does not answer", "HUB_UNAVAILABLE")

    with monkeypatch.context() as patched:
        patched.setattr(fire, "draft", away)
        with pytest.raises(Unavailable):
            await runner.round()
    assert outcomes(store) == []
    await runner.round()
    assert len(jobs(store)) == 1


async def test_its_jobs_have_the_secrets_that_are_named(store: Store, runner: ScheduleRunner, clock: Clock) -> None:
    job = {"import_model": {"source": "builtin:tiny", "output_model": "m"}, "secrets": {"WANDB_API_KEY": "wandb"}}
    add(store, job=job)
    clock.time = START + timedelta(hours=1)
    await runner.round()
    assert outcomes(store)[0][1].startswith("NOT_FOUND: job.secrets.WANDB_API_KEY: there is no secret 'wandb'")
    vault = runner._vault
    sealed = vault.seal("default", "wandb", "s3cret")
    store.write_now(lambda session: secret_store.set_secret(session, vault, "default", "wandb", sealed))
    clock.time = START + timedelta(hours=2)
    await runner.round()
    assert [each.secrets for each in jobs(store)] == [{"WANDB_API_KEY": "wandb"}]
