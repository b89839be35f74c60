"""The loop that creates jobs by the clock, in the coordinator that leads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from functools import partial

from common.errors import LuthierError, Unavailable
from coordinator.jobs.reconcile import Reconciler
from coordinator.notify import Notifier
from coordinator.schedules import fire
from coordinator.store.database import Store
from coordinator.store.leader import Leadership, NotLeading
from coordinator.store.tables import Schedule, now
from coordinator.vault import Vault

log = logging.getLogger(__name__)

TOPIC = "schedules"
"""What is notified where a schedule changed."""

PERIOD = 1.0
"""Seconds between looks at the clock."""


class ScheduleRunner:
    """Runs in the event loop of every coordinator as one task, and works in the one that leads."""

    def __init__(
        self,
        store: Store,
        notifier: Notifier,
        leadership: Leadership,
        reconciler: Reconciler,
        vault: Vault,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self._store = store
        self._notifier = notifier
        self._leadership = leadership
        self._reconciler = reconciler
        self._vault = vault
        self._clock = clock

    async def run(self) -> None:
        """Look at the clock until cancelled. A look that fails is logged and repeated."""
        while not self._notifier.closing.is_set():
            try:
                await self.round()
            except Unavailable as error:
                log.warning("%s", error)
            except Exception:
                log.exception("looking for due schedules failed")
            await self._notifier.wait(TOPIC, PERIOD)

    async def round(self) -> None:
        """Create what is due."""
        epoch = self._leadership.epoch
        if not epoch:
            return
        moment = self._clock()
        for schedule in await self._store.read(partial(fire.due, now=moment)):
            try:
                await self._fire(schedule, moment, epoch)
            except (NotLeading, Unavailable):
                raise
            except Exception:
                # One that cannot be created must not hold up the others, nor be tried each second.
                log.exception("schedule %s of project %s failed", schedule.id, schedule.project_id)
                why = "an unforeseen error; the coordinator's log has it"
                await self._leadership.write(partial(fire.skip, schedule=schedule, why=why, now=moment), epoch)

    async def _fire(self, schedule: Schedule, moment: datetime, epoch: int) -> None:
        time = fire.time_of(schedule, moment)
        if time is None:
            why = "missed: the coordinator was away at the time, and for longer than catch_up allows"
            await self._leadership.write(partial(fire.skip, schedule=schedule, why=why, now=moment), epoch)
            return
        capacity = await self._reconciler.capacity()
        gpus = capacity is not None and capacity.total.gpus > 0
        try:
            made = await fire.draft(self._store, self._vault, schedule, time.isoformat(), gpus)
            _, changed = await self._leadership.write(
                partial(fire.fire, schedule=schedule, time=time, made=made, now=moment), epoch
            )
        except (NotLeading, Unavailable):
            raise  # nothing was decided: the time is still to come
        except LuthierError as error:
            log.warning("schedule %s of project %s: %s", schedule.id, schedule.project_id, error.message)
            skipped = partial(fire.skip, schedule=schedule, why=fire.words(error), now=moment)
            await self._leadership.write(skipped, epoch)
            return
        if changed:
            self._notifier.notify("scheduler", *changed)
