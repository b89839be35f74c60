"""What a project may be, who may touch what, and what a project is not entitled to."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import Session, col, select

from common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from coordinator.jobs.admission import check_entitlement
from coordinator.jobs.tokens import sha256
from coordinator.scheduling.model import Demand
from coordinator.server import seed
from coordinator.services import principal, projects
from coordinator.services.admin import not_above
from coordinator.services.principal import ADMIN, EDITOR, OPERATOR, VIEWER, Principal
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import admin_pb2, dataset_pb2, endpoint_pb2, job_pb2, member_pb2, model_pb2, schedule_pb2, secret_pb2

METHODS = [
    f"/{service.full_name}/{method.name}"
    for module in (job_pb2, dataset_pb2, model_pb2, schedule_pb2, endpoint_pb2, secret_pb2, member_pb2, admin_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def row(**values: object) -> tables.Project:
    return tables.Project(id="p", create_time=tables.now(), **values)


def put(**values: object) -> tables.Project:
    made = row()
    projects.set_fields(made, admin_pb2.Project(**values), projects.FIELDS)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"share": 0}, {"project.share"}),
        ({"share": -1}, {"project.share"}),
        ({"share": float("nan")}, {"project.share"}),
        ({"share": float("inf")}, {"project.share"}),
        ({"display_name": "x" * 101}, {"project.display_name"}),
        ({"quota": {"cpus": -1, "gpus": float("nan")}}, {"project.quota.cpus", "project.quota.gpus"}),
        ({"limit": {"gpus": float("inf")}}, {"project.limit.gpus"}),
        ({"budget": {"cpu_seconds": -0.5}}, {"project.budget.cpu_seconds"}),
        ({"quota": {"cpus": 5, "gpus": 1}, "limit": {"cpus": 4, "gpus": 1}}, {"project.quota.cpus"}),
        ({"share": 0, "quota": {"cpus": -1}, "budget": {"gpu_seconds": -1}}, 3),
    ],
)
def test_each_bad_field_is_named(fields: dict[str, object], named: set[str] | int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        put(**fields)
    found = {violation.field for violation in caught.value.violations}
    assert (len(found) if isinstance(named, int) else found) == named


def test_what_is_absent_is_unbounded_and_zero_is_a_bound() -> None:
    made = put(quota={"cpus": 2}, limit={"cpus": 2, "gpus": 0})
    assert (made.share, made.quota, made.ceiling, made.budget) == (1.0, {"cpus": 2.0}, {"cpus": 2.0, "gpus": 0.0}, {})
    message = projects.message(made, projects.Standing())
    assert (message.limit.HasField("gpus"), message.quota.HasField("gpus"), message.HasField("budget")) == (True, False, False)


def test_a_mask_names_what_changes_and_the_rest_stays() -> None:
    made = row(display_name="old", share=2.0, quota={"cpus": 4.0}, budget={"cpu_seconds": 1.0})
    sent = admin_pb2.Project(display_name="new", share=9.0)
    projects.set_fields(made, sent, ["display_name", "budget"])
    assert (made.display_name, made.share, made.quota, made.budget) == ("new", 2.0, {"cpus": 4.0}, {})


def test_a_limit_is_held_against_the_quota_that_stays() -> None:
    with pytest.raises(InvalidArgument, match=r"project\.quota\.cpus: 4 is above the limit of 3"):
        projects.set_fields(row(quota={"cpus": 4.0}), admin_pb2.Project(limit={"cpus": 3.0}), ["limit"])  # type: ignore[arg-type]


def test_an_empty_mask_means_all_that_is_set() -> None:
    sent = admin_pb2.Project(name="projects/p", share=2.0, budget=job_pb2.Budget(cpu_seconds=0), etag="x")
    assert projects.masked(admin_pb2.UpdateProjectRequest(project=sent)) == ["share", "budget"]
    with pytest.raises(InvalidArgument, match="update_mask: empty"):
        projects.masked(admin_pb2.UpdateProjectRequest(project=admin_pb2.Project(name="projects/p")))


@pytest.mark.parametrize("path", ["held", "quota.cpus", "name", "*", ""])
def test_a_mask_with_what_cannot_be_changed_is_refused(path: str) -> None:
    request = admin_pb2.UpdateProjectRequest(update_mask={"paths": ["share", path]})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="update_mask") as caught:
        projects.masked(request)
    assert repr(path) in caught.value.message


def test_every_call_of_the_contract_says_what_role_it_needs() -> None:
    assert set(METHODS) == set(principal.NEEDS)


def test_only_operators_make_and_change_projects() -> None:
    needs = {name.rpartition("/")[2]: role for name, role in principal.NEEDS.items() if "Project" in name}
    assert needs == {"CreateProject": OPERATOR, "UpdateProject": OPERATOR, "GetProject": VIEWER, "ListProjects": VIEWER}


def test_names_of_other_projects_are_for_operators() -> None:
    admin, operator = (Principal("mine", "k", "k", role) for role in (ADMIN, OPERATOR))
    assert admin.administered("projects/mine/keys/k-1", "keys") == ("mine", "k-1")
    assert operator.administered("projects/other") == ("other",)
    with pytest.raises(NotFound):
        admin.administered("projects/other/keys/k-1", "keys")


@pytest.mark.parametrize("mine", [ADMIN, OPERATOR])
def test_no_key_reaches_above_itself(mine: admin_pb2.Role.ValueType) -> None:
    who = Principal("p", "k", "k", mine)
    for role in (EDITOR, mine):
        not_above(who, role, "key.role", "makes")
    if mine is ADMIN:
        with pytest.raises(PermissionDenied, match="ROLE_OPERATOR") as caught:
            not_above(who, OPERATOR, "key.role", "makes")
        assert [violation.field for violation in caught.value.violations] == ["key.role"]


def test_the_key_of_the_home_is_an_operators_also_where_it_was_an_admins(store: Store, tmp_path: Path) -> None:
    def role(session: Session) -> list[tuple[str, int]]:
        query = select(tables.ApiKey.token_sha256, tables.ApiKey.role).order_by(col(tables.ApiKey.create_time))
        return [tuple(found) for found in session.exec(query).all()]  # type: ignore[misc]

    (tmp_path / "admin.key").write_text("lut_one\n")
    store.write_now(lambda session: seed(session, tmp_path))
    assert store.read_now(role) == [(sha256("lut_one"), OPERATOR)]

    def demote(session: Session) -> None:
        key = session.exec(select(tables.ApiKey)).one()
        key.role = ADMIN
        session.add(key)

    store.write_now(demote)
    store.write_now(lambda session: seed(session, tmp_path))
    assert store.read_now(role) == [(sha256("lut_one"), OPERATOR)]


def bound(store: Store, **values: dict[str, float]) -> None:
    def work(session: Session) -> None:
        project = session.get_one(tables.Project, "default")
        for name, value in values.items():
            setattr(project, name, value)
        session.add(project)

    store.write_now(work)


def entitle(store: Store, demand: Demand) -> None:
    store.read_now(lambda session: check_entitlement(session, "default", demand))


def test_a_job_that_the_limit_can_never_hold_is_refused_with_the_figures(store: Store) -> None:
    entitle(store, Demand(1000.0, 1000.0))
    bound(store, ceiling={"cpus": 4.0})
    entitle(store, Demand(4.0, 1000.0))
    with pytest.raises(FailedPrecondition, match=r"at least 4\.25 CPUs and the project may hold 4 at a time") as caught:
        entitle(store, Demand(4.25))
    assert caught.value.reason == "OVER_LIMIT"
    bound(store, ceiling={"cpus": 4.0, "gpus": 0.0})
    with pytest.raises(FailedPrecondition) as caught:
        entitle(store, Demand(5.0, 1.0))
    assert [violation.field for violation in caught.value.violations] == ["project.limit.cpus", "project.limit.gpus"]


def test_a_spent_budget_takes_no_job_that_would_spend_of_it(store: Store) -> None:
    bound(store, budget={"gpu_seconds": 7200.0, "cpu_seconds": 1e9})
    entitle(store, Demand(1.0, 1.0))

    def spend(session: Session) -> None:
        project = session.get_one(tables.Project, "default")
        project.gpu_seconds = 7300.0
        session.add(project)

    store.write_now(spend)
    entitle(store, Demand(1.0))
    with pytest.raises(FailedPrecondition, match=r"project\.budget\.gpu_seconds: all 2 GPU-hours are spent") as caught:
        entitle(store, Demand(1.0, 1.0))
    assert caught.value.reason == "BUDGET_SPENT"


def test_what_runs_now_counts_against_the_budget(store: Store, new_job) -> None:  # type: ignore[no-untyped-def]
    job = new_job()
    bound(store, budget={"cpu_seconds": 3600.0})

    def start(session: Session) -> None:
        began = tables.now() - timedelta(hours=1, seconds=1)
        found = session.get_one(tables.Job, job.uid)
        found.state, found.run = "RUNNING", 1
        session.add(found)
        session.add(tables.JobRun(job_uid=job.uid, run=1, submission_id="s", create_time=began, cpus=1.0))

    entitle(store, Demand(1.0))
    store.write_now(start)
    with pytest.raises(FailedPrecondition, match="all 1 CPU-hours are spent"):
        entitle(store, Demand(1.0))
