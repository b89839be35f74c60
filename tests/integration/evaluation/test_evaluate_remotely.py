"""Evaluation as a Ray task: artifacts in, scores and progress out, and an end when asked for one."""

from __future__ import annotations

import threading
import time

import pytest

from agents.evaluation.remote import evaluate_remotely
from agents.failures import RunCancelled
from common import manifest
from common.errors import InvalidArgument
from common.rows import Row, write_split
from luthier.v1 import job_pb2
from tests.integration.serving.conftest import build_micro_llama

pytestmark = pytest.mark.usefixtures("private_ray")


class RecordingLink:
    """The part of a link that an evaluation uses."""

    def __init__(self) -> None:
        self.words: list[job_pb2.Progress] = []
        self.wished = threading.Event()
        self.wish_reason = job_pb2.END_REASON_USER

    def progress(self, progress: job_pb2.Progress) -> None:
        self.words.append(progress)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    build_micro_llama(folder / "micro")
    rows = [Row(prompt=f"ticket {n}", completion=("yes", "no")[n % 2], label=("yes", "no")[n % 2], line=n) for n in range(200)]
    (folder / "rows").mkdir()
    write_split(rows, folder / "rows" / "test.parquet")
    model = manifest.publish(folder / "micro", (folder / "model").as_uri())
    data = manifest.publish(folder / "rows", (folder / "data").as_uri())
    return {
        "model_uri": (folder / "model").as_uri(),
        "model_hash": model.sha256,
        "base_uri": "",
        "base_hash": "",
        "dataset_uri": (folder / "data").as_uri(),
        "dataset_hash": data.sha256,
    }


def score(storage, link, **changes):
    options = {"split": "", "max_rows": 0, "labels": ("no", "yes"), "label_key": "", "generate": True, "cpus": 1.0, "gpus": 0.0}
    options |= {"selector": {}, "name": "micro@1", "dataset_name": "tickets@1", "link": link, "phase": "evaluating", **changes}
    return evaluate_remotely(*storage.values(), **options)


def test_scores_and_progress_come_back(storage):
    link = RecordingLink()
    result = score(storage, link, max_rows=70)
    assert (result.model, result.dataset, result.split, result.rows) == ("micro@1", "tickets@1", "test", 70)
    assert result.loss > 0
    assert sum(sum(row.counts) for row in result.likelihood.confusion) == 70
    assert sum(sum(row.counts) for row in result.generated.confusion) == 70
    assert (link.words[-1].step, link.words[-1].total_steps, link.words[-1].phase) == (210, 210, "evaluating")
    steps = [word.step for word in link.words]
    assert steps == sorted(steps)
    assert len(steps) >= 6


def test_what_the_task_raises_is_raised_here_as_it_was(storage):
    with pytest.raises(InvalidArgument, match="no split 'dev'; it has: test") as caught:
        score(storage, RecordingLink(), split="dev")
    assert type(caught.value) is InvalidArgument
    assert caught.value.violations[0].field == "split"


def test_a_wish_ends_it_and_frees_its_place(storage):
    import ray

    link = RecordingLink()
    link.wished.set()
    with pytest.raises(RunCancelled):
        score(storage, link)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 3
