"""Demands in whole numbers, and what each shape of job asks of a cluster.

Ray counts CPUs and GPUs in ten-thousandths; so does the scheduler, because whole numbers add up exactly. What depends on nothing
but shape and cluster is worked out once a round for every shape, not for every job.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.scheduling import explain, labels
from coordinator.scheduling.labels import Group, Selector
from coordinator.scheduling.model import Demand, Node, Shape

TICKS = 10_000
"""Whole numbers to one CPU or GPU."""

HUGE = 1 << 60
"""More than any cluster has: stands for "not bounded"."""


def ticks(amount: float) -> int:
    """CPUs or GPUs as a whole number of ten-thousandths."""
    return HUGE if amount == math.inf else round(amount * TICKS)


def demand(cpus: int, gpus: int) -> Demand:
    """The demand that so many ten-thousandths are."""
    return Demand(cpus / TICKS, gpus / TICKS)


Kinds = tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]
"""How many nodes have so many CPUs and GPUs, and how many have so much left beside the endpoints."""


@dataclass(slots=True, eq=False)
class Need:
    """A shape in ten-thousandths. Compared by identity: equal shapes of one round share one.

    `cpus` and `gpus` are what it needs at least, `widest` is the most workers that one node of the empty cluster could hold, and
    `never` says why the cluster could not run it even with all other jobs gone (empty where it could). `group` holds the nodes
    that it may lie on, None where all will do.
    """

    shape: Shape
    driver_cpus: int
    driver_gpus: int
    worker_cpus: int
    worker_gpus: int
    least: int
    most: int
    cpus: int
    gpus: int
    widest: int = 0
    never: str | None = None
    group: Group | None = None

    @classmethod
    def of(cls, shape: Shape) -> Need:
        """Convert a shape; `widest` and `never` depend on a cluster and are left open."""
        driver, worker = shape.driver, shape.worker
        driver_cpus, driver_gpus, worker_cpus, worker_gpus = map(ticks, (driver.cpus, driver.gpus, worker.cpus, worker.gpus))
        cpus, gpus = driver_cpus + shape.least * worker_cpus, driver_gpus + shape.least * worker_gpus
        return cls(shape, driver_cpus, driver_gpus, worker_cpus, worker_gpus, shape.least, shape.most, cpus, gpus)

    def fit(self, cpus: int, gpus: int) -> int:
        """How many workers fit into this much of one node; no more than the job takes."""
        count = self.most
        if self.worker_cpus:
            count = min(count, cpus // self.worker_cpus)
        if self.worker_gpus:
            count = min(count, gpus // self.worker_gpus)
        return max(count, 0)

    def loss(self, cpus: int, gpus: int) -> int:
        """How many workers fewer fit there when the driver lies there too; -1 where the driver does not fit."""
        if self.driver_cpus > cpus or self.driver_gpus > gpus:
            return -1
        return self.fit(cpus, gpus) - self.fit(cpus - self.driver_cpus, gpus - self.driver_gpus)

    def may_lie_on(self, node: int) -> bool:
        """Whether a node has the labels that it asks for."""
        return self.group is None or node in self.group.members

    def part(self, workers: int, driver: bool) -> tuple[int, int]:
        """CPUs and GPUs of a part of it."""
        cpus, gpus = workers * self.worker_cpus, workers * self.worker_gpus
        return (cpus + self.driver_cpus, gpus + self.driver_gpus) if driver else (cpus, gpus)


class Needs:
    """The shapes of one round, on the nodes of the cluster. `nodes` is what these have."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = [(ticks(node.total.cpus), ticks(node.total.gpus)) for node in nodes]
        self._labels = [node.labels for node in nodes]
        self._left = self.nodes
        self._groups: dict[Selector, Group] = {}
        self._kinds: dict[Group | None, Kinds] = {}
        self._known: dict[tuple[float, float, float, float, int, int, Selector], Need] = {}

    def endpoints_hold(self, held: Iterable[tuple[int, int]]) -> None:
        """Say what endpoints hold of each node: no waiting job can count on ever having that."""
        self._left = [(cpus - taken[0], gpus - taken[1]) for (cpus, gpus), taken in zip(self.nodes, held, strict=True)]
        self._kinds.clear()

    def of(self, shape: Shape) -> Need:
        """What this shape needs; the same object for an equal shape. What `never` says is left open."""
        driver, worker = shape.driver, shape.worker
        key = (driver.cpus, driver.gpus, worker.cpus, worker.gpus, shape.most, shape.least, shape.selector)
        need = self._known.get(key)
        if need is None:
            need = self._known[key] = Need.of(shape)
            need.group = self._group(shape.selector)
            need.widest = max((need.fit(*kind) for kind in self._kinds_of(need.group)[0]), default=0)
        return need

    def asked(self, shape: Shape) -> Need:
        """The same for a job that waits, with `never`."""
        driver, worker = shape.driver, shape.worker
        need = self._known.get((driver.cpus, driver.gpus, worker.cpus, worker.gpus, shape.most, shape.least, shape.selector))
        if need is None or need.never is None:
            need = self.of(shape)
            beside = self._kinds_of(need.group)[1]
            need.never = self._why_never(need) if self.nodes and _most_workers(need, beside) < need.least else ""
        return need

    def _group(self, selector: Selector) -> Group | None:
        if not selector:
            return None
        group = self._groups.get(selector)
        if group is None:
            group = self._groups[selector] = Group.of(selector, self._labels)
        return group

    def _kinds_of(self, group: Group | None) -> Kinds:
        """The nodes of a group (all for None) by what they have, and by what endpoints leave of that."""
        kinds = self._kinds.get(group)
        if kinds is None:
            numbers = range(len(self.nodes)) if group is None else group.nodes
            whole = Counter(self.nodes[number] for number in numbers)
            kinds = self._kinds[group] = (whole, Counter(self._left[number] for number in numbers))
        return kinds

    def _why_never(self, need: Need) -> str:
        shape = need.shape
        whole, beside = self._kinds_of(need.group)
        if not whole:
            return labels.no_such_node(shape.selector, self._labels)
        for unit in (shape.worker, shape.driver) if need.most else (shape.driver,):
            if not any(ticks(unit.cpus) <= cpus and ticks(unit.gpus) <= gpus for cpus, gpus in whole):
                return explain.larger_node(unit, [demand(*kind) for kind in whole], shape.selector)
        room = _most_workers(need, whole)
        if room >= need.least:
            return explain.beside_endpoints(shape.total(shape.least), _sum(beside))
        return explain.larger_cluster(shape, _sum(whole), max(room, 0))


def _most_workers(need: Need, kinds: Counter[tuple[int, int]]) -> int:
    """How many workers such nodes can take beside the driver; -1 where not even the driver fits.

    Exact: workers are equal, so each node takes what it can, and the driver lies where it costs the fewest.
    """
    losses = [loss for loss in (need.loss(*kind) for kind in kinds) if loss >= 0]
    if not losses:
        return -1
    return sum(need.fit(*kind) * count for kind, count in kinds.items()) - min(losses)


def _sum(kinds: Counter[tuple[int, int]]) -> Demand:
    cpus = sum(max(kind[0], 0) * count for kind, count in kinds.items())
    gpus = sum(max(kind[1], 0) * count for kind, count in kinds.items())
    return demand(cpus, gpus)
