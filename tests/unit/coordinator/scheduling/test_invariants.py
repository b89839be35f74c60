"""What holds of every plan, whatever the situation. `check` (situations.py) looks at each with arithmetic of its own."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scheduling.model import Decision, Demand, Holding, Node, Shape, Situation, Terms, Waiting
from coordinator.scheduling.order import AGEING_SECONDS
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import NOW, World, asked, check, decided, gang, job, nodes, shuffled, started

INFINITE = float("inf")
projects = st.sampled_from("abcd")
amounts = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 4.0])
gpus = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])
labels = st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}, {"zone": "a", "kind": "x"}, {"kind": "x"}])
selectors = st.sampled_from(
    [
        (),
        (),
        (),
        (("zone", "a"),),
        (("zone", "!a"),),
        (("zone", "in(a,b)"),),
        (("kind", "x"), ("zone", "!in(b,c)")),
        (("zone", "c"),),
    ]
)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    driver = Demand(draw(amounts), draw(st.sampled_from([0.0, 0.0, 1.0])))
    selector = draw(selectors)
    if draw(st.booleans()):
        return Shape(driver, selector=selector)
    least, most = sorted((draw(st.integers(0, 4)), draw(st.integers(1, 6))))
    return Shape(driver, Demand(draw(amounts), draw(gpus)), most, draw(st.sampled_from([least, most])), selector)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    cluster = [
        Node(f"n{number}", Demand(draw(st.integers(1, 8)), draw(st.integers(0, 4))), draw(labels))
        for number in range(draw(st.integers(1, 6)))
    ]
    queue = [
        Waiting(
            f"w{number}",
            draw(projects),
            draw(st.integers(-2, 2)),
            NOW - draw(st.floats(0, 4 * AGEING_SECONDS)),
            draw(shapes()),
            draw(st.sampled_from([None, 60.0, 600.0])),
            draw(st.sampled_from([0.0, 0.0, 0.0, NOW + 5])),
        )
        for number in range(draw(st.integers(0, 14)))
    ]
    holding = []
    for number in range(draw(st.integers(0, 8))):
        shape = draw(shapes())
        holding.append(
            Holding(
                f"h{number}",
                draw(projects),
                draw(st.integers(-2, 2)),
                shape,
                draw(st.integers(shape.least, shape.most)),
                NOW - draw(st.floats(0, 9999)),
                draw(st.sampled_from([None, NOW - 5, NOW + 300, NOW + 900])),
                draw(st.booleans()),
                draw(st.floats(0, 999)),
                draw(st.booleans()),
            )
        )
        if not holding[-1].preemptible and draw(st.booleans()):
            holding[-1] = replace(holding[-1], lasting=True)
    terms = {}
    for project in "abc":
        quota = Demand(draw(st.integers(0, 6)), draw(st.integers(0, 2)))
        limit = Demand(quota.cpus + draw(st.integers(0, 9)), draw(st.sampled_from([quota.gpus, quota.gpus + 1, INFINITE])))
        decayed = Demand(draw(st.floats(0, 1e6)), draw(st.floats(0, 1e6)))
        budget = draw(st.sampled_from([None, None, Demand(5, 0), Demand(INFINITE, 7)]))
        terms[project] = Terms(
            project, draw(st.sampled_from([0.5, 1.0, 3.0])), quota, draw(st.sampled_from([None, limit])), decayed, budget
        )
    return Situation(NOW, queue, holding, draw(st.sampled_from([cluster, cluster, cluster, cluster, [], None])), terms)


@settings(max_examples=90, deadline=None)
@given(situations(), st.integers(0, 99))
def test_every_plan_is_possible_and_the_same_for_the_same(asked_for, seed):
    """No node and no total beyond what there is, no limit broken, gangs whole, and nothing depends on the order of the input."""
    found = plan(asked_for)
    check(asked_for, found)
    assert plan(shuffled(asked_for, seed)) == found
    short = plan(asked_for, explain=False)
    assert started(short) == started(found)
    assert short.preemptions == found.preemptions


@settings(max_examples=90, deadline=None)
@given(situations())
def test_what_is_borrowed_takes_nothing_from_those_whom_a_quota_covers(asked_for):
    """No quota broken without borrowing: the jobs within their quotas start and preempt as if there were no others."""
    found = plan(asked_for)
    covered = within_quota(asked_for, [each for each in asked_for.queue if not waits_beside(decided(found)[each.uid])])
    alone = plan(replace(asked_for, queue=[each for each in asked_for.queue if each.uid in covered]))
    assert set(started(alone)) == set(started(found)) & covered
    assert set(alone.preemptions) == {each for each in found.preemptions if each.for_uid in covered}


def waits_beside(decision: Decision) -> bool:
    said = ("a node with", "no node", "more nodes", "a larger", "a higher", "endpoints", "a new budget", "its pause")
    return not decision.start and decision.reason.startswith(said) and "free" not in decision.reason


def within_quota(asked_for: Situation, queue: list[Waiting]) -> set[str]:
    """The uids of each project's first jobs for as long as they fit into its quota, on top of what it holds."""
    covered = set()
    for project, terms in asked_for.terms.items():
        total = sum((each.held for each in asked_for.holding if each.project == project), Demand())
        own = [each for each in queue if each.project == project]
        for each in sorted(own, key=lambda each: (-each.priority - (NOW - each.since) // AGEING_SECONDS, each.since, each.uid)):
            total += each.shape.total(each.shape.least)
            if not total.fits(terms.quota):
                break
            covered.add(each.uid)
    return covered


@settings(max_examples=90, deadline=None)
@given(situations())
def test_victims_are_asked_only_where_the_gang_then_fits(asked_for):
    """With the victims and all that is stopping gone, each job that was promised room starts in the next round."""
    found = plan(asked_for)
    if not found.preemptions:
        return
    gone = {each.uid for each in found.preemptions} | {each.uid for each in asked_for.holding if each.stopping}
    promised = {each.for_uid for each in found.preemptions}
    assert not promised & set(started(found))
    queue = [each for each in asked_for.queue if each.uid in promised]
    held = sum((each.held for each in asked_for.holding), Demand())
    if not all(held.fits(node.total) for node in asked_for.nodes or ()):
        return  # a node was lost, and more is held than there is: where what is left of it lies is anybody's guess
    if len(asked_for.nodes or ()) == 1 and not started(found) and all(each.shape.least == each.shape.most for each in queue):
        left = [each for each in asked_for.holding if each.uid not in gone]
        assert set(started(plan(replace(asked_for, queue=queue, holding=left)))) == promised


@settings(max_examples=60, deadline=None)
@given(situations())
def test_without_any_one_victim_somebody_would_miss_its_place(asked_for):
    """No more victims than needed: had one of them said no, its job would not have its promise from the others alone."""
    found = plan(asked_for)
    for preemption in found.preemptions:
        alone = [each for each in asked_for.queue if each.uid == preemption.for_uid]
        fewer = [each for each in asked_for.holding if each.uid == preemption.uid or each.uid not in asked(found)]
        if len(asked_for.nodes or ()) == 1 and len({each.for_uid for each in found.preemptions}) == 1:
            others = [replace(each, preemptible=False, stopping=False) for each in fewer if not each.stopping]
            assert started(plan(replace(asked_for, queue=alone, holding=others))) == []


def test_nothing_starves():
    """A large gang of low priority and a small share, against an endless stream of small urgent jobs of larger shares."""
    world = World(nodes((4, 0), (4, 0)), [Terms("big", share=50.0), Terms("small", share=0.1)], preemptible=False)
    victim = job("victim", gang(8), "small", priority=-3)
    world.submit(victim, 3600.0)
    count = 0
    while "victim" not in world.begun and world.now < NOW + 9 * AGEING_SECONDS:
        while len([each for each in world.queue if each.project == "big"]) < 6:
            world.submit(replace(job(f"s{count}", 1, "big", priority=3, seconds=1800.0), since=world.now), 1500.0)
            count += 1
        world.round(600.0)
    assert "victim" in world.begun
    assert world.begun["victim"] <= NOW + 7 * AGEING_SECONDS + 3600


def test_every_project_gets_its_share_in_the_long_run():
    """Two projects with endless queues and shares of one and three."""
    world = World(nodes((8, 0)), [Terms("a", share=1.0), Terms("b", share=3.0)], preemptible=False)
    spent = {"a": 0.0, "b": 0.0}
    for number in range(300):
        for project in "ab":
            while len([each for each in world.queue if each.project == project]) < 9:
                uid = f"{project}{len(world.waited)}"
                world.submit(replace(job(uid, 1, project, seconds=600.0), since=world.now), 600.0 + 60 * (number % 3))
        world.round(60.0)
        for each in world.holding:
            spent[each.project] += 1
    assert 2.5 < spent["b"] / spent["a"] < 3.5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(projects, shapes(), st.integers(-2, 2), st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=25)
)
def test_every_job_that_can_run_ends_once(rows):
    """Jobs of all kinds come, run, are preempted and go on: in the end none is left but what the cluster can never hold."""
    world = World(
        nodes((6, 2), (4, 1), (3, 0)), [Terms("a", quota=Demand(3, 1)), Terms("b", limit=Demand(5, 2)), Terms("c", 2.0)]
    )
    for number, (project, shape, priority, minutes, pause) in enumerate(rows):
        uid = f"j{number}"
        world.submit(replace(job(uid, shape, project, priority, seconds=minutes * 60.0), since=world.now), minutes * 60.0)
        for _ in range(pause):
            world.round()
    for _ in range(60 * 30):
        idle = not world.holding
        if not started(world.round()) and idle:
            break
    assert not world.holding
    for decision in plan(world.situation()).decisions:
        assert "node" in decision.reason or "cluster" in decision.reason or "higher limit" in decision.reason
    assert set(world.ended) == set(world.waited) - {each.uid for each in world.queue}
