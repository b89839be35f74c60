"""What tests of deleting have in storage and in the records, and how they delete it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlmodel import Session, select

from common import storage
from common.names import VersionRef
from coordinator import registry
from coordinator.collector import SETTLE
from coordinator.jobs import create
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import fill_in
from coordinator.removal import delete_dataset_version, delete_job, delete_model_version
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import dataset_pb2, job_pb2, model_pb2, training_pb2
from tests.support.job_runs import now_of, set_columns


@dataclass
class Bytes:
    """Folders of a storage in this machine's files."""

    root: str

    def uri(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def put(self, *parts: str) -> str:
        """A folder with a manifest and a file; returns its URI."""
        uri = self.uri(*parts)
        for name in ("manifest.json", "deep/weights.bin"):
            storage.write_bytes(storage.join(uri, name), b"bytes")
        return uri

    def there(self, uri: str) -> bool:
        return len(storage.list_files(uri)) == 2

    def gone(self, uri: str) -> bool:
        return not storage.exists(uri)


def ended(store: Store, job: tables.Job, state: str = "SUCCEEDED", ago: timedelta = 2 * SETTLE, **values: object) -> tables.Job:
    moment = tables.now() - ago
    set_columns(store, job, state=state, end_time=moment, **values)
    return now_of(store, job)


def add_dataset(store: Store, uri: str, name: str = "rows", project: str = "default") -> None:
    version = dataset_pb2.DatasetVersion(content_hash="c", uri=uri)
    store.write_now(lambda session: registry.add_dataset_version(session, project, name, version, "m", "", ""))


def add_model(store: Store, uri: str, name: str = "own", project: str = "default", base_uri: str = "", job: str = "") -> None:
    version = model_pb2.ModelVersion(content_hash="c", artifact_uri=uri, lineage=model_pb2.Lineage(job=job))
    if base_uri:
        version.kind, version.base_artifact_uri, version.base = model_pb2.MODEL_KIND_ADAPTER, base_uri, "own@1"
    store.write_now(lambda session: registry.add_model_version(session, project, name, version))


def delete(store: Store, job: tables.Job, etag: str = "") -> None:
    store.write_now(lambda session: delete_job(session, session.get_one(tables.Job, job.uid), etag))


def drop_dataset(store: Store, name: str = "rows", version: str = "1", project: str = "default") -> None:
    store.write_now(lambda session: delete_dataset_version(session, project, VersionRef(name, version)))


def drop_model(store: Store, name: str = "own", version: str = "1") -> None:
    store.write_now(lambda session: delete_model_version(session, "default", VersionRef(name, version)))


def rows_of(store: Store, uid: str) -> int:
    """Rows of all tables that belong to a job."""

    def count(session: Session) -> int:
        of_job = [
            (tables.JobRun, tables.JobRun.job_uid),
            (tables.JobEvent, tables.JobEvent.job_uid),
            (tables.JobLog, tables.JobLog.job_uid),
            (tables.Metric, tables.Metric.job_uid),
            (tables.Checkpoint, tables.Checkpoint.job_uid),
            (tables.Trial, tables.Trial.job_uid),
            (tables.ReportCursor, tables.ReportCursor.job_uid),
            (tables.Job, tables.Job.uid),
        ]
        return sum(len(session.exec(select(table).where(key == uid)).all()) for table, key in of_job)

    return store.read_now(count)


def fill(store: Store, uid: str) -> None:
    moment = tables.now()
    rows: list[Any] = [
        tables.JobRun(job_uid=uid, run=1, submission_id=f"s-{uid}", create_time=moment, end_time=moment),
        tables.JobLog(job_uid=uid, sequence=1, time=moment, run=1, source="driver", level="info", message="x"),
        tables.Metric(job_uid=uid, run=1, step=1, time=moment, figures={"loss": 1.0}),
        tables.Checkpoint(job_uid=uid, run=1, step=5, uri="mem://5", manifest_sha256="a", create_time=moment),
        tables.Trial(job_uid=uid, trial_id="trial-00001"),
        tables.ReportCursor(job_uid=uid, run=1, source="driver", last=3),
    ]
    store.write_now(lambda session: session.add_all(rows))


def read_by(store: Store, kind: str, uri: str) -> tables.Job:
    """A new job that reads version 1 of the data set or model."""
    dataset = agent_pb2.Artifact(name="rows@1", kind="dataset", uri=uri, content_hash="m")
    model = agent_pb2.Artifact(name="own@1", kind="registry", uri=uri, content_hash="c", model_kind="full")
    role, artifact = ("dataset", dataset) if kind == "dataset" else ("base", model)
    return store.write_now(lambda session: create.insert(session, *asked(role, artifact)))


def asked(role: str, artifact: agent_pb2.Artifact) -> tuple[create.Request, job_pb2.Job, Resolved]:
    spec = training_pb2.FinetuneSpec(base="own@1", dataset="rows@1", method="full", output_model="m")
    job = job_pb2.Job(finetune=spec)
    fill_in(job, cluster_has_gpus=False)
    request = create.request_of("default", "tester", job_pb2.CreateJobRequest(job=job))
    return request, job, Resolved(inputs={role: artifact})
