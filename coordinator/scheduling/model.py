"""What the scheduler decides about, as plain values: no database, no Ray, no clock. Times are seconds of the epoch (UTC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.scheduling.labels import Selector


@dataclass(frozen=True, slots=True)
class Demand:
    """Logical CPUs and GPUs."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Demand) -> Demand:
        return Demand(self.cpus - other.cpus, self.gpus - other.gpus)

    def times(self, count: int) -> Demand:
        """This demand, `count` times."""
        return Demand(self.cpus * count, self.gpus * count)

    def fits(self, free: Demand) -> bool:
        """Whether all of it is within `free` (fractions of CPUs add up inexactly)."""
        return self.cpus <= free.cpus + 1e-6 and self.gpus <= free.gpus + 1e-6

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a job needs: a driver, and a gang of equal workers. Driver and each worker have to lie on one node each.

    An elastic job takes any number of workers from `least` to `most`; for others the two are equal. A job without workers has
    most = least = 0 and is all driver. All of it lies on nodes that `selector` matches.
    """

    driver: Demand
    worker: Demand = Demand()
    most: int = 0
    least: int = 0
    selector: Selector = ()

    def total(self, workers: int | None = None) -> Demand:
        """All that it holds with so many workers; with the most where none are named."""
        return self.driver + self.worker.times(self.most if workers is None else workers)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a part of a job lies: its driver, some of its workers, or both, on one node."""

    node: str
    workers: int
    driver: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job.

    `since` is when it was created: what was preempted or retried keeps its age. `expected_seconds` is how long it may hold its
    place (its time limit, or an estimate), None where nobody knows. `not_before` is the end of its pause after a fault.
    """

    uid: str
    project: str
    priority: int
    since: float
    shape: Shape
    expected_seconds: float | None = None
    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class Holding:
    """A job that holds resources, or an endpoint that claims them.

    `started` is when it got them and `expected_end` when it should give them back (None where nobody knows). Preempting it loses
    `unsaved_seconds` of work, those since its last checkpoint. One that is `stopping` has been asked to give its place up and is
    not asked again; its place counts as free soon, but not yet.

    An endpoint is `lasting`: nobody may count on it to end. `since` is when the job was created, which is the age it goes back to
    the queue with (`started` where it is None). `spots` is where it lies, where that is known; where it is empty, the scheduler
    assumes a tight packing (packing.py).
    """

    uid: str
    project: str
    priority: int
    shape: Shape
    workers: int
    started: float
    expected_end: float | None = None
    preemptible: bool = False
    unsaved_seconds: float = 0.0
    stopping: bool = False
    lasting: bool = False
    since: float | None = None
    spots: Sequence[Spot] = ()

    @property
    def held(self) -> Demand:
        """What it holds."""
        return self.shape.total(self.workers)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a project is entitled to.

    `quota` is what it can always have, `limit` the most it may hold at a time; a resource that is absent (None as a whole, or
    infinite in a field) is not bounded. `decayed` is what it used, in CPU- and GPU-seconds, with a half-life.
    `decayed` is expected with the half-life of order.py. `budget_left` is what it may still spend, in the same unit; a project
    that has spent its budget starts nothing that needs the resource.
    """

    project: str
    share: float = 1.0
    quota: Demand = Demand()
    limit: Demand | None = None
    decayed: Demand = Demand()
    budget_left: Demand | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, with all that it has, and its labels."""

    id: str
    total: Demand
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """All that a plan is made of. `nodes` is None while the cluster does not answer."""

    now: float
    queue: Sequence[Waiting]
    holding: Sequence[Holding] = ()
    nodes: Sequence[Node] | None = ()
    terms: Mapping[str, Terms] = field(default_factory=dict)


class Decision(NamedTuple):
    """What becomes of a queued job, and why. A tuple, because a round makes one for every job of a long queue.

    `position` is its place in the queue, 1 for the next and 0 for one that starts. `workers` is how many a starting job gets.
    `reason` completes the sentence "waits for ..." (or says what was free). `estimated_start` is None where nobody knows. `spots`
    is where the scheduler found room for a job that starts; Ray has the last word.
    """

    uid: str
    start: bool
    position: int
    reason: str
    workers: int = 0
    estimated_start: float | None = None
    spots: Sequence[Spot] = ()


@dataclass(frozen=True, slots=True)
class Preemption:
    """A job that is to save a checkpoint and give its place up, and for whom."""

    uid: str
    for_uid: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The decisions of one round: one for every queued job, in the order of the queue, and who has to make room.

    `wanting` are the queued jobs that a larger cluster would help, in the order in which they would start: they wait for room, or
    for nodes that there are none of, and not for a limit, a budget or the end of a pause.
    """

    decisions: Sequence[Decision]
    preemptions: Sequence[Preemption] = ()
    wanting: Sequence[Waiting] = ()
