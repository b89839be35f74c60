"""A replica compares the chat template that it loads with the one on record before it answers anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import manifest
from common.chat import template_sha256
from common.errors import FailedPrecondition
from common.model_files import read_chat_template
from serving.replica import ModelReplica
from serving.wire import ModelArgs


@pytest.fixture
def uri(micro_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))
    uri = (tmp_path / "storage").as_uri()
    manifest.publish(micro_llama, uri)
    return uri


def test_a_replica_starts_with_the_template_on_record(uri: str, micro_llama: Path) -> None:
    recorded = template_sha256(read_chat_template(micro_llama))
    ModelReplica(ModelArgs(uri, device="cpu", chat_template_sha256=recorded)).check_health()


def test_a_replica_does_not_start_with_another_template(uri: str) -> None:
    with pytest.raises(FailedPrecondition, match="not be those that it was trained on") as caught:
        ModelReplica(ModelArgs(uri, device="cpu", chat_template_sha256=template_sha256("another")))
    assert caught.value.reason == "CHAT_TEMPLATE_CHANGED"
