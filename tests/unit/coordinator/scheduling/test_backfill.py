"""What may overtake the first job that waits, and what may not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scheduling.model import Demand, Terms, Waiting
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import (
    HOUR,
    NOW,
    World,
    decided,
    gang,
    held,
    job,
    nodes,
    one,
    situation,
    started,
)

HEAD = job("head", 4, age=HOUR)


def test_what_ends_before_the_reserved_start_overtakes():
    running = [held("x", 3.0, ends=600)]
    found = plan(situation([HEAD, job("short", 1, seconds=600)], running))
    assert started(found) == ["short"]
    assert decided(found)["short"].reason == "1 CPUs are free, and no job ahead of it is delayed"
    assert started(plan(situation([HEAD, job("long", 1, seconds=601)], running))) == []
    assert started(plan(situation([HEAD, job("unknown", 1)], running))) == []


def test_what_the_head_will_not_need_may_be_had_for_any_time():
    running = [held("x", 3.0, ends=600)]
    cluster = nodes((4, 0), (1, 0))
    assert started(plan(situation([HEAD, job("unknown", 1)], running, cluster))) == ["unknown"]
    assert started(plan(situation([HEAD, job("a", 1), job("b", 1)], running, cluster))) == ["a"]


def test_the_nodes_count_and_not_the_totals_only():
    """Five CPUs are there, the head needs four on one node: the fifth may go, but only on the other node."""
    running = [held("x", 2.0, ends=600), held("y", 2.0, ends=600)]
    found = plan(situation([job("head", gang(1, 4), age=9), job("late", 2)], running, nodes((4, 0), (2, 0))))
    assert started(found) == []


def test_a_reservation_is_made_for_one_job_and_the_jobs_behind_it_may_pass_one_another():
    running = [held("x", 3.0, ends=600)]
    found = plan(situation([HEAD, job("second", 2, age=9, seconds=60), job("short", 1, seconds=60)], running))
    assert started(found) == ["short"]


def test_unknown_ends_come_after_all_known_ones_and_nobody_counts_on_ending_before_them():
    running = [held("x", 3.0)]
    found = plan(situation([HEAD, job("short", 1, seconds=60)], running))
    assert started(found) == []
    assert decided(found)["head"].estimated_start is None
    apart = plan(situation([HEAD, job("short", 1, seconds=60)], running, nodes((4, 0), (1, 0))))
    assert started(apart) == ["short"]


def test_the_reserved_start_is_the_earliest_that_the_expected_ends_give():
    running = [held("a", 1.0, ends=300), held("b", 1.0, ends=900), held("c", 1.0, ends=600), held("d", 1.0)]
    assert decided(plan(situation([job("two", 2)], running)))["two"].estimated_start == NOW + 600
    assert decided(plan(situation([job("three", 3)], running)))["three"].estimated_start == NOW + 900


def test_what_starts_in_this_round_counts_with_its_expected_end():
    found = plan(situation([job("now", 3, age=9, seconds=120), job("head", 4, age=8)], []))
    assert decided(found)["head"].estimated_start == NOW + 120


def test_what_is_over_its_expected_end_may_end_at_any_moment():
    found = plan(situation([HEAD, job("short", 1, seconds=1)], [held("x", 3.0, ends=-60)]))
    assert started(found) == []
    assert decided(found)["head"].estimated_start == NOW


def test_a_job_that_waits_for_its_own_limit_holds_up_no_other_project():
    terms = [Terms("p", limit=Demand(2))]
    found = plan(situation([job("limited", 2, "p", age=9), job("other", 3, "r")], [held("x", 1.0, "p")], None, terms))
    assert started(found) == ["other"]


def test_a_job_that_waits_for_its_own_limit_is_not_overtaken_in_its_project():
    terms = [Terms("p", limit=Demand(2))]
    queue = [job("limited", 2, "p", age=9), job("small", 1, "p")]
    found = plan(situation(queue, [held("x", 1.0, "p")], None, terms))
    assert started(found) == []
    reason = "its turn in its project: a job ahead of it waits for the project's limit of CPUs"
    assert decided(found)["small"].reason == reason


def test_other_resources_than_the_limited_one_may_be_had():
    terms = [Terms("p", limit=Demand(9, 1))]
    queue = [job("gpu", one(0, 1), "p", age=9), job("cpu", 1, "p")]
    found = plan(situation(queue, [held("x", one(0, 1), "p")], nodes((4, 4)), terms))
    assert started(found) == ["cpu"]


def test_room_kept_for_the_head_is_kept_of_its_project_s_limit_too():
    """Else a small job of its own project would take the limit away that the head needs at its start."""
    terms = [Terms("p", limit=Demand(4))]
    running = [held("x", 3.0, ends=600)]
    found = plan(situation([job("head", 4, "p", age=9), job("small", 1, "p", seconds=60)], running, nodes((4, 0), (1, 0)), terms))
    assert started(found) == []


def test_what_can_never_run_holds_nobody_up():
    queue = [job("huge", 9, age=9), job("wide", gang(2, 3), age=8), job("small", 1)]
    assert started(plan(situation(queue, []))) == ["small"]


def test_what_endpoints_keep_from_ever_running_holds_nobody_up():
    found = plan(situation([job("whole", 4, age=9), job("small", 1)], [held("endpoint", 1.0, lasting=True)]))
    assert started(found) == ["small"]
    assert decided(found)["whole"].reason == "endpoints to give room: needs 4 CPUs, they leave 3 CPUs"


rows = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(1, 40), st.integers(1, 3), st.integers(0, 30)),
    min_size=3,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 10))
def test_overtaking_never_delays_the_first_that_waits(jobs, seed):
    """The same queue with and without those that overtook: the first that had to wait starts no later with them.

    Expected times are true here, and one project has it all, so that the order of the queue does not change.
    """
    world = World(nodes((4, 1), (4, 1), (2, 0)), preemptible=False)
    for number, (cpus, gpus, minutes, workers, age) in enumerate(jobs):
        shape = gang(workers, cpus, min(gpus, 1)) if number % 2 else one(cpus, min(gpus, 1))
        world.submit(job(f"j{number}", shape, age=age * 60.0, seconds=minutes * 60.0), minutes * 60.0)
    found = plan(world.situation())
    waiting = [each.uid for each in found.decisions if not each.start and each.estimated_start is not None]
    if not waiting:
        return
    head = waiting[0]
    promised = decided(found)[head].estimated_start
    alone = replace_queue(world, [each for each in world.queue if each.uid in ahead_of(world, head)])
    for _ in range(400):
        if head in world.begun and head in alone.begun:
            break
        world.round()
        alone.round()
    assert world.begun[head] <= alone.begun[head]
    assert world.begun[head] <= promised + 60


def ahead_of(world: World, uid: str) -> set[str]:
    """The job itself and all that are older."""
    rank = sorted(world.queue, key=lambda each: (each.since, each.uid))
    return {each.uid for each in rank[: [each.uid for each in rank].index(uid) + 1]}


def replace_queue(world: World, queue: list[Waiting]) -> World:
    return replace(world, queue=list(queue), holding=[], begun={}, ended={}, preempted=[], waited=dict(world.waited))
