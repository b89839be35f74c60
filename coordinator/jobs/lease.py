"""Whether a run is still heard of, by this process's own clock: a wall clock that jumps ends nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import datetime

from coordinator.jobs.states import State
from coordinator.store.tables import Job

CLAIM_SECONDS = 600.0
"""How long a run may be with Ray before its agent has claimed it: it may have to wait for a node."""

SILENCE_SECONDS = 300.0
"""How long an agent may be silent. It reports every second or so, and while the coordinator is away it keeps trying."""


LOOK_SECONDS = 60.0
"""Where we did not look ourselves for so long, a silence may have been ours."""


class Lease:
    """Remembers since when nothing new was heard of each run. A fresh process, or leader, gives everybody a fresh lease."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moment = clock()
        self._heard: dict[str, tuple[int, str, datetime | None, float]] = {}

    def look(self, uids: Collection[str]) -> None:
        """A round begins: before it reads when agents reported. Jobs other than these have no run any more, and are forgotten."""
        moment = self._clock()
        if moment - self._moment > LOOK_SECONDS:
            self._heard.clear()
        self._moment = moment
        self._heard = {uid: heard for uid, heard in self._heard.items() if uid in uids}

    def ran_out(self, job: Job, reported: datetime | None = None) -> bool:
        """Whether a run was last heard of too long ago. `reported` is when its agent last reported, None before its claim.

        Counted up to when the round began: however long this process was held up since, what it read then is no older.
        """
        mark = (job.run, job.state, reported)
        known = self._heard.get(job.uid)
        if known is None or known[:3] != mark:
            self._heard[job.uid] = (*mark, self._moment)
            return False
        return self._moment - known[3] > (CLAIM_SECONDS if job.state == State.STARTING else SILENCE_SECONDS)
