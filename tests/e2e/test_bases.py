"""Bases that are not built in: from a hub, and from a folder of the user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from luthier.client import Client
from luthier.v1 import dataset_pb2, job_pb2, model_pb2
from tests.support.hub_server import Hub
from tests.support.stack import Stack, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in a folder, made on the spot."""
    path = tmp_path_factory.mktemp("base") / "model"
    code = f"from pathlib import Path; from agents.models.builtin import build_tiny; build_tiny(Path({str(path)!r}), seed=7)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    return path


def test_a_model_of_a_hub_is_imported_at_its_revision(stack: Stack, client: Client, hub: Hub, folder: Path) -> None:
    hub.repositories["acme/tiny"] = folder
    imported = stack.cli("model", "import", "acme/tiny", "--name", "from-hub", "--output", "json")
    assert json.loads(imported.stdout)
    name = "projects/default/models/from-hub/versions/1"
    version = client.models.GetModelVersion(model_pb2.GetModelVersionRequest(name=name)).model_version
    assert version.lineage.base_revision == hub.commit("acme/tiny")
    unknown = stack.cli("model", "import", "acme/nothing", "--name", "x", check=False)
    assert unknown.returncode == 3
    assert "there is no model 'acme/nothing' on the hub" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_a_folder_of_ones_own_is_uploaded_trained_on_and_found_in_the_lineage(
    stack: Stack, client: Client, small_dataset: dataset_pb2.DatasetVersion, folder: Path
) -> None:
    shown = stack.cli(
        *("train", "--base", str(folder), "--dataset", "colours", "--method", "lora", "--rank", "4", "--max-steps", "3"),
        *("--output-model", "own", "--no-eval", "--output", "json"),
    )
    job = wait_for(client, json.loads(shown.stdout)["name"])
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    name = "projects/default/models/own/versions/1"
    version = client.models.GetModelVersion(model_pb2.GetModelVersionRequest(name=name)).model_version
    assert version.kind == model_pb2.MODEL_KIND_ADAPTER
    assert version.base_artifact_uri
    nodes = client.models.GetLineage(model_pb2.GetLineageRequest(name=name)).nodes
    assert [node.kind for node in nodes if "/models/" in node.name] == ["model", "model"]

    # Its base is served, and it on top: the adapter is tried on the replica before it answers.
    stack.cli("endpoint", "deploy", "own", "--model", "own@1", "--cpus", "0.2", "--wait", "--timeout", "180")
    answer = httpx.post(
        f"{stack.gateway_url}/chat/completions",
        json={"model": "own", "messages": [{"role": "user", "content": "red"}], "max_tokens": 4},
        headers={"authorization": f"Bearer {stack.token}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["system_fingerprint"].endswith(f"-{version.content_hash[:12]}")
    stack.cli("endpoint", "delete", "own", "--wait")
