"""Who has to make room, and for whom.

Two rules say whom a job may preempt, among the jobs that can be preempted and are not stopping already:

- **Reclaim.** A job that its project's quota covers may preempt what other projects hold beyond their quotas, whatever its
  priority.
- **Priority.** A job may preempt jobs of a lower priority, in its own project, or where another project's quota covers nothing of
  them. The priorities that users gave count, not age; and with age, too, the job has to be a full point ahead, or the victim,
  which keeps its age, could be first in the queue again before the job that it made room for.

Why no two jobs preempt each other in turn: what is borrowed does not fit into its quota when it comes back either, so it can
reclaim nothing, and stands behind those whom a quota covers. (An elastic job of which the quota covers the least comes back
within it, and then is not borrowed.) A job that started within its quota can only be preempted by a higher priority of its own
project. And two jobs cannot each have a higher priority than the other. It takes another job of theirs to end, or a new one to
come, before the answer can change.

Victims are those with the least lost work (unsaved seconds times the part of the cluster they hold), then the youngest; they are
asked only if the whole gang fits then, and each of them is needed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.scheduling.board import Board, Release
from coordinator.scheduling.model import Holding
from coordinator.scheduling.needs import Need
from coordinator.scheduling.order import Cover, Queued, effective
from coordinator.scheduling.packing import Part, Room, Tally, parts


@dataclass(slots=True, eq=False)
class Candidate:
    """A job that somebody may ask to stop, with what it gives back."""

    holding: Holding
    release: Release
    cpus: int
    gpus: int
    cover: Cover
    effective: float
    lost: float


def candidates(
    holdings: Iterable[Holding],
    releases: Mapping[str, Release],
    covers: Mapping[str, Cover],
    cluster: tuple[int, int],
    now: float,
) -> list[Candidate]:
    """All that may be asked at all, the cheapest to lose first. `covers` is by uid."""
    found = []
    for holding in holdings:
        release = releases.get(holding.uid)
        if release is None or not holding.preemptible or holding.stopping or holding.lasting:
            continue
        cpus, gpus = sum(part[1] for part in release.parts), sum(part[2] for part in release.parts)
        weight = max(cpus / cluster[0] if cluster[0] else 0.0, gpus / cluster[1] if cluster[1] else 0.0)
        since = holding.started if holding.since is None else holding.since
        age = effective(holding.priority, since, now)
        lost = max(holding.unsaved_seconds, 0.0) * weight
        found.append(Candidate(holding, release, cpus, gpus, covers[holding.uid], age, lost))
    found.sort(key=lambda each: (each.lost, -each.holding.started, each.holding.uid))
    return found


def may_preempt(queued: Queued, points: float, victim: Candidate) -> bool:
    """Whether the rules let this job, with so many points of effective priority, take that one's place."""
    job, holding = queued.job, victim.holding
    other = job.project != holding.project
    if other and queued.covered and victim.cover is not Cover.WHOLE:
        return True
    if other and victim.cover is not Cover.NONE:
        return False
    return job.priority > holding.priority and points >= victim.effective + 1


def choose(queued: Queued, points: float, field: Sequence[Candidate], board: Board) -> list[Candidate]:
    """The victims for this job: none where even all that it may preempt do not make enough room."""
    need = queued.need
    room = board.promised_or_free()
    shelf = room.of(need)
    missing_cpus, missing_gpus = need.cpus - shelf.free_cpus, need.gpus - shelf.free_gpus
    allowed = [each for each in field if may_preempt(queued, points, each) and _useful(board.gives(each.release), need)]
    if sum(each.cpus for each in allowed) < missing_cpus or sum(each.gpus for each in allowed) < missing_gpus:
        return []
    tally = Tally(need, room.cpus, room.gpus)
    asked: list[Candidate] = []
    for each in allowed:
        if tally.room >= need.least:
            break
        _shift(tally, each, 1)
        asked.append(each)
    if tally.room < need.least:
        return []
    return _only_needed(need, room, asked, tally)


def _only_needed(need: Need, room: Room, asked: Sequence[Candidate], tally: Tally) -> list[Candidate]:
    """Spare those without whom the gang fits as well: first all on nodes that it does not touch, then one by one."""
    freed = Room(room.cpus, room.gpus)
    for each in asked:
        for node, cpus, gpus in each.release.parts:
            freed.take(node, -cpus, -gpus)
    place = freed.place(need, need.least, need.least)
    lacking = {
        node
        for node, cpus, gpus in (parts(need, place) if place is not None else ())
        if cpus > room.cpus[node] or gpus > room.gpus[node]
    }
    kept = []
    for each in asked:
        if lacking.isdisjoint(part[0] for part in each.release.parts):
            _shift(tally, each, -1)
        else:
            kept.append(each)
    for each in reversed(list(kept)):
        _shift(tally, each, -1)
        if tally.room >= need.least:
            kept.remove(each)
        else:
            _shift(tally, each, 1)
    return kept


def _useful(given: Sequence[Part], need: Need) -> bool:
    """Whether any of what somebody gives back lies where this may lie."""
    return any(need.may_lie_on(part[0]) for part in given)


def _shift(tally: Tally, candidate: Candidate, sign: int) -> None:
    for node, cpus, gpus in candidate.release.parts:
        tally.add(node, sign * cpus, sign * gpus)
