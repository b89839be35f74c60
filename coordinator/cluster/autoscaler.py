"""Telling Ray's autoscaler what is queued, so that the cluster grows and shrinks with the queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from common.errors import Unavailable
from coordinator.cluster.ray_cluster import RayCluster
from coordinator.scheduling.demand import Bundle, bundles
from coordinator.scheduling.model import Holding, Waiting

log = logging.getLogger(__name__)

PAUSE_SECONDS = 3.0
"""Between two things that it is told, so that a queue in motion does not keep a processor busy with telling."""

AGAIN_SECONDS = 60.0
"""How often it is told again what it knows: Ray's GCS forgets with its process."""


class Autoscaler:
    """The autoscaler of a cluster, or nobody where the cluster has none."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._told: Counter[Bundle] | None = None
        self._told_at = -AGAIN_SECONDS
        self._telling: asyncio.Task[None] | None = None
        self.error = ""
        """Why it could not be told last time; empty where it was."""

    @property
    def there(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._cluster.gcs_address)

    @property
    def words(self) -> str:
        """What there is to say to whoever asks for the stack's status."""
        if not self.there:
            return ""
        if self.error:
            return f"cannot be told what is queued: {self.error}"
        return "not told yet" if self._told is None else f"told of {self._told.total()} places for what runs and waits"

    def tell(self, holding: Sequence[Holding], wanting: Sequence[Waiting]) -> None:
        """Say what runs and what waits for room, in a task of its own. A failure is logged when it begins, and tried again."""
        if not self.there or (self._telling is not None and not self._telling.done()):
            return
        wanted, past = bundles(holding, wanting), time.monotonic() - self._told_at
        if past < (PAUSE_SECONDS if self.error or wanted != self._told else AGAIN_SECONDS):
            return
        self._told_at = time.monotonic()
        self._telling = asyncio.create_task(self._tell(wanted))

    async def _tell(self, wanted: Counter[Bundle]) -> None:
        said = [
            ({name: amount for name, amount in (("CPU", unit.cpus), ("GPU", unit.gpus)) if amount}, dict(selector))
            for (unit, selector), count in sorted(wanted.items(), key=repr)
            for _ in range(count)
        ]
        try:
            await asyncio.to_thread(self._cluster.request_resources, said)
        except Unavailable as error:
            if not self.error:
                log.warning("Ray's autoscaler cannot be told what is queued: %s", error.message)
            self.error = error.message
            return
        self._told, self.error = wanted, ""
