"""Checkpoints: a folder of every rank's files, published as one artifact, and the older ones deleted."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path

from agents.training.context import TrainContext
from agents.training.distributed import barrier, gather
from common import manifest, storage
from luthier.v1 import job_pb2

logger = logging.getLogger(__name__)


class CheckpointPublisher:
    """Publishes what the ranks wrote at a step, and keeps the latest few. Collective: every rank has to call `publish`.

    Nodes share nothing but the storage. On one node rank 0 publishes the folder; on several, one rank a node uploads the files
    that only its node has, all wait, and rank 0 adds its own and writes the manifest, so that a checkpoint is whole or not there.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._published: list[str] = []

    def publish(self, folder: Path, step: int) -> None:
        """Publish the files in this node's `folder` as the checkpoint of a step, and remove the folder."""
        context = self._context
        uri = storage.join(context.run_uri, "checkpoints", f"step-{step}")
        barrier()  # every rank has written
        homes = gather(f"{socket.gethostname()}:{folder}")
        leads = context.rank == homes.index(homes[context.rank])
        remote = self._upload_shards(folder, uri, leads, homes) if len(set(homes)) > 1 else {}
        if context.is_main:
            artifact = _publish_all(folder, uri, remote) if remote else manifest.publish(folder, uri)
            checkpoint = job_pb2.Checkpoint(
                run=context.run, step=step, uri=uri, manifest_sha256=artifact.sha256, size_bytes=artifact.size_bytes
            )
            checkpoint.create_time.GetCurrentTime()
            context.reporter.checkpoint(checkpoint)
            self._delete_older(uri)
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

    def _delete_older(self, uri: str) -> None:
        self._published.append(uri)
        while len(self._published) > self._context.config.checkpoint_keep:
            old = self._published.pop(0)
            try:
                # The manifest goes first: half a checkpoint must not look whole.
                storage.delete_tree(old)
            except Exception:
                logger.warning("could not delete the old checkpoint %s", old, exc_info=True)


def _publish_all(folder: Path, uri: str, remote: dict[str, manifest.FileEntry]) -> manifest.Manifest:
    local = manifest.build(folder).files
    files = {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in sorted((remote | local).items())}
    data = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True, ensure_ascii=False).encode()
    whole = manifest.parse(data, uri)
    for name in local:
        storage.upload_file(folder / name, storage.join(uri, name))
    storage.write_bytes(storage.join(uri, manifest.NAME), whole.data)
    return whole
