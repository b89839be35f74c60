"""Gangs on nodes: what is free on each node, and where a job's driver and workers find room on it.

The scheduler packs tightly (best fit), because what is left in large pieces can take large jobs. It is an approximation where the
cluster does not say what lies where: Ray places by rules of its own, and has the last word.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence

from coordinator.scheduling.labels import Group
from coordinator.scheduling.model import Holding, Spot
from coordinator.scheduling.needs import Need

Part = tuple[int, int, int]
"""A node's number and the CPUs and GPUs of it that something holds."""

Place = list[tuple[int, int, bool]]
"""Where a gang lies: node, workers, and whether the driver lies there."""

_NODE_BITS = 20
_NODE_MASK = (1 << _NODE_BITS) - 1


class Shelf:
    """Some nodes ordered so that the tightest fit is found in a few steps, and what is free on all of them.

    Nodes are kept by free GPUs, and those with equally many by free CPUs (CPUs and node in one number, which compares fast).
    """

    def __init__(self, nodes: Iterable[int], cpus: Sequence[int], gpus: Sequence[int]) -> None:
        self.free_cpus = self.free_gpus = 0
        self._nodes: dict[int, list[int]] = {}
        for node in nodes:
            self._nodes.setdefault(gpus[node], []).append(cpus[node] << _NODE_BITS | node)
            self.free_cpus += cpus[node]
            self.free_gpus += gpus[node]
        for row in self._nodes.values():
            row.sort()
        self._levels = sorted(self._nodes)

    def find(self, cpus: int, gpus: int) -> int:
        """The node with the fewest free GPUs, then the fewest free CPUs, that holds this; -1 where none does."""
        sought = cpus << _NODE_BITS
        levels = self._levels
        for index in range(bisect_left(levels, gpus), len(levels)):
            row = self._nodes[levels[index]]
            if row[-1] >= sought:
                return row[bisect_left(row, sought)] & _NODE_MASK
        return -1

    def move(self, node: int, old_cpus: int, old_gpus: int, cpus: int, gpus: int) -> None:
        """Say what is free on a node, and what was before."""
        row = self._nodes[old_gpus]
        del row[bisect_left(row, old_cpus << _NODE_BITS | node)]
        if gpus != old_gpus:
            if not row:
                del self._nodes[old_gpus]
                del self._levels[bisect_left(self._levels, old_gpus)]
            if gpus not in self._nodes:
                insort(self._levels, gpus)
            row = self._nodes.setdefault(gpus, [])
        insort(row, cpus << _NODE_BITS | node)
        self.free_cpus += cpus - old_cpus
        self.free_gpus += gpus - old_gpus


class Room:
    """What is free on each node: all of them on one shelf, and those of a group once more where somebody asks for such nodes."""

    def __init__(self, cpus: Sequence[int], gpus: Sequence[int]) -> None:
        self.cpus, self.gpus = list(cpus), list(gpus)
        self._all = Shelf(range(len(self.cpus)), self.cpus, self.gpus)
        self._groups: dict[Group, Shelf] = {}

    def of(self, need: Need) -> Shelf:
        """The nodes on which this may lie."""
        if need.group is None:
            return self._all
        shelf = self._groups.get(need.group)
        if shelf is None:
            shelf = self._groups[need.group] = Shelf(need.group.nodes, self.cpus, self.gpus)
        return shelf

    def set(self, node: int, cpus: int, gpus: int) -> None:
        """Say what is free on a node."""
        old_cpus, old_gpus = self.cpus[node], self.gpus[node]
        if cpus == old_cpus and gpus == old_gpus:
            return
        self.cpus[node], self.gpus[node] = cpus, gpus
        self._all.move(node, old_cpus, old_gpus, cpus, gpus)
        for group, shelf in self._groups.items():
            if node in group.members:
                shelf.move(node, old_cpus, old_gpus, cpus, gpus)

    def take(self, node: int, cpus: int, gpus: int) -> None:
        """Take so much from a node (negative: give it back)."""
        self.set(node, self.cpus[node] - cpus, self.gpus[node] - gpus)

    def largest(self, need: Need) -> tuple[int, int]:
        """The most CPUs and the most GPUs that are free on one node on which this may lie."""
        nodes = range(len(self.cpus)) if need.group is None else need.group.nodes
        return max((self.cpus[node] for node in nodes), default=0), max((self.gpus[node] for node in nodes), default=0)

    def place(self, need: Need, least: int, most: int) -> Place | None:
        """Find room for the driver and for as many workers as there is room for from `least` to `most`, and take it.

        None, and nothing taken, where there is not enough. Exact for `least`: the driver's first place is the tightest; where it
        costs workers that are missing in the end, it goes to the node where it costs the fewest.
        """
        shelf = self.of(need)
        if need.part(least, True)[0] > shelf.free_cpus or need.part(least, True)[1] > shelf.free_gpus:
            return None
        driver = shelf.find(need.driver_cpus, need.driver_gpus)
        if driver < 0 or (least and shelf.find(need.worker_cpus, need.worker_gpus) < 0):
            return None
        lost = need.loss(self.cpus[driver], self.gpus[driver])
        workers = self._gang(need, driver, most)
        found = sum(workers.values())
        if found < least:
            self._give_back(need, driver, workers)
            if found + lost < least:
                return None
            tally = Tally(need, self.cpus, self.gpus)
            if tally.room < least:
                return None
            driver = tally.cheapest_driver()
            workers = self._gang(need, driver, most)
        return [(node, count, node == driver) for node, count in workers.items()]

    def _gang(self, need: Need, driver: int, most: int) -> dict[int, int]:
        """Take room for the driver on this node, and for workers: many on one node before few on many, as Ray packs them too."""
        self.take(driver, need.driver_cpus, need.driver_gpus)
        shelf = self.of(need)
        workers = {driver: 0}
        left = most
        together = min(most, need.widest)
        while left and together:
            cpus, gpus = need.part(together, False)
            node = shelf.find(cpus, gpus)
            if node < 0:
                together //= 2
                continue
            self.take(node, cpus, gpus)
            workers[node] = workers.get(node, 0) + together
            left -= together
            together = min(together, left)
        return workers

    def _give_back(self, need: Need, driver: int, workers: dict[int, int]) -> None:
        for node, count in workers.items():
            cpus, gpus = need.part(count, node == driver)
            self.take(node, -cpus, -gpus)


class Tally:
    """How many workers of one gang find room beside its driver, kept up to date while nodes change.

    Nodes on which it may not lie count for nothing.
    Exact: workers are equal, so each node takes what it can; the driver lies where it costs the fewest workers.
    """

    def __init__(self, need: Need, cpus: Sequence[int], gpus: Sequence[int]) -> None:
        self._need = need
        self._cpus, self._gpus = list(cpus), list(gpus)
        if need.group is None:
            nodes = list(zip(self._cpus, self._gpus, strict=True))
            self._fit = [need.fit(*node) for node in nodes]
            self._loss = [need.loss(*node) for node in nodes]
        else:
            self._fit, self._loss = [0] * len(self._cpus), [-1] * len(self._cpus)
            for node in need.group.nodes:
                self._fit[node] = need.fit(self._cpus[node], self._gpus[node])
                self._loss[node] = need.loss(self._cpus[node], self._gpus[node])
        self._total = sum(self._fit)
        self._losses = Counter(self._loss)

    @property
    def room(self) -> int:
        """Workers there is room for, -1 where the driver has none."""
        return self._total - min((loss for loss, count in self._losses.items() if loss >= 0 and count), default=self._total + 1)

    def add(self, node: int, cpus: int, gpus: int) -> None:
        """So much more is free on a node (negative: less)."""
        if not self._need.may_lie_on(node):
            return
        self._cpus[node] += cpus
        self._gpus[node] += gpus
        fit, loss = self._need.fit(self._cpus[node], self._gpus[node]), self._need.loss(self._cpus[node], self._gpus[node])
        self._total += fit - self._fit[node]
        self._losses[self._loss[node]] -= 1
        self._losses[loss] += 1
        self._fit[node], self._loss[node] = fit, loss

    def cheapest_driver(self) -> int:
        """The node where the driver costs the fewest workers; among equals the tightest."""
        possible = ((loss, self._gpus[node], self._cpus[node], node) for node, loss in enumerate(self._loss) if loss >= 0)
        return min(possible)[3]


def parts(need: Need, place: Place) -> list[Part]:
    """What a placed gang takes of each node."""
    return [(node, *need.part(workers, driver)) for node, workers, driver in place]


def lay_out(
    nodes: Sequence[tuple[int, int]], holdings: Iterable[tuple[Holding, Need]], numbers: dict[str, int]
) -> tuple[Room, dict[str, list[Part]]]:
    """What is free on nodes that have so much, and where each holding lies.

    Where the cluster says where a holding lies, it lies there; what it has on nodes that are gone holds nothing any more. The
    others are packed by best fit, those that ask for certain nodes first, and the largest before smaller ones. What finds no room
    that way, although it does run, is taken piecemeal from what is free, so that the totals are right.
    """
    cpus, gpus = [node[0] for node in nodes], [node[1] for node in nodes]
    where: dict[str, list[Part]] = {}
    unknown = []
    for holding, need in holdings:
        if holding.spots:
            known = [(numbers[spot.node], *_spot(need, spot)) for spot in holding.spots if spot.node in numbers]
            for node, some_cpus, some_gpus in known:
                cpus[node] -= some_cpus
                gpus[node] -= some_gpus
            where[holding.uid] = known
        else:
            unknown.append((holding, need))
    room = Room([max(each, 0) for each in cpus], [max(each, 0) for each in gpus])
    for holding, need in sorted(unknown, key=_largest_first):
        place = room.place(need, holding.workers, holding.workers)
        where[holding.uid] = _piecemeal(room, need, holding.workers) if place is None else parts(need, place)
    return room, where


def _spot(need: Need, spot: Spot) -> tuple[int, int]:
    return need.part(spot.workers, spot.driver)


def _largest_first(row: tuple[Holding, Need]) -> tuple[bool, int, int, int, int, str]:
    holding, need = row
    worker = (need.worker_gpus, need.worker_cpus) if holding.workers else (0, 0)
    largest = max(worker, (need.driver_gpus, need.driver_cpus))
    return (need.group is None, -largest[0], -largest[1], -holding.workers, -need.cpus, holding.uid)


def _piecemeal(room: Room, need: Need, workers: int) -> list[Part]:
    cpus, gpus = need.part(workers, True)
    pieces: list[Part] = []
    nodes = range(len(room.cpus))
    for node in sorted(nodes, key=lambda node: (not need.may_lie_on(node), -room.gpus[node], -room.cpus[node], node)):
        if cpus <= 0 and gpus <= 0:
            break
        piece = (min(room.cpus[node], cpus), min(room.gpus[node], gpus))
        if any(piece):
            room.take(node, *piece)
            pieces.append((node, *piece))
            cpus, gpus = cpus - piece[0], gpus - piece[1]
    return pieces
