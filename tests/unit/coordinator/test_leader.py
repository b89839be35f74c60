"""Who leads, when two coordinators share a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from sqlmodel import Session

from coordinator.cluster.launcher import Launcher
from coordinator.jobs.reconcile import Reconciler
from coordinator.notify import Notifier
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import SILENCE_SECONDS, Leadership, NotLeading
from coordinator.store.tables import Job
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import now_of, secret_of

NewJob = Callable[..., Job]


@pytest.fixture
def other(store: Store, store_url: str, leadership: Leadership) -> Iterator[Leadership]:
    """Another coordinator on the same store, come later. Its clock is `clock[0]`."""
    second = Store(store_url)
    other = Leadership(second, "127.0.0.1:7421", lambda: clock[0])
    clock[0] = 0.0
    yield other
    other.stop()
    second.close()


clock = [0.0]


def leads_in_the_end(other: Leadership) -> bool:
    """Whether it leads within seconds: a server lets go of a lock only when it has noticed that its holder is gone."""
    deadline = time.monotonic() + 10
    while not other.epoch and time.monotonic() < deadline:
        other.look()
    return bool(other.epoch)


def rename(session: Session) -> None:
    session.get_one(tables.Project, "default").display_name = "renamed"


def name_of(store: Store) -> str:
    return store.read_now(lambda session: session.get_one(tables.Project, "default").display_name)


async def test_one_leads_and_only_its_changes_are_made(store: Store, leadership: Leadership, other: Leadership) -> None:
    for _ in range(3):
        leadership.look()
        other.look()
    assert (leadership.epoch, other.epoch) == (1, 0)
    assert await other.present() == (1, "127.0.0.1:7420")
    with pytest.raises(NotLeading):
        await other.write(rename, other.epoch)
    assert name_of(store) == ""
    await leadership.write(rename, leadership.epoch)
    assert name_of(store) == "renamed"


async def test_a_follower_takes_over_and_its_predecessor_changes_nothing_more(
    store: Store, leadership: Leadership, other: Leadership
) -> None:
    other.look()
    leadership._lock.release()  # as the kernel, or the server, does for a process that was killed
    assert leads_in_the_end(other)
    assert (other.epoch, await other.present()) == (2, (2, "127.0.0.1:7421"))
    # The predecessor does not know yet.
    assert leadership.epoch == 1
    with pytest.raises(NotLeading):
        await leadership.write(rename, leadership.epoch)
    with pytest.raises(NotLeading):
        await leadership.confirm(leadership.epoch)
    assert name_of(store) == ""
    leadership.look()
    assert leadership.epoch == 0


@pytest.mark.postgres
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_leader_that_hangs_is_ousted_and_one_that_is_busy_is_not(leadership: Leadership, other: Leadership) -> None:
    while clock[0] < 3 * SILENCE_SECONDS:
        leadership.look()
        other.look()
        clock[0] += SILENCE_SECONDS / 2
    assert (leadership.epoch, other.epoch) == (1, 0)
    # From now on it says nothing.
    other.look()
    clock[0] += SILENCE_SECONDS + 1
    assert leads_in_the_end(other)
    assert other.epoch == 2
    leadership.look()
    assert leadership.epoch == 0
    leadership.look()
    assert leadership.epoch == 0


async def test_a_follower_says_what_waits_for_what_and_starts_nothing(
    store: Store, ray: FakeRay, other: Leadership, new_job: NewJob
) -> None:
    job = new_job()
    follower = Reconciler(store, Launcher(ray, "a", "python", secret_of(store)), Notifier(), other)  # type: ignore[arg-type]
    await follower.round()
    assert job.uid in follower.queue.decisions
    assert (now_of(store, job).state, ray.jobs) == ("QUEUED", {})


async def test_who_takes_over_in_the_middle_of_a_round_ends_it(
    loop: Reconciler, store: Store, ray: FakeRay, leadership: Leadership, other: Leadership, new_job: NewJob
) -> None:
    job = new_job()
    plan = loop._plan

    async def slow_plan():  # type: ignore[no-untyped-def]
        planned = await plan()
        leadership._lock.release()
        assert leads_in_the_end(other)
        return planned

    loop._plan = slow_plan  # type: ignore[method-assign]
    with pytest.raises(NotLeading):
        await loop.round()
    assert (now_of(store, job).state, ray.jobs) == ("QUEUED", {})
