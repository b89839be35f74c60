"""The job files under examples/ are jobs that the coordinator takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.jobfile import read_job
from coordinator.jobs.validate import validate

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_job(path: Path) -> None:
    validate(read_job(str(path)))


def test_an_empty_adapter_in_a_file_is_an_adapter() -> None:
    (path,) = [path for path in EXAMPLES if path.name == "dpo.yaml"]
    assert read_job(str(path)).finetune.HasField("lora")
