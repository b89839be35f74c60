"""Driver and workers on nodes: all or nothing, each whole on one node."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduling.model import Demand, Shape, Spot, Terms
from coordinator.scheduling.needs import Need
from coordinator.scheduling.packing import Room, Tally
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import check, decided, gang, held, job, nodes, one, situation, started


def test_a_gang_starts_whole_or_not_at_all():
    assert started(plan(situation([job("gang", gang(3))], [held("x", 2.0)]))) == []
    assert started(plan(situation([job("gang", gang(3))], [held("x", 1.0)]))) == ["gang"]


def test_a_worker_lies_on_one_node():
    found = plan(situation([job("wide", one(3))], [], nodes((2, 0), (2, 0))))
    assert started(found) == []
    found = plan(situation([job("gang", gang(2, cpus=2))], [], nodes((2, 0), (2, 0))))
    assert decided(found)["gang"].workers == 2


def test_the_driver_needs_room_too():
    shape = gang(4, driver=0.5)
    assert started(plan(situation([job("gang", shape)], [], nodes((4, 0))))) == []
    assert started(plan(situation([job("gang", shape)], [], nodes((4, 0), (1, 0))))) == ["gang"]


def test_the_driver_moves_where_it_costs_no_worker():
    """The tightest place for the driver is the node that a worker needs whole."""
    shape = Shape(Demand(1), Demand(2), 2, 2)
    found = plan(situation([job("gang", shape)], [], nodes((2, 0), (3, 0))))
    assert started(found) == ["gang"]


def test_an_elastic_gang_takes_what_there_is_room_for():
    cluster = nodes((3, 0), (2, 0))
    shape = gang(8, driver=1, least=2)
    assert decided(plan(situation([job("e", shape)], [], cluster)))["e"].workers == 4
    assert decided(plan(situation([job("e", shape)], [held("x", 2.0)], cluster)))["e"].workers == 2
    assert started(plan(situation([job("e", shape)], [held("x", 2.0), held("y", 1.0)], cluster))) == []


def test_an_elastic_gang_keeps_to_its_project_s_limit():
    terms = [Terms("p", limit=Demand(3))]
    assert decided(plan(situation([job("e", gang(8, driver=1, least=1))], [], nodes((8, 0)), terms)))["e"].workers == 2


def test_an_elastic_gang_borrows_beyond_its_quota_only_while_nobody_waits():
    terms = [Terms("p", quota=Demand(2))]
    elastic = job("e", gang(8, least=1))
    assert decided(plan(situation([elastic], [], nodes((8, 0)), terms)))["e"].workers == 8
    found = plan(situation([elastic, job("large", one(7), "r")], [], nodes((8, 0)), terms))
    assert decided(found)["e"].workers == 2
    assert started(found) == ["e"]


def test_gpu_nodes_are_left_to_those_who_need_them():
    found = plan(situation([job("cpus", 2), job("gpu", gang(1, 4, 1))], [], nodes((4, 1), (4, 0))))
    assert sorted(started(found)) == ["cpus", "gpu"]


def test_small_jobs_fill_the_nodes_in_use_first():
    """Three single GPUs on one node leave the other whole for eight."""
    queue = [job(f"s{number}", gang(1, 1, 1), age=9) for number in range(3)] + [job("large", gang(8, 1, 1))]
    found = plan(situation(queue, [], nodes((16, 8), (16, 8))))
    assert len(started(found)) == 4
    assert [spot.workers for spot in decided(found)["large"].spots if spot.workers] == [8]


def test_holdings_lie_where_the_cluster_says():
    known = held("x", gang(2, cpus=1))
    spread = type(known)(
        **{**{name: getattr(known, name) for name in known.__slots__}, "spots": (Spot("n0", 1, True), Spot("n1", 1))}
    )
    cluster = nodes((2, 0), (2, 0))
    assert started(plan(situation([job("two", 2)], [known], cluster))) == ["two"]
    assert started(plan(situation([job("two", 2)], [spread], cluster))) == []


def test_what_lay_on_a_node_that_is_gone_holds_nothing():
    known = held("x", gang(2, cpus=1))
    moved = type(known)(
        **{**{name: getattr(known, name) for name in known.__slots__}, "spots": (Spot("n0", 1, True), Spot("gone", 1))}
    )
    assert started(plan(situation([job("one", 1)], [moved], nodes((2, 0))))) == ["one"]


def test_holdings_that_no_tight_packing_explains_still_count_in_full():
    """Three workers of two CPUs do run, on nodes of three: whatever the cluster did, one CPU on each of them is what is free."""
    found = plan(
        situation([job("a", 1), job("b", 1)], [held("x", 3.0), held("y", gang(2, cpus=2))], nodes((3, 0), (4, 0), (1, 0)))
    )
    assert len(started(found)) == 1
    over = plan(situation([job("a", 1)], [held("x", 9.0)], nodes((3, 0))))
    assert started(over) == []


def test_fractions_of_cpus_add_up():
    queue = [job(f"j{number}", 0.1) for number in range(30)]
    assert len(started(plan(situation(queue, [], nodes((2.0, 0)))))) == 20


sizes = st.tuples(st.integers(0, 6), st.integers(0, 3))


@given(st.lists(sizes, min_size=1, max_size=5), sizes, sizes, st.integers(0, 7), st.integers(0, 7))
def test_room_for_a_gang_is_found_exactly_when_there_is_some(rows, driver, worker, one_count, other_count):
    least, most = sorted((one_count, other_count))
    need = Need.of(Shape(Demand(*driver), Demand(*worker), most, least))
    cpus, gpus = [row[0] * 10_000 for row in rows], [row[1] * 10_000 for row in rows]
    need.widest = max(need.fit(*node) for node in zip(cpus, gpus, strict=True))

    def workers_with_driver_on(node):
        free = [list(row) for row in rows]
        free[node] = [free[node][0] - driver[0], free[node][1] - driver[1]]
        if min(free[node]) < 0:
            return -1
        count = 0
        for row in free:
            while count < most and row[0] >= worker[0] and row[1] >= worker[1]:
                row[0], row[1] = row[0] - worker[0], row[1] - worker[1]
                count += 1
        return count

    best = max(workers_with_driver_on(node) for node in range(len(rows)))
    room = Room(cpus, gpus)
    place = room.place(need, least, most)
    assert (place is not None) == (best >= least)
    assert min(Tally(need, cpus, gpus).room, most) == best
    if place is None:
        assert (room.cpus, room.gpus) == (cpus, gpus)
    else:
        assert least <= sum(row[1] for row in place) <= most
        assert min(room.cpus) >= 0
        assert min(room.gpus) >= 0


def test_the_checker_sees_an_over_committed_node():
    """The tests of the invariants rest on this checker."""
    asked_for = situation([job("a", 3)], [], nodes((4, 0)))
    found = plan(asked_for)
    check(asked_for, found)
    smaller = situation([job("a", 3)], [], nodes((2, 0)))
    try:
        check(smaller, found)
    except AssertionError:
        return
    raise AssertionError("three CPUs on a node with two went unnoticed")
