"""A secret reaches the processes of a job on Ray, and nothing that Ray or the store shows has it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from luthier.client import Client
from luthier.v1 import dataset_pb2, job_pb2
from tests.support.hub_server import Hub
from tests.support.stack import Stack, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VALUE = "hf_a-token-that-is-nowhere-else"


def ray_says(stack: Stack, path: str) -> str:
    address = stack.status["ray"]["address"]
    token = (stack.home / "ray" / "token").read_text().strip()
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def test_a_private_model_is_fetched_with_a_secret_and_the_secret_is_seen_nowhere(
    stack: Stack, client: Client, hub: Hub, small_dataset: dataset_pb2.DatasetVersion, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    code = f"from pathlib import Path; from agents.models.builtin import build_tiny; build_tiny(Path({str(folder)!r}), seed=8)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    hub.repositories["acme/private"] = folder
    hub.tokens["acme/private"] = VALUE
    (tmp_path / "value").write_text(VALUE + "\n")
    stack.cli("secret", "set", "hub", "--from-file", str(tmp_path / "value"))
    refused = stack.cli("model", "import", "acme/private", "--name", "private", check=False)
    assert refused.returncode == 3
    assert "HF_TOKEN" in refused.stderr
    train = ("train", "--base", "hf:acme/private", "--dataset", "colours", "--method", "lora", "--max-steps", "2", "--no-eval")
    shown = json.loads(stack.cli(*train, "--secret", "HF_TOKEN=hub", "--output", "json").stdout)
    job = wait_for(client, shown["name"])
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    assert dict(job.secrets) == {"HF_TOKEN": "hub"}
    assert job.usage.trained_tokens == job.result.metrics["train_tokens"] > 0
    assert VALUE in hub.shown
    for path in ("/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/workers?detail=1"):
        assert VALUE not in ray_says(stack, path), path
    assert job.uid in ray_says(stack, "/api/jobs/")
    files = [path for path in stack.home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert [path for path in files if VALUE.encode() in path.read_bytes()] == []
