"""Secrets reach the ranks of a sweep's trials, past all that Ray Tune writes down."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from agents import concealed
from luthier.v1 import job_pb2
from tests.integration.tuning.test_sweeps import FINETUNE

pytestmark = pytest.mark.slow

VALUE = "a-token-that-is-nowhere-else"
SAID = "fetching base model and data set"
"""What each rank says: as a secret, it shows whether the rank has the secrets."""


@pytest.fixture
def own_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(concealed, "_held", {})
    monkeypatch.setattr(concealed, "_pattern", None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    yield
    for name in ("SOME_TOKEN", "SAID"):
        os.environ.pop(name, None)


def test_a_trials_ranks_have_the_secrets_and_rays_records_have_not(sweep, own_secrets, tmp_path: Path) -> None:
    concealed.take({"SOME_TOKEN": VALUE, "SAID": SAID})
    outcome, coordinator, _ = sweep(
        {
            "finetune": FINETUNE | {"hyperparameters": {"max_steps": 2, "batch_size": 16}, "evaluation": {}},
            "space": {"hyperparameters.learning_rate": {"choice": {"values": ["1e-3"]}}},
            "algorithm": "SWEEP_ALGORITHM_GRID",
        }
    )
    assert outcome.state == job_pb2.JOB_STATE_SUCCEEDED, outcome.error
    assert f"{concealed.BLOT} to the nodes" in [phase.message for phase in coordinator.of("trial-00000/rank-0", "phase")]
    kept = "".join(str(call) for call in coordinator.calls).encode() + b"".join(records())
    assert b"TrialPlan" in kept, "this is where Ray keeps what trials are made of"
    for secret in (VALUE, SAID):
        assert secret.encode() not in kept
        assert [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []


def records() -> list[bytes]:
    """All that the cluster's store of keys and values holds."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    found = []
    for namespace in (None, b"fun", b"cls", b"job"):
        for key in _internal_kv_list(b"", namespace=namespace):
            found.append(_internal_kv_get(key, namespace=namespace) or b"")
    return found
