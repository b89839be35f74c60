"""What the board makes of Ray Tune's trials."""

import threading
from types import SimpleNamespace

import pytest

from agents.tuning.board import FAILURE, FIGURES, OUTCOME, Board, trial_name
from agents.tuning.space import Search
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2, sweep_pb2

COMPLETED, PRUNED, FAILED = sweep_pb2.TRIAL_STATE_COMPLETED, sweep_pb2.TRIAL_STATE_PRUNED, sweep_pb2.TRIAL_STATE_FAILED


class Recorder:
    def __init__(self):
        self.trials, self.words = [], []

    def trial(self, trial):
        self.trials.append(trial)

    def progress(self, word):
        self.words.append(word)


def search(**changes):
    fields = {"dimensions": (), "algorithm": "random", "trials": 4, "concurrent": 2, "metric": "eval_loss", "maximize": False}
    return Search(**{**fields, "seed": 1, "grace": 0.25, **changes})


def tune_trial(number, status="PENDING", figures=None, outcome=None, failure=None, **config):
    result = {FIGURES: figures or {}}
    if outcome is not None:
        result[OUTCOME] = outcome.SerializeToString().hex()
    if failure is not None:
        result[FAILURE] = failure.SerializeToString().hex()
    return SimpleNamespace(trial_id=f"ab_cd_{number:05d}", status=status, config=config, last_result=result)


def done(number, loss, **more):
    outcome = agent_pb2.OutcomeReport(model=agent_pb2.ProducedModel(uri=f"u{number}"))
    return tune_trial(number, "TERMINATED", {"eval_loss": loss, **more}, outcome)


@pytest.fixture
def recorder():
    return Recorder()


def test_names_are_ours():
    assert trial_name("a1b2c_00017") == "trial-00017"


def test_a_trial_is_told_once_a_change(recorder):
    board = Board(recorder, search())
    trial = tune_trial(0, **{"hyperparameters.learning_rate": 0.001234567, "lora.rank": 4})
    for status, figures in (
        ("PENDING", {}),
        ("PENDING", {}),
        ("RUNNING", {}),
        ("RUNNING", {"eval_loss": 2.0}),
        ("RUNNING", {"eval_loss": 2.0}),
    ):
        trial.status, trial.last_result = status, {FIGURES: figures}
        board.look([trial])
    assert [(sweep_pb2.TrialState.Name(told.state), dict(told.metrics)) for told in recorder.trials] == [
        ("TRIAL_STATE_PENDING", {}),
        ("TRIAL_STATE_RUNNING", {}),
        ("TRIAL_STATE_RUNNING", {"eval_loss": 2.0}),
    ]
    assert dict(recorder.trials[0].parameters) == {"hyperparameters.learning_rate": "0.00123457", "lora.rank": "4"}
    assert len(recorder.words) == 3


def test_an_end_with_an_outcome_is_completed_even_if_it_was_judged_then_and_one_without_is_pruned(recorder):
    board = Board(recorder, search())
    board.look([done(0, 1.0), tune_trial(1, "TERMINATED", {"eval_loss": 3.0})])
    assert [told.state for told in recorder.trials] == [COMPLETED, PRUNED]


def test_the_ranking_puts_the_completed_first_and_the_best_of_them_at_the_top(recorder):
    board = Board(recorder, search())
    failure = job_pb2.JobError(code="BAD_DATA", message="no rows", source="trial-00004/rank-0")
    board.look(
        [
            done(0, 2.0),
            done(1, float("nan")),
            tune_trial(2, "TERMINATED", {"eval_loss": 0.1}),
            done(3, 1.0),
            tune_trial(4, "TERMINATED", failure=failure),
        ]
    )
    assert [trial.id[-1] for trial in board.ranking()] == ["3", "0", "1", "2", "4"]
    name, outcome = board.best()
    assert (name, outcome.model.uri) == ("trial-00003", "u3")
    assert board.ranking()[-1].error == "no rows"
    assert "eval_loss" not in next(trial for trial in board.ranking() if trial.id == "trial-00001").metrics


def test_more_is_better_where_the_sweep_says_so(recorder):
    board = Board(recorder, search(metric="accuracy", maximize=True))
    board.look([done(0, 1.0, accuracy=0.5), done(1, 2.0, accuracy=0.9)])
    assert board.best()[0] == "trial-00001"


def test_without_a_completed_trial_there_is_no_best_but_a_first_failure(recorder):
    board = Board(recorder, search())
    first = job_pb2.JobError(code="BAD_DATA", message="first", source="trial-00001/rank-0")
    board.look([tune_trial(0, "RUNNING"), tune_trial(1, "TERMINATED", failure=first)])
    board.look([tune_trial(0, "ERROR"), tune_trial(1, "TERMINATED", failure=first)])
    assert board.best() is None
    assert board.first_failure() == first
    assert [told.state for told in recorder.trials[-2:]] == [FAILED, FAILED]
    assert "trial-00000 died without a word" in recorder.trials[-1].error


def test_a_finite_metric_is_needed_to_be_the_best(recorder):
    board = Board(recorder, search())
    board.look([done(0, float("nan"))])
    assert board.best() is None


def test_nothing_is_told_once_the_run_is_to_stop(recorder):
    wished = threading.Event()
    board = Board(recorder, search(), wished)
    board.look([tune_trial(0, "RUNNING")])
    wished.set()
    board.look([tune_trial(0, "TERMINATED")])
    assert [told.state for told in recorder.trials] == [sweep_pb2.TRIAL_STATE_RUNNING]


def test_progress_counts_trials(recorder):
    board = Board(recorder, search())
    board.look([done(0, 2.0), done(1, 1.5), tune_trial(2, "RUNNING")])
    word = recorder.words[-1]
    assert (word.step, word.total_steps, word.phase, word.loss) == (2, 4, "searching", 1.5)


def test_the_place_of_a_pruned_trial_is_given_back_once(recorder):
    places = []
    board = Board(recorder, search(), release=places.append)
    pruned, completed = tune_trial(0, "RUNNING", {"eval_loss": 3.0}), done(1, 1.0)
    pruned.last_result["place"] = completed.last_result["place"] = "abcd"
    board.look([pruned, completed])
    assert places == []
    pruned.status = "TERMINATED"
    board.look([pruned, completed])
    board.look([pruned, completed])
    assert places == ["abcd"]
