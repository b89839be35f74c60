"""Two projects that know nothing of each other, with one of everything in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.store import tables
from coordinator.store.database import Store
from luthier.client import Client
from luthier.v1 import admin_pb2, dataset_pb2
from tests.support.coordinator_process import CoordinatorProcess


@dataclass
class Tenants:
    """Two projects that know nothing of each other, each with a key of its own admin."""

    ours: Client
    theirs: Client
    our_token: str
    their_token: str


def make_key(client: Client, project: str, role: str) -> admin_pb2.CreateKeyResponse:
    wanted = admin_pb2.Key(display_name=f"{role} of {project}", role=f"ROLE_{role.upper()}")  # type: ignore[arg-type]
    return client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=f"projects/{project}", key=wanted))


def furnish(coordinator: CoordinatorProcess, project: str) -> None:
    """Give a project one of everything that calls name, past the checks that would want real files."""
    moment = tables.now()
    dataset = dataset_pb2.DatasetVersion(name=f"projects/{project}/datasets/rows/versions/1")
    rows: list[Any] = [
        tables.Job(
            **{"uid": f"uid-{project}", "project_id": project, "job_id": "ft-1", "kind": "finetune", "display_name": ""},
            **{"state": "QUEUED", "create_time": moment, "update_time": moment, "sequence": 1},
            # No job that the scheduler would start: nothing here has a cluster anyway.
            spec={"base": "builtin:tiny", "dataset": "rows@1", "method": "full", "workers": 1},
        ),
        tables.JobEvent(job_uid=f"uid-{project}", sequence=1, time=moment, type=1, state="QUEUED", project_id=project),
        tables.Dataset(project_id=project, id="rows", latest=1, create_time=moment),
        tables.DatasetVersion(
            **{"project_id": project, "dataset_id": "rows", "version": 1, "content_hash": "c", "uri": "file:///none"},
            document={"name": dataset.name},
            create_time=moment,
        ),
        tables.Schedule(
            **{"project_id": project, "id": "nightly", "uid": f"schedule-{project}", "cron": "@daily", "time_zone": "UTC"},
            **{"overlap": 1, "catch_up_seconds": 60, "paused": True, "create_time": moment, "update_time": moment},
            job={"finetune": {"base": "builtin:tiny", "dataset": "rows@1", "method": "full"}},
        ),
        tables.Model(project_id=project, id="own", latest=1, create_time=moment),
        tables.ModelVersion(
            **{"project_id": project, "model_id": "own", "version": 1, "content_hash": "c", "uri": "file:///none"},
            create_time=moment,
        ),
        tables.Endpoint(
            **{"project_id": project, "id": "desk", "state": "ENDPOINT_STATE_READY", "cpus": 1.5},
            desired={"endpoint": {}, "artifacts": {}},
            create_time=moment,
            update_time=moment,
        ),
        tables.ApiKey(
            **{"id": f"key-of-{project}", "project_id": project, "display_name": "x", "role": 2},
            token_sha256=f"hash of {project}",
            create_time=moment,
        ),
    ]

    def work(session: Session) -> None:
        for row in rows:
            session.add(row)
            session.flush()

    in_store(coordinator, work)


def in_store(coordinator: CoordinatorProcess, work: Callable[[Session], Any]) -> Any:
    store = Store(coordinator.settings.get("store_url") or f"sqlite:///{coordinator.home / 'luthier.db'}")
    try:
        return store.write_now(work)
    finally:
        store.close()


SPARES = 60
"""Versions of the data set and of the model `spare`."""


def spares(project: str) -> list[Any]:
    """Versions that nobody reads, to be deleted; rows in the order in which they can be put in."""
    moment = tables.now()
    rows: list[Any] = [
        tables.Dataset(project_id=project, id="spare", latest=SPARES, create_time=moment),
        tables.Model(project_id=project, id="spare", latest=SPARES, create_time=moment),
    ]
    for number in range(1, SPARES + 1):
        what = {"version": number, "content_hash": f"c{number}", "create_time": moment}
        rows.append(tables.DatasetVersion(project_id=project, dataset_id="spare", uri=f"file:///none/d{number}", **what))
        rows.append(tables.ModelVersion(project_id=project, model_id="spare", uri=f"file:///none/m{number}", **what))
    return rows
