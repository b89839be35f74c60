"""Projects by the command line."""

import grpc
import pytest

from luthier.v1.admin_pb2 import Project
from luthier.v1.job_pb2 import Budget, Usage
from tests.support.fake_services import Failure, FakeCoordinator


def hold(fake: FakeCoordinator, project_id: str, **fields: object) -> Project:
    name = f"projects/{project_id}"
    fake.projects[name] = Project(name=name, etag='"3"', **fields)  # type: ignore[arg-type]
    return fake.projects[name]


def test_create_sends_what_was_given_and_nothing_else(luthier, fake: FakeCoordinator) -> None:
    ran = luthier(
        *("project", "create", "vision", "--name", "Vision", "--share", "2", "--quota-cpus", "4", "--limit-gpus", "0"),
        *("--budget-gpu-hours", "1.5", "-o", "json"),
    )
    assert (ran.status, ran.json["name"], ran.json["budget"]) == (0, "projects/vision", {"gpu_seconds": 5400.0})
    request = fake.called("CreateProject")[0].request
    assert request.project_id == "vision"
    assert request.project == Project(
        display_name="Vision", share=2, quota={"cpus": 4}, limit={"gpus": 0}, budget=Budget(gpu_seconds=5400)
    )  # type: ignore[arg-type]
    assert luthier("project", "create", "vision").status == 1
    bare = luthier("project", "create", "bare")
    assert "none: it may hold the whole cluster" in bare.stdout
    assert fake.called("CreateProject")[-1].request.project == Project()


def test_update_changes_what_was_given_and_keeps_the_other_amounts(luthier, fake: FakeCoordinator) -> None:
    hold(fake, "vision", share=2, quota={"cpus": 4, "gpus": 1}, limit={"cpus": 8, "gpus": 2}, budget=Budget(cpu_seconds=7200))
    ran = luthier("project", "update", "vision", "--quota-gpus", "2", "--limit-cpus", "none", "-o", "json")
    assert (ran.json["quota"], ran.json["limit"], ran.json["share"]) == ({"cpus": 4.0, "gpus": 2.0}, {"gpus": 2.0}, 2.0)
    request = fake.called("UpdateProject")[0].request
    assert (list(request.update_mask.paths), request.etag) == (["quota", "limit"], '"3"')
    assert luthier("project", "update", "vision", "--name", "", "-o", "json").json["display_name"] == ""
    assert list(fake.called("UpdateProject")[1].request.update_mask.paths) == ["display_name"]


def test_a_change_that_somebody_else_was_faster_with_says_so(luthier, fake: FakeCoordinator) -> None:
    hold(fake, "vision")
    fake.fail("UpdateProject", Failure(grpc.StatusCode.ABORTED, "it was changed since it was read"))
    ran = luthier("project", "update", "vision", "--share", "2")
    assert (ran.status, ran.stderr) == (1, "error: it was changed since it was read\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["update", "vision"], "nothing to change is given"),
        (["update", "vision", "--limit-gpus", "lots"], "--limit-gpus: 'lots' is neither a number nor none"),
        (["update", "vision", "--share", "x"], "--share"),
        (["create"], "PROJECT"),
    ],
)
def test_wrong_usage_is_2_and_named(luthier, fake: FakeCoordinator, arguments: list[str], said: str) -> None:
    hold(fake, "vision")
    ran = luthier("project", *arguments)
    assert (ran.status, ran.stdout) == (2, "")
    assert said in ran.stderr
    assert not fake.called("UpdateProject")


def test_a_list_says_at_a_glance_who_holds_what(luthier, fake: FakeCoordinator) -> None:
    jobs = {"QUEUED": 3, "RUNNING": 2, "SUCCEEDED": 40}
    held = {"cpus": 3.25, "gpus": 0}
    hold(fake, "vision", display_name="Vision group", share=2, quota={"cpus": 4}, held=held, limit={"gpus": 0}, jobs=jobs)
    hold(fake, "default", share=1)
    heading, first, second = luthier("project", "list").stdout.splitlines()
    assert " ".join(heading.split()) == "project share CPUs held quota limit GPUs held quota limit jobs name"
    assert first.split() == ["default", "1", "0", "-", "-", "0", "-", "-", "-"]
    assert " ".join(second.split()) == "vision 2 3.25 4 - 0 - 0 2 running, 3 queued Vision group"
    assert [project["name"] for project in luthier("project", "list", "-o", "json").json["projects"]] == [
        "projects/default",
        "projects/vision",
    ]


def test_show_is_ones_own_project_where_none_is_named(luthier, fake: FakeCoordinator) -> None:
    hold(fake, "vision", budget=Budget(cpu_seconds=36_000), usage=Usage(cpu_seconds=35_100), jobs={"SUCCEEDED": 40})
    for arguments in (["show", "vision"], ["show", "--project", "vision"]):
        shown = luthier("project", *arguments).stdout
        assert "9.75 CPU-hours of 10, 0.25 left" in shown
        assert "40 succeeded" in shown
    assert luthier("project", "show").status == 3


def test_usage_is_told_in_hours_with_what_is_left(luthier, fake: FakeCoordinator) -> None:
    budget = Budget(cpu_seconds=3.6e6, gpu_seconds=72_000)
    hold(fake, "search", budget=budget, usage=Usage(cpu_seconds=44_640, gpu_seconds=90_000, trained_tokens=12_345_678))
    hold(fake, "vision", usage=Usage(gpu_seconds=4))
    lines = [line.split() for line in luthier("project", "usage").stdout.splitlines()]
    assert lines == [
        ["project", "CPU-hours", "budget", "left", "GPU-hours", "budget", "left", "tokens", "trained"],
        ["search", "12.4", "1,000", "987.6", "25", "20", "0", "12,345,678"],
        ["vision", "0", "-", "-", "<0.01", "-", "-", "0"],
    ]
    only = luthier("project", "usage", "vision", "-o", "json").json["projects"]
    assert [project["usage"]["gpu_seconds"] for project in only] == [4.0]


def test_an_operators_key_is_made_for_any_project(luthier, fake: FakeCoordinator) -> None:
    ran = luthier("key", "create", "--project", "vision", "--role", "operator", "-o", "json")
    assert (ran.json["key"]["role"], ran.json["key"]["display_name"]) == ("ROLE_OPERATOR", "operator")
    assert fake.called("CreateKey")[0].request.parent == "projects/vision"


def test_a_keys_scopes_are_sent_and_shown(luthier, fake: FakeCoordinator) -> None:
    luthier("key", "create", "shop", "--role", "query", "--scope", "endpoints/desk", "--scope", "jobs:read")
    luthier("key", "create")
    assert list(fake.called("CreateKey")[0].request.key.scopes) == ["endpoints/desk", "jobs:read"]
    assert not fake.called("CreateKey")[1].request.key.scopes
    heading, unbound, bound = luthier("key", "list").stdout.splitlines()
    assert heading.split()[:5] == ["key", "for", "member", "role", "scopes"]
    assert unbound.split()[3] == "all"
    assert "endpoints/desk, jobs:read" in bound
