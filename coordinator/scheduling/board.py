"""What each node has free, at three moments, and who was promised it.

- `now`: free at this moment.
- `soon`: now, and what stopping jobs give back, without what was claimed of it by jobs that wait for just that.
- `later`: at the reserved start of the first job that has to wait for others to end, without what that job will take.

A job may start in what is free at all three. One that is known to end before the reserved start need not be free later. That is
EASY backfilling (Lifka, 1995), node by node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.scheduling.needs import Need
from coordinator.scheduling.packing import Part, Place, Room, Tally, parts


@dataclass(slots=True)
class Release:
    """What something that runs gives back at its end: infinite where nobody knows when, and then what began first ends first."""

    end: float
    began: float
    uid: str
    parts: Sequence[Part]


class Board:
    """The free room of one round, from the first job of the queue to the last."""

    def __init__(self, free: Room, stopping: Iterable[Sequence[Part]]) -> None:
        self.open = free
        """What is free now and not claimed."""
        self.careful: Room | None = None
        """What is free now and delays the reserved start in no case; None until there is one."""
        self.made: Room | None = None
        """What will be free soon and is not promised; None where nothing is stopping."""
        self.start: float | None = None
        """The reserved start; infinite where nobody knows when it is."""
        self.horizon = -1.0
        """A job that takes no longer ends before the reserved start. In seconds; negative where there is none or nobody knows."""
        self._now = (list(free.cpus), list(free.gpus))
        self._soon = self._now
        self._later: tuple[list[int], list[int]] | None = None
        self._back_by_start: set[str] = set()
        gone = list(stopping)
        if gone:
            self._part_ways()
            for each in gone:
                _add(self._soon, each)
            self.made = Room(*self._soon)

    def begin(self, need: Need, most: int, short: bool) -> tuple[Place, list[Part]] | None:
        """Start a gang now, if there is room. `short` says that it ends before the reserved start."""
        room = self.open if short or self.careful is None else self.careful
        place = room.place(need, need.least, most)
        if place is None:
            return None
        taken = parts(need, place)
        self._take(taken, short)
        return place, taken

    def grow(self, need: Need, more: int) -> Place:
        """Room for up to so many further workers of a gang that starts now, taken from what delays nobody."""
        room = self.careful or self.open
        place: Place = []
        while more and (node := room.of(need).find(need.worker_cpus, need.worker_gpus)) >= 0:
            count = min(more, need.fit(room.cpus[node], room.gpus[node]))
            place.append((node, count, False))
            self._take(parts(need, place[-1:]), short=False)
            more -= count
        return place

    def claim(self, need: Need) -> list[Part] | None:
        """Promise room that stopping jobs will give back to a gang, if it is enough."""
        if self.made is None:
            return None
        place = self.made.place(need, need.least, need.least)
        if place is None:
            return None
        taken = parts(need, place)
        _add(self._soon, taken, -1)
        if self._later is not None:
            _add(self._later, taken, -1)
        self._refresh(taken)
        return taken

    def soon(self) -> tuple[int, int]:
        """All CPUs and GPUs that are free soon and not claimed."""
        return sum(self._soon[0]), sum(self._soon[1])

    def promised_or_free(self) -> Room:
        """What a gang could claim before anybody else is asked to stop."""
        return self.made or self.careful or self.open

    def free_up(self, victims: Iterable[Release]) -> None:
        """Count what these give back as free soon."""
        self._part_ways()
        for victim in victims:
            _add(self._soon, victim.parts)
            if self._later is not None and victim.uid not in self._back_by_start:
                _add(self._later, victim.parts)
            self._refresh(victim.parts)
        if self.made is None:
            self.made = Room(*self._least_of(self._soon, self._later))

    def gives(self, victim: Release) -> Sequence[Part]:
        """What asking this one to stop adds to what can be claimed: nothing where its place is promised from its end on."""
        return () if victim.uid in self._back_by_start else victim.parts

    def reserve(self, need: Need, now: float, running: Iterable[Release]) -> None:
        """Find the earliest start of a gang that has to wait, and keep its room from then on."""
        later = (list(self._soon[0]), list(self._soon[1]))
        tally = Tally(need, *later)
        start = now
        for release in sorted(running, key=lambda each: (each.end, each.began, each.uid)):
            if tally.room >= need.least:
                break
            start = max(start, release.end)
            self._back_by_start.add(release.uid)
            _add(later, release.parts)
            for node, cpus, gpus in release.parts:
                tally.add(node, cpus, gpus)
        place = Room(*later).place(need, need.least, need.least)
        if place is None:
            start = math.inf
        else:
            _add(later, parts(need, place), -1)
        self.start, self._later = start, later
        if start < math.inf:
            self.horizon = start - now
        self.careful = Room(*self._least_of(self._now, self._soon, later))
        if self.made is not None:
            self.made = Room(*self._least_of(self._soon, later))

    def _part_ways(self) -> None:
        """From here on, what is free soon differs from what is free now. It need not be counted twice before."""
        if self._soon is self._now:
            self._soon = (list(self._now[0]), list(self._now[1]))

    def _take(self, taken: Sequence[Part], short: bool) -> None:
        _add(self._now, taken, -1)
        if self._soon is not self._now:
            _add(self._soon, taken, -1)
        if self._later is not None and not short:
            _add(self._later, taken, -1)
        self._refresh(taken)

    def _refresh(self, changed: Iterable[Part]) -> None:
        now, soon, later = self._now, self._soon, self._later
        for node, _, _ in changed:
            cpus, gpus = soon[0][node], soon[1][node]
            if later is not None:
                cpus, gpus = min(cpus, later[0][node]), min(gpus, later[1][node])
            if self.made is not None:
                self.made.set(node, cpus, gpus)
            if self.careful is not None:
                self.careful.set(node, min(cpus, now[0][node]), min(gpus, now[1][node]))
            self.open.set(node, min(now[0][node], soon[0][node]), min(now[1][node], soon[1][node]))

    @staticmethod
    def _least_of(*times: tuple[list[int], list[int]] | None) -> tuple[list[int], list[int]]:
        known = [time for time in times if time is not None]
        return (
            [min(values) for values in zip(*(time[0] for time in known), strict=True)],
            [min(values) for values in zip(*(time[1] for time in known), strict=True)],
        )


def _add(free: tuple[list[int], list[int]], some: Iterable[Part], sign: int = 1) -> None:
    cpus, gpus = free
    for node, part_cpus, part_gpus in some:
        cpus[node] += sign * part_cpus
        gpus[node] += sign * part_gpus
