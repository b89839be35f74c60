import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from luthier.agent.v1 import agent_pb2
from tests.support.hub_server import serve

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    """A node of one's own."""
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def storage_uri(tmp_path):
    return (tmp_path / "storage").as_uri()


@pytest.fixture
def model(tmp_path):
    """A folder with everything a model on a hub has, also what must not be taken."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    save_file({"w": np.arange(6000, dtype=np.float32)}, folder / "model.safetensors")
    save_file({"w": np.arange(6000, dtype=np.float32)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit('canary')")
    (folder / "README.md").write_text("read me")
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(model, monkeypatch):
    with serve({"org/small": model}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def named():
    """An artifact by kind and name."""
    return lambda kind, name, **fields: agent_pb2.Artifact(kind=kind, name=name, **fields)
