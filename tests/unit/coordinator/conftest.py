"""A store on SQLite and one on PostgreSQL, and jobs in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlmodel import Session

from coordinator.cluster.launcher import Launcher
from coordinator.collector import Collector
from coordinator.compaction import Retention
from coordinator.jobs import create
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import fill_in
from coordinator.notify import Notifier
from coordinator.server import seed
from coordinator.store import migrate
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.migrate import upgrade
from coordinator.store.tables import Job
from coordinator.vault import Vault
from luthier.v1 import job_pb2, training_pb2
from tests.support.deleting import Bytes
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import secret_of


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    store = Store(store_url)
    upgrade(store.engine)
    store.write_now(lambda session: seed(session, tmp_path))
    yield store
    store.close()


@pytest.fixture
def new_job(store: Store) -> Callable[..., Job]:
    """Record a fine-tune; keyword arguments are fields of Job, `workers` and `request_id`."""

    def make(*, workers: int = 1, request_id: str = "", **fields: object) -> Job:
        spec = training_pb2.FinetuneSpec(
            base="builtin:tiny", dataset="tickets@1", method="full", workers=workers, output_model="m"
        )
        job = job_pb2.Job(finetune=spec, **fields)  # type: ignore[arg-type]
        fill_in(job, cluster_has_gpus=False)
        request = create.request_of("default", "tester", job_pb2.CreateJobRequest(job=job, request_id=request_id))

        def work(session: Session) -> Job:
            return create.insert(session, request, job, Resolved())

        return store.write_now(work)

    return make


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.of(None, tmp_path)


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def leadership(store: Store) -> Iterator[Leadership]:
    leadership = Leadership(store, "127.0.0.1:7420")
    leadership.look()
    assert leadership.epoch == 1
    yield leadership
    leadership.stop()


@pytest.fixture
def loop(store: Store, ray: FakeRay, leadership: Leadership) -> Reconciler:
    launcher = Launcher(ray, "127.0.0.1:7420", "python", secret_of(store))  # type: ignore[arg-type]
    return Reconciler(store, launcher, Notifier(), leadership)


@pytest.fixture
def files(tmp_path: Path) -> Bytes:
    return Bytes((tmp_path / "storage").as_uri())


@pytest.fixture
def collector(store: Store, leadership: Leadership, files: Bytes) -> Collector:
    return Collector(store, Notifier(), leadership, files.root, Retention())


STEP = '''
"""a step that is not there yet."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{revision}", "{before}", None, None


def upgrade() -> None:
    {body}
'''


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Let this version know further migrations, each a body; the last one's revision is `next_N`."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrate.MIGRATIONS, folder)

    def make(*bodies: str) -> None:
        before = migrate.head()
        for number, body in enumerate(bodies, start=1):
            revision = f"next_{number}"
            text = STEP.format(revision=revision, before=before, body=body.strip())
            (folder / "versions" / f"{revision}.py").write_text(text)
            before = revision
        monkeypatch.setattr(migrate, "MIGRATIONS", folder)

    return make
