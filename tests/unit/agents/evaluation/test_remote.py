"""What the driver makes of the words of an evaluation's task."""

import threading
from types import SimpleNamespace

import pytest

from agents.evaluation import remote
from common.errors import Internal, InvalidArgument
from luthier.v1 import evaluation_pb2, job_pb2


class TaskError(Exception):
    def __init__(self, cause):
        self.cause = cause


def receive(items, progress=None):
    """Hand one item over as Ray would, and return what came of it and the words sent."""

    def get(item):
        if isinstance(item, Exception):
            raise item
        return item

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayTaskError=TaskError))
    words = []
    link = SimpleNamespace(progress=words.append, wished=threading.Event())
    return remote._receive(ray, iter(items), link, "evaluating_after", progress, 0.0), words


def test_rows_are_counted():
    result, [word] = receive([(5, 20, "")])
    assert result is None
    assert (word.step, word.total_steps, word.phase) == (5, 20, "evaluating_after")


def test_the_steps_of_a_training_are_kept():
    training = job_pb2.Progress(step=40, total_steps=40, loss=1.5, phase="training")
    _, [word] = receive([(5, 20, "")], training)
    assert (word.step, word.total_steps, word.loss, word.phase) == (40, 40, 1.5, "evaluating_after")
    assert training.phase == "training"


def test_a_warning_is_logged(caplog):
    receive([(5, 20, "3 rows were left out")])
    assert "3 rows were left out" in caplog.text


def test_scores_end_it():
    result, words = receive([evaluation_pb2.Evaluation(rows=3).SerializeToString()])
    assert result.rows == 3
    assert not words


def test_the_cause_is_raised_not_its_wrapping():
    with pytest.raises(InvalidArgument, match="no such split"):
        receive([TaskError(InvalidArgument("no such split"))])


def test_an_end_without_scores_is_an_error():
    with pytest.raises(Internal):
        receive([])


def test_split_files_are_found_by_name(tmp_path):
    (tmp_path / "train.parquet").touch()
    (tmp_path / "test.parquet").touch()
    assert remote.split_file(tmp_path, "test").name == "test.parquet"
    with pytest.raises(InvalidArgument, match="it has: test, train"):
        remote.split_file(tmp_path, "../train")
