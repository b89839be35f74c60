"""Checkpoints: a folder of every rank's files, published as one artifact, and those deleted that are not to be kept."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from agents.training.context import TrainContext
from agents.training.distributed import barrier, gather
from common import manifest, storage
from common.keeping import kept
from luthier.v1 import job_pb2

logger = logging.getLogger(__name__)


class CheckpointPublisher:
    """Publishes what the ranks wrote at a step, and keeps what the policy keeps. Collective: every rank has to call `publish`.

    Nodes share nothing but the storage. On one node rank 0 publishes the folder; on several, one rank a node uploads the files
    that only its node has, all wait, and rank 0 adds its own and writes the manifest, so that a checkpoint is whole or not there.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._published: dict[int, Mapping[str, float]] = {}

    def publish(self, folder: Path, step: int, figures: Mapping[str, float]) -> None:
        """Publish the files in this node's `folder` as the checkpoint of a step with its figures, and remove the folder."""
        context = self._context
        uri = self._uri(step)
        barrier()  # every rank has written
        homes = gather(f"{socket.gethostname()}:{folder}")
        leads = context.rank == homes.index(homes[context.rank])
        remote = self._upload_shards(folder, uri, leads, homes) if len(set(homes)) > 1 else {}
        if context.is_main:
            artifact = _publish_all(folder, uri, remote) if remote else manifest.publish(folder, uri)
            checkpoint = job_pb2.Checkpoint(
                run=context.run,
                step=step,
                uri=uri,
                manifest_sha256=artifact.sha256,
                size_bytes=artifact.size_bytes,
                metrics=figures,
            )
            checkpoint.create_time.GetCurrentTime()
            context.reporter.checkpoint(checkpoint)
            self._published[step] = figures
            self._delete_others()
        barrier()
        if leads:
            shutil.rmtree(folder, ignore_errors=True)

    def _upload_shards(self, folder: Path, uri: str, leads: bool, homes: list[str]) -> dict[str, manifest.FileEntry]:
        """On several nodes: upload what only this node has, and return the files of the nodes other than rank 0's."""
        mine = manifest.build(folder).files if leads else {}
        by_rank = gather(mine)
        taken = set(by_rank[0])
        others: dict[str, manifest.FileEntry] = {}
        for rank, files in enumerate(by_rank):
            if homes[rank] == homes[0]:
                continue
            fresh = {name: entry for name, entry in files.items() if name not in taken}
            taken |= set(fresh)
            others |= fresh
            if rank == self._context.rank:
                for name in fresh:
                    storage.upload_file(folder / name, storage.join(uri, name))
        barrier()
        return others

    def _uri(self, step: int) -> str:
        return storage.join(self._context.run_uri, "checkpoints", f"step-{step}")

    def _delete_others(self) -> None:
        """Delete what the job's policy does not keep; the coordinator forgets the same by the same rule."""
        for step in self._published.keys() - kept(self._context.config.keep, self._published):
            del self._published[step]
            try:
                manifest.delete(self._uri(step))
            except Exception:
                logger.warning("could not delete the old checkpoint %s", self._uri(step), exc_info=True)


def _publish_all(folder: Path, uri: str, remote: dict[str, manifest.FileEntry]) -> manifest.Manifest:
    local = manifest.build(folder).files
    files = {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in sorted((remote | local).items())}
    data = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True, ensure_ascii=False).encode()
    whole = manifest.parse(data, uri)
    for name in local:
        storage.upload_file(folder / name, storage.join(uri, name))
    storage.write_bytes(storage.join(uri, manifest.NAME), whole.data)
    return whole
