"""Estimates: memory by hand-made arithmetic, duration from what earlier runs took, the queue from the very scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from common import storage
from coordinator import registry
from coordinator.cluster.ray_cluster import Capacity
from coordinator.estimates import duration, memory
from coordinator.estimates.estimate import estimate
from coordinator.jobs import records
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import fill_in
from coordinator.jobs.states import State
from coordinator.scheduling.model import Demand, Node
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import dataset_pb2, estimate_pb2, job_pb2, model_pb2
from tests.support.job_runs import set_columns

NewJob = Callable[..., tables.Job]
GB = 10**9
LLAMA_8B = memory.Model(parameters=8_030_000_000, hidden=4096, layers=32, intermediate=14336, key_value=1024)
FULL = memory.Setup(workers=8, zero_stage=3, batch_size=1, gradient_accumulation=1, length=2048, bf16=True, gpu=True)


def states(setup: memory.Setup) -> dict[str, float]:
    """Gigabytes of the model's states."""
    found = memory.parts(LLAMA_8B, setup)
    return {name: round(found[name] / GB, 2) for name in ("parameters", "gradients", "optimizer")}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # 2, 2 and 12 bytes a parameter (figure 1 of the ZeRO paper), shared by 8 where the stage shares them.
        (0, {"parameters": 16.06, "gradients": 16.06, "optimizer": 96.36}),
        (1, {"parameters": 16.06, "gradients": 16.06, "optimizer": 12.04}),
        (2, {"parameters": 16.06, "gradients": 2.01, "optimizer": 12.04}),
        (3, {"parameters": 2.01, "gradients": 2.01, "optimizer": 12.04}),
    ],
)
def test_states_of_a_full_fine_tune_by_stage(stage: int, expected: dict[str, float]) -> None:
    assert states(replace(FULL, zero_stage=stage)) == expected


def test_an_adapter_alone_has_gradients_and_moments() -> None:
    # Rank 16 on q, k, v, o, gate, up and down of 32 layers: 41,943,040 parameters (as PEFT counts them for Llama-3-8B).
    assert LLAMA_8B.adapter(16) == 41_943_040
    found = memory.parts(LLAMA_8B, replace(FULL, lora_rank=16, workers=1, zero_stage=0))
    assert found["gradients"] == 2 * 41_943_040
    assert found["optimizer"] == 12 * 41_943_040
    assert found["parameters"] == 2 * (8_030_000_000 + 41_943_040)


def test_activations_grow_with_tokens_layers_and_width() -> None:
    # 34 bytes for each of 1 x 2048 tokens, 4096 units and 32 layers; twice that in 32 bits.
    one = memory.parts(LLAMA_8B, FULL)["activations"]
    assert one == 34 * 2048 * 4096 * 32
    assert memory.parts(LLAMA_8B, replace(FULL, bf16=False, batch_size=3))["activations"] == 6 * one


def test_advice_is_what_would_fit() -> None:
    tight = replace(FULL, zero_stage=0, workers=2, batch_size=8)
    found = memory.advice(LLAMA_8B, tight, 145 * GB, adapters=True)
    assert found[0] == "hyperparameters.batch_size=1 hyperparameters.gradient_accumulation=8"
    assert memory.advice(LLAMA_8B, replace(FULL, workers=1, zero_stage=2), 60 * GB, adapters=True) == ["method=lora", "workers=4"]
    assert memory.advice(LLAMA_8B, FULL, 1 * GB, adapters=True) == []


def test_a_config_is_read_or_found_wanting() -> None:
    config = {
        **{"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16"},
    }
    assert memory.Model.of(config, 16_060_000_000) == LLAMA_8B
    assert memory.Model.of({"text_config": config}, 16_060_000_000) == LLAMA_8B
    assert memory.Model.of(config | {"torch_dtype": None}, 16_060_000_000) is None
    assert memory.Model.of({}, 1) is None


def test_steps_are_counted_as_the_trainer_counts_them() -> None:
    assert duration.steps(1000, 3, 0, 8, 1, 2) == 189
    assert duration.steps(1000, 0.5, 0, 8, 4, 2) == 8
    assert duration.steps(1000, 3, 7, 8, 1, 2) == 7
    assert duration.steps(1, 1, 0, 8, 4, 2) == 1


@pytest.fixture
def rows(store: Store) -> None:
    version = dataset_pb2.DatasetVersion(content_hash="c", uri="mem://rows")
    version.splits.add(name="train", row_count=800)
    store.write_now(lambda session: registry.add_dataset_version(session, "default", "tickets", version, "m", "", ""))


def wanted(**fields: object) -> job_pb2.Job:
    spec = {"base": "builtin:tiny", "dataset": "tickets@1", "method": "full", "workers": 1, "output_model": "m"}
    job = job_pb2.Job(finetune=spec, **fields)  # type: ignore[arg-type]
    fill_in(job, cluster_has_gpus=False)
    return job


BUILTIN = Resolved(inputs={"base": agent_pb2.Artifact(name="builtin:tiny", kind="builtin")})
CLUSTER = Capacity((Node("n", Demand(4, 0)),), {"n": 8 * GB})


def ran(store: Store, job: tables.Job, steps: int, train: float, whole: float) -> None:
    end = tables.now()
    metrics = {"train_steps": steps, "train_seconds": train}
    set_columns(
        store, job, state="SUCCEEDED", run=1, start_time=end - timedelta(seconds=whole), end_time=end, result={"metrics": metrics}
    )


async def test_without_a_cluster_and_without_a_past_it_says_what_nobody_knows(store: Store, rows: None) -> None:
    found = await estimate(store, "default", wanted(), BUILTIN, None)
    assert (found.memory.fit, found.memory.reason) == (estimate_pb2.FIT_UNKNOWN, "the Ray cluster does not answer")
    assert found.memory.bytes > 900 * 2**20
    assert not found.duration.HasField("expected")
    assert "has succeeded yet" in found.duration.reason
    assert found.duration.steps == 300  # three passes over 800 rows by eights
    assert found.queue.waiting_for.startswith("the Ray cluster to answer")


async def test_earlier_runs_of_the_same_kind_tell_the_duration(store: Store, rows: None, new_job: NewJob) -> None:
    for train, whole in ((100.0, 140.0), (200.0, 220.0), (300.0, 330.0)):
        ran(store, new_job(), 100, train, whole)
    ran(store, new_job(workers=2), 100, 9.0, 9.0)  # of another kind
    found = (await estimate(store, "default", wanted(), BUILTIN, CLUSTER)).duration
    # 300 steps: 40 + 300 x 1, 20 + 300 x 2, 30 + 300 x 3 seconds.
    assert (found.runs, found.expected.seconds) == (3, 620)
    assert (found.low.seconds, found.high.seconds) == (480, 775)
    assert found.cpu_seconds == pytest.approx(620 * 1.25)


async def test_the_queue_is_the_schedulers_own_and_nothing_is_recorded(store: Store, rows: None, new_job: NewJob) -> None:
    found = await estimate(store, "default", wanted(), BUILTIN, CLUSTER)
    assert (found.memory.fit, found.queue.starts_at_once) == (estimate_pb2.FIT_FITS, True)
    for _ in range(2):
        ahead = new_job(workers=3)
        store.write_now(lambda session, uid=ahead.uid: records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_WARNING, "x"))  # type: ignore[misc]
    found = await estimate(store, "default", wanted(priority=-5), BUILTIN, CLUSTER)
    assert (found.queue.starts_at_once, found.queue.position) == (False, 2)
    assert found.queue.waiting_for.startswith("its turn")
    urgent = await estimate(store, "default", wanted(priority=5), BUILTIN, CLUSTER)
    assert urgent.queue.starts_at_once
    assert {job.state for job in store.read_now(lambda session: [session.get_one(tables.Job, ahead.uid)])} == {State.QUEUED}


async def test_what_does_not_fit_is_told_with_what_would(store: Store, rows: None, tmp_path: Path) -> None:
    folder = tmp_path.as_uri()
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "dtype": "float32"}
    storage.write_bytes(storage.join(folder, "config.json"), json.dumps(config).encode())
    version = model_pb2.ModelVersion(content_hash="c", artifact_uri=folder, size_bytes=4 * 7_000_000_000)
    store.write_now(lambda session: registry.add_model_version(session, "default", "seven", version))
    base = agent_pb2.Artifact(name="seven@1", kind="registry", uri=folder, content_hash="c", model_kind="full")
    resolved = Resolved(inputs={"base": base})
    big = Capacity((Node("n", Demand(4, 0)),), {"n": 100 * GB})
    found = (await estimate(store, "default", wanted(), resolved, big)).memory
    assert found.fit == estimate_pb2.FIT_DOES_NOT_FIT
    assert found.available_bytes == 100 * GB
    assert found.parts["parameters"] == 4 * 7_000_000_000
    assert "method=lora" in found.advice
    lora = wanted()
    lora.finetune.method = "lora"
    lora.finetune.hyperparameters.batch_size = 1
    assert (await estimate(store, "default", lora, resolved, big)).memory.fit == estimate_pb2.FIT_FITS
    storage.delete_file(storage.join(folder, "config.json"))
    gone = (await estimate(store, "default", wanted(), resolved, big)).memory
    assert gone.fit == estimate_pb2.FIT_UNKNOWN
    assert gone.reason.startswith("the config.json of seven@1 cannot be read")


async def test_a_hubs_model_is_not_guessed_at(store: Store, rows: None) -> None:
    hub = Resolved(inputs={"base": agent_pb2.Artifact(name="hf:org/name", kind="hub")})
    found = (await estimate(store, "default", wanted(), hub, CLUSTER)).memory
    assert (found.fit, found.bytes) == (estimate_pb2.FIT_UNKNOWN, 0)
    assert "luthier model import" in found.reason


def test_a_reference_generation_pairs_and_four_bits_are_counted() -> None:
    plain = memory.parts(LLAMA_8B, FULL)
    found = memory.parts(LLAMA_8B, replace(FULL, reference=True, generates=True))
    assert found["reference"] == plain["parameters"]
    # Keys and values of 2048 tokens, 1024 wide in 32 layers, in 16 bits.
    assert found["generation"] == 2 * 2 * 2048 * 1024 * 32
    assert memory.parts(LLAMA_8B, replace(FULL, sequences=2))["activations"] == 2 * plain["activations"]
    lora = replace(FULL, lora_rank=16, workers=1, zero_stage=0)
    saved = memory.parts(LLAMA_8B, lora)["parameters"] - memory.parts(LLAMA_8B, replace(lora, four_bits=True))["parameters"]
    assert saved == pytest.approx((2 - 4.127 / 8) * LLAMA_8B.parameters, rel=1e-6)
