"""Projects as callers see them: made, changed and given keys by operators, read by their own members."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlmodel import Session, select

from coordinator.store import tables
from luthier.client import (
    Aborted,
    AlreadyExists,
    Client,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from luthier.v1 import admin_pb2, endpoint_pb2, job_pb2
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.tenants import Tenants, furnish, in_store, make_key


def create(client: Client, project_id: str, **fields: object) -> admin_pb2.Project:
    request = admin_pb2.CreateProjectRequest(project_id=project_id, project=admin_pb2.Project(**fields))  # type: ignore[arg-type]
    return client.admin.CreateProject(request).project


def update(client: Client, project: admin_pb2.Project, *paths: str, etag: str = "") -> admin_pb2.Project:
    request = admin_pb2.UpdateProjectRequest(project=project, etag=etag)
    request.update_mask.paths.extend(paths)
    return client.admin.UpdateProject(request).project


def test_a_project_is_made_read_and_changed(client: Client) -> None:
    made = create(client, "vision", display_name="Vision", share=2, quota={"cpus": 4}, limit={"cpus": 8, "gpus": 0})
    assert (made.name, made.display_name, made.share, made.quota.cpus) == ("projects/vision", "Vision", 2, 4)
    assert not made.quota.HasField("gpus")
    assert made.limit.HasField("gpus")
    assert client.get_project("vision") == made
    changed = update(client, admin_pb2.Project(name=made.name, share=3), "share", "quota", etag=made.etag)
    assert (changed.share, changed.HasField("quota"), changed.limit.cpus, changed.display_name) == (3, False, 8, "Vision")
    assert changed.etag != made.etag
    with pytest.raises(Aborted, match="read it again"):
        update(client, admin_pb2.Project(name=made.name, share=4), "share", etag=made.etag)
    assert client.get_project("vision") == changed
    by_what_is_set = update(client, admin_pb2.Project(name=made.name, budget=job_pb2.Budget(gpu_seconds=60)))
    assert (by_what_is_set.share, by_what_is_set.budget.gpu_seconds) == (3, 60)


def test_bad_projects_name_their_field(client: Client) -> None:
    for project_id in ("", "Vision", "a/b", "-a", "a" * 64):
        with pytest.raises(InvalidArgument) as caught:
            create(client, project_id)
        assert [violation.field for violation in caught.value.violations] == ["project_id"]
    with pytest.raises(InvalidArgument) as caught:
        create(client, "bad", share=-1, quota={"cpus": float("nan")})
    assert [violation.field for violation in caught.value.violations] == ["project.share", "project.quota.cpus"]
    with pytest.raises(AlreadyExists, match="'default' already"):
        create(client, "default")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        client.get_project("nowhere")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        update(client, admin_pb2.Project(name="projects/nowhere", share=2))
    with pytest.raises(InvalidArgument, match=r"update_mask: 'held' cannot be changed"):
        update(client, admin_pb2.Project(name="projects/default"), "held")


def test_of_many_changes_with_one_etag_one_is_made(client: Client) -> None:
    etag = create(client, "contended").etag

    def change(number: int) -> bool:
        try:
            update(client, admin_pb2.Project(name="projects/contended", share=number), "share", etag=etag)
        except Aborted:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(change, range(1, 17))) == 1


def test_of_many_projects_of_one_id_one_is_made(client: Client) -> None:
    def make(_: int) -> bool:
        try:
            create(client, "twice")
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1


def test_projects_are_paged_by_id(client: Client) -> None:
    for number in range(5):
        create(client, f"page-{number}")
    everything = [project.name for project in client.list_projects(page_size=1000)]
    paged = [project.name for project in client.list_projects(page_size=2)]
    assert paged == everything == sorted(everything)
    assert {f"projects/page-{number}" for number in range(5)} < set(paged)


def test_what_a_project_holds_and_spends_is_seen_while_it_runs(coordinator: CoordinatorProcess, client: Client) -> None:
    create(client, "busy")
    furnish(coordinator, "busy")
    assert client.get_project("busy").held.cpus == 1.5

    def run(session: Session) -> None:
        job = session.exec(select(tables.Job).where(tables.Job.uid == "uid-busy")).one()
        # No coordinator knows a run without a cluster; this one is only looked at.
        job.state, job.run, job.cpus = "RUNNING", 1, 2.0
        session.add(job)
        began = tables.now()
        session.add(tables.JobRun(job_uid="uid-busy", run=1, submission_id="busy-1", create_time=began, cpus=2.0, gpus=1.0))

    in_store(coordinator, run)
    first = client.get_project("busy")
    time.sleep(0.5)
    second = client.get_project("busy")
    assert (first.held.cpus, first.held.gpus, dict(first.jobs)) == (3.5, 1.0, {"RUNNING": 1})
    passed = second.usage.gpu_seconds - first.usage.gpu_seconds
    assert 0.4 < passed < 10
    assert second.usage.cpu_seconds - first.usage.cpu_seconds == pytest.approx(2 * passed)


def test_an_endpoint_that_the_limit_can_never_hold_is_refused(coordinator: CoordinatorProcess, client: Client) -> None:
    create(client, "small", limit={"cpus": 1})
    furnish(coordinator, "small")
    route = endpoint_pb2.Route(model_version="own@1")
    with Client(coordinator.address, make_key(client, "small", "editor").token, "small") as small:
        replicas = endpoint_pb2.Autoscaling(min_replicas=2)
        assert small.deploy_endpoint("fits", endpoint_pb2.Endpoint(routes=[route], autoscaling=replicas)).generation == 1
        replicas.min_replicas = 3
        with pytest.raises(
            FailedPrecondition, match=r"the endpoint needs at least 1\.5 CPUs and the project may hold 1"
        ) as caught:
            small.deploy_endpoint("large", endpoint_pb2.Endpoint(routes=[route], autoscaling=replicas))
        assert [violation.field for violation in caught.value.violations] == ["project.limit.cpus"]


def test_operators_make_keys_anywhere_and_others_at_home(
    coordinator: CoordinatorProcess, client: Client, tenants: Tenants
) -> None:
    made = make_key(client, "ours", "viewer")
    assert made.key.name.startswith("projects/ours/keys/")
    listed = client.admin.ListKeys(admin_pb2.ListKeysRequest(parent="projects/ours")).keys
    assert made.key.name in [key.name for key in listed]
    with coordinator.client(made.token) as viewer:
        assert [project.name for project in viewer.list_projects()] == ["projects/ours"]
        with pytest.raises(NotFound):
            viewer.get_project("theirs")
        with pytest.raises(PermissionDenied, match="role operator"):
            create(viewer, "mine")
    assert client.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=made.key.name)).key.HasField("revoke_time")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        make_key(client, "nowhere", "viewer")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        list(client.admin.ListKeys(admin_pb2.ListKeysRequest(parent="projects/nowhere")).keys)


def test_no_key_makes_or_revokes_one_above_itself(coordinator: CoordinatorProcess, client: Client) -> None:
    admin = make_key(client, "default", "admin")
    operator = make_key(client, "default", "operator")
    with coordinator.client(admin.token) as caller:
        with pytest.raises(PermissionDenied, match=r"key\.role: .*ROLE_OPERATOR") as caught:
            make_key(caller, "default", "operator")
        assert [violation.field for violation in caught.value.violations] == ["key.role"]
        with pytest.raises(PermissionDenied, match="ROLE_OPERATOR"):
            caller.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=operator.key.name))
        assert make_key(caller, "default", "admin").key.role == admin_pb2.ROLE_ADMIN
    with coordinator.client(operator.token) as caller:
        assert create(caller, "by-another-operator").share == 1
