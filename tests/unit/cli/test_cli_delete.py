"""Deleting asks first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from luthier.v1 import dataset_pb2, job_pb2, model_pb2
from luthier.v1.training_pb2 import FinetuneSpec
from tests.support.fake_services import FakeCoordinator

Luthier = Callable[..., Any]


@pytest.fixture(autouse=True)
def _things(fake: FakeCoordinator) -> None:
    for _ in range(2):
        fake.add_job(job_pb2.Job(finetune=FinetuneSpec(), state=job_pb2.JOB_STATE_SUCCEEDED))
    for number in (1, 2):
        fake.datasets["rows"].append(dataset_pb2.DatasetVersion(name=f"projects/default/datasets/rows/versions/{number}"))
        fake.models["own"].append(model_pb2.ModelVersion(name=f"projects/default/models/own/versions/{number}"))


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["job", "delete", "j-1", "j-2"], {"jobs": 0}),
        (["job", "delete", "projects/default/jobs/j-1"], {"jobs": 1}),
        (["dataset", "delete", "rows@2"], {"rows": 1}),
        (["model", "delete", "own@1", "own@2"], {"own": 0}),
    ],
)
def test_what_is_named_is_deleted(luthier: Luthier, fake: FakeCoordinator, arguments: list[str], left: dict[str, int]) -> None:
    ran = luthier(*arguments, "--yes")
    assert ran.status == 0
    assert ran.stdout.count("deleted ") == len(arguments) - 2
    counts = {"jobs": len(fake.jobs), "rows": len(fake.datasets["rows"]), "own": len(fake.models["own"])}
    assert counts == {"jobs": 2, "rows": 2, "own": 2} | left


@pytest.mark.parametrize("arguments", [["job", "delete", "j-1"], ["dataset", "delete", "rows@1"], ["model", "delete", "own@1"]])
def test_where_nobody_can_be_asked_nothing_is_deleted(luthier: Luthier, fake: FakeCoordinator, arguments: list[str]) -> None:
    ran = luthier(*arguments)
    assert ran.status == 2
    assert "--yes" in ran.stderr
    assert not any(call.method.startswith("Delete") for call in fake.calls)


@pytest.mark.parametrize(("answer", "status", "left"), [(True, 0, 1), (False, 1, 2)])
def test_a_person_is_asked(
    luthier: Luthier, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, answer: bool, status: int, left: int
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, err: asked.append(text) or answer)
    assert luthier("job", "delete", "j-1").status == status
    assert asked == ["deleting j-1; it cannot be brought back. Go on?"]
    assert len(fake.jobs) == left


def test_programs_get_a_document_for_each(luthier: Luthier) -> None:
    assert luthier("job", "delete", "j-1", "--yes", "--output", "json").json == {"deleted": "j-1"}
