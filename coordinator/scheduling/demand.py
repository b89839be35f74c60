"""What the cluster should be able to hold, for an autoscaler: what runs, and what waits for room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from coordinator.scheduling.labels import Selector
from coordinator.scheduling.model import Demand, Holding, Shape, Waiting

Bundle = tuple[Demand, Selector]
"""Something that has to lie on one node, and on which nodes it may."""

MOST = 2000
"""Bundles that an autoscaler is told of at most: more than that many nodes it will not start in one go."""


def bundles(holding: Sequence[Holding], wanting: Sequence[Waiting], most: int = MOST) -> Counter[Bundle]:
    """What runs, and as much of what waits as there is room for in the list, whole jobs only and in the order of the queue.

    Of an endpoint only the total is known, so that it is told in pieces of one CPU and one GPU. A job that waits is told with its
    most workers: with fewer it would start as soon as there is room.
    """
    found: Counter[Bundle] = Counter()
    for each in holding:
        found += _pieces(each.shape.driver) if each.lasting else _parts(each.shape, each.workers)
    for job in wanting:
        parts = _parts(job.shape, job.shape.most)
        if found.total() + parts.total() > most:
            break
        found += parts
    return found


def _parts(shape: Shape, workers: int) -> Counter[Bundle]:
    parts = chain([shape.driver], [shape.worker] * workers)
    return Counter((part, shape.selector) for part in parts if part != Demand())


def _pieces(total: Demand) -> Counter[Bundle]:
    found: Counter[Bundle] = Counter()
    for unit, amount in ((Demand(1.0), total.cpus), (Demand(0.0, 1.0), total.gpus)):
        whole = int(amount)
        found[unit, ()] += whole
        rest = amount - whole
        if rest > 1e-6:
            found[Demand(unit.cpus * rest, unit.gpus * rest), ()] += 1
    return +found
