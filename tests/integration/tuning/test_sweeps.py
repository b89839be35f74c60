"""Sweeps whose every trial is a real run of Ray Train on a DeepSpeed engine."""

from __future__ import annotations

import threading
import time

import pytest

from common import manifest, storage
from luthier.v1 import job_pb2, sweep_pb2

pytestmark = pytest.mark.slow

FINETUNE = {
    "base": "micro@1",
    "dataset": "colours@1",
    "method": "full",
    "hyperparameters": {"max_steps": 12, "batch_size": 16},
    "evaluation": {"generate": True},
    "worker_resources": {"cpus": 1, "gpus": 0},
    "workers": 1,
}


def states(trials):
    return {trial.id: sweep_pb2.TrialState.Name(trial.state).removeprefix("TRIAL_STATE_") for trial in trials}


def all_cpus_come_back(count: float, seconds: float = 30) -> bool:
    import ray

    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < count and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0) == count


@pytest.mark.chaos
def test_a_grid_of_four_two_at_a_time_ends_with_its_best_model(sweep):
    outcome, coordinator, folder = sweep(
        {
            "finetune": FINETUNE,
            "space": {
                "hyperparameters.learning_rate": {"choice": {"values": ["1e-6", "1e-2"]}},
                "hyperparameters.warmup_ratio": {"choice": {"values": ["0", "0.5"]}},
            },
            "algorithm": "SWEEP_ALGORITHM_GRID",
            "max_concurrent_trials": 2,
        }
    )
    assert outcome.state == job_pb2.JOB_STATE_SUCCEEDED, outcome.error
    trials = list(outcome.result.trials)
    assert sorted(trial.id for trial in trials) == [f"trial-{number:05d}" for number in range(4)]
    assert set(states(trials).values()) == {"COMPLETED"}
    losses = [trial.metrics["eval_loss"] for trial in trials]
    assert losses == sorted(losses)
    assert {trial.parameters["hyperparameters.learning_rate"] for trial in trials[:2]} == {"0.01"}
    assert len({tuple(sorted(trial.parameters.items())) for trial in trials}) == 4
    assert all(trial.seconds > 0 for trial in trials)

    # The best one's model is there, whole; the others' are gone.
    assert outcome.model.trial == trials[0].id
    assert outcome.model.parameters["hyperparameters.learning_rate"] == "0.01"
    assert manifest.read(outcome.model.uri).sha256 == outcome.model.content_hash
    assert outcome.model.base.name == "micro@1"
    left = {path.name for path in (folder / "trials").iterdir()}
    assert left == {trials[0].id}
    assert outcome.result.metrics["eval_loss"] == pytest.approx(outcome.result.after.loss)
    assert outcome.result.after.generated.labels
    assert outcome.result.engine.engine_class.endswith("DeepSpeedEngine")

    # What happened was told while it happened: each trial ran before it completed, and at most two ran at a time.
    told = coordinator.of("driver", "trial")
    running: set[str] = set()
    most = 0
    for trial in told:
        if trial.state == sweep_pb2.TRIAL_STATE_RUNNING:
            running.add(trial.id)
        else:
            running.discard(trial.id)
        most = max(most, len(running))
    assert most == 2
    assert states(told) == states(trials)
    assert {source for source in coordinator.reports if source.endswith("/rank-0")} == {f"{trial.id}/rank-0" for trial in trials}
    progress = coordinator.of("driver", "progress")[-1]
    assert (progress.step, progress.total_steps, progress.phase) == (4, 4, "searching")
    assert all_cpus_come_back(3)


@pytest.mark.chaos
def test_asha_ends_the_worse_trials_early_and_frees_their_places(sweep):
    outcome, _, _ = sweep(
        {
            "finetune": {**FINETUNE, "hyperparameters": {"max_steps": 200, "batch_size": 16}},
            # One after the other; this seed draws 5e-3, then 3e-6.
            "space": {"hyperparameters.learning_rate": {"log_uniform": {"min": 1e-7, "max": 1e-2}}},
            "algorithm": "SWEEP_ALGORITHM_ASHA",
            "trials": 2,
            "grace": 0.05,
            "seed": 51,
        }
    )
    assert outcome.state == job_pb2.JOB_STATE_SUCCEEDED, outcome.error
    trials = list(outcome.result.trials)
    found = states(trials)
    assert sorted(found.values()).count("PRUNED") >= 1, found
    assert found[outcome.model.trial] == "COMPLETED"
    assert trials[0].id == outcome.model.trial
    pruned = [trial for trial in trials if trial.state == sweep_pb2.TRIAL_STATE_PRUNED]
    for trial in pruned:
        assert 10 <= trial.metrics["step"] < 200
        assert trial.metrics["eval_loss"] > trials[0].metrics["eval_loss"]
    assert all_cpus_come_back(3)


def test_where_all_fail_the_first_root_cause_is_told(sweep):
    outcome, _, _ = sweep(
        {
            "finetune": {**FINETUNE, "hyperparameters": {"max_steps": 5, "max_length": 2}},
            "space": {"hyperparameters.learning_rate": {"uniform": {"min": 1e-4, "max": 1e-3}}},
            "trials": 1,
        }
    )
    assert outcome.state == job_pb2.JOB_STATE_FAILED
    assert outcome.end_reason == job_pb2.END_REASON_BAD_DATA
    assert outcome.error.code == "BAD_DATA"
    assert outcome.error.source.startswith("trial-0000")
    assert outcome.error.source.endswith("/rank-0")
    assert "nothing left to learn" in outcome.error.message
    assert not outcome.HasField("model")


@pytest.mark.chaos
def test_a_wish_ends_all_trials(sweep):
    def cancel_once_it_trains(coordinator):
        def wait() -> None:
            while not coordinator.of("trial-00000/rank-0", "progress"):
                time.sleep(0.1)
            coordinator.wish, coordinator.wish_reason = 1, job_pb2.END_REASON_USER

        threading.Thread(target=wait, daemon=True).start()

    outcome, _, _ = sweep(
        {
            "finetune": {**FINETUNE, "hyperparameters": {"max_steps": 100_000}},
            "space": {"hyperparameters.learning_rate": {"uniform": {"min": 1e-4, "max": 1e-3}}},
            "trials": 4,
            "max_concurrent_trials": 2,
        },
        cancel_once_it_trains,
    )
    assert outcome.state == job_pb2.JOB_STATE_CANCELLED
    assert outcome.end_reason == job_pb2.END_REASON_USER


def test_what_cannot_run_is_refused_before_a_trial_starts(sweep):
    outcome, coordinator, folder = sweep(
        {
            "finetune": FINETUNE,
            "space": {"hyperparameters.batch_size": {"choice": {"values": ["0", "8"]}}},
            "trials": 2,
        }
    )
    assert outcome.state == job_pb2.JOB_STATE_FAILED
    [violation] = outcome.error.field_violations
    assert violation.field == "job.sweep.space.hyperparameters.batch_size"
    assert violation.description.startswith("0: has to be at least 1")
    assert not coordinator.of("driver", "trial")
    assert storage.list_files(folder.as_uri()) == []
