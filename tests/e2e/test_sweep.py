"""A sweep of four trials, two at a time, on two cores: it ends, and its best trial is registered."""

from __future__ import annotations

import pytest

from luthier.client import Client
from luthier.v1 import dataset_pb2, job_pb2, model_pb2, sweep_pb2
from tests.support.stack import spec, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_four_trials_two_at_a_time(client: Client, small_dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(
        spec(
            {
                "kind": "sweep",
                "sweep": {
                    "finetune": {
                        "base": "builtin:tiny",
                        "dataset": "colours",
                        "method": "full",
                        "output_model": "best-colours",
                        "hyperparameters": {"max_steps": 6, "batch_size": 8},
                    },
                    "space": {"hyperparameters.learning_rate": {"choice": {"values": ["1e-6", "1e-5", "1e-4", "2e-3"]}}},
                    "algorithm": "SWEEP_ALGORITHM_GRID",
                    "max_concurrent_trials": 2,
                },
            }
        )
    )
    running = wait_for(client, job.name, states=(job_pb2.JOB_STATE_RUNNING,))
    assert running.sweep.max_concurrent_trials == 2
    done = wait_for(client, job.name, seconds=600)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error

    trials = list(done.result.trials)
    assert {trial.parameters["hyperparameters.learning_rate"] for trial in trials} == {"1e-06", "1e-05", "0.0001", "0.002"}
    assert {trial.state for trial in trials} == {sweep_pb2.TRIAL_STATE_COMPLETED}
    losses = [trial.metrics["eval_loss"] for trial in trials]
    assert losses == sorted(losses)
    # Six steps at a millionth change nothing; the largest of these rates learns most.
    assert trials[0].parameters["hyperparameters.learning_rate"] == "0.002"

    assert done.result.model_version == "best-colours@1"
    request = model_pb2.GetModelVersionRequest(name="projects/default/models/best-colours/versions/1")
    version = client.models.GetModelVersion(request).model_version
    assert (version.lineage.sweep, version.lineage.trial) == (job.name, trials[0].id)
    assert version.metrics["eval_loss"] == pytest.approx(losses[0])

    events = [item.event for item in client.watch(job.name) if item.WhichOneof("item") == "event"]
    started = [
        event.message.split()[0] for event in events if event.type == job_pb2.JOB_EVENT_TYPE_TRIAL and " running" in event.message
    ]
    assert sorted(started) == sorted(trial.id for trial in trials)
    at_once = most = 0
    for event in events:
        if event.type == job_pb2.JOB_EVENT_TYPE_TRIAL:
            at_once += 1 if " running" in event.message else -1 if " completed" in event.message else 0
            most = max(most, at_once)
    assert most <= 2
