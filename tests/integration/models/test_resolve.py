"""From a name to files that every node can fetch by content."""

import json
import shutil
import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

from agents.models import hub as hub_module
from agents.models.files import choose_files
from agents.models.resolve import materialise
from common import manifest, storage
from common.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable

TAKEN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}


def test_a_model_comes_from_the_hub_pinned_to_its_commit(hub, named, model, storage_uri):
    base = materialise(named("hub", "org/small"), storage_uri)
    assert names_in(base.local_dir) == TAKEN
    assert base.revision == hub.commit("org/small")
    assert base.name == "org/small"
    assert (base.local_dir / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert set(hub.downloads()) == TAKEN
    assert manifest.verify(base.local_dir).sha256 == base.content_hash


def test_another_node_fetches_it_from_storage_alone(hub, named, storage_uri, monkeypatch, tmp_path):
    base = materialise(named("hub", "hf:org/small"), storage_uri)
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "other node"))
    fetched = len(hub.requests)
    folder = manifest.fetch(base.uri, base.content_hash)
    assert folder.is_relative_to(tmp_path / "other node")
    assert names_in(folder) == TAKEN
    again = materialise(named("hub", "org/small", uri=base.uri, content_hash=base.content_hash), storage_uri)
    assert again.local_dir == folder
    assert len(hub.requests) == fetched


def test_the_same_commit_is_not_downloaded_twice_and_a_new_one_is(hub, named, model, storage_uri, node):
    first = materialise(named("hub", "org/small"), storage_uri)
    downloads = hub.downloads()
    shutil.rmtree(node)
    assert materialise(named("hub", "org/small"), storage_uri).content_hash == first.content_hash
    assert hub.downloads() == downloads
    save_file({"w": np.zeros(7, dtype=np.float32)}, model / "model.safetensors")
    second = materialise(named("hub", "org/small"), storage_uri)
    assert second.content_hash != first.content_hash
    assert second.revision != first.revision


def test_a_model_whose_files_were_deleted_is_brought_in_again(hub, named, storage_uri):
    first = materialise(named("hub", "org/small"), storage_uri)
    manifest.delete(first.uri)
    again = materialise(named("hub", "org/small"), storage_uri)
    assert (again.uri, again.content_hash) == (first.uri, first.content_hash)
    assert manifest.read(first.uri).sha256 == first.content_hash


def test_nothing_is_left_on_the_node_but_the_artifact(hub, named, storage_uri, node):
    materialise(named("hub", "org/small"), storage_uri)
    left = {path.name for folder in ("downloads", "scratch") for path in (node / folder).glob("*")}
    assert left == set()


@pytest.mark.parametrize(
    ("name", "revision", "error", "says"),
    [
        ("org/absent", "", NotFound, "there is no model org/absent on the hub at http://127.0.0.1"),
        ("org/small", "v9", NotFound, "no revision 'v9'"),
        ("bad//name", "", InvalidArgument, "not the name of a model"),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub, named, storage_uri, name, revision, error, says):
    with pytest.raises(error, match=says):
        materialise(named("hub", name, revision=revision), storage_uri)
    assert not storage.exists(storage_uri)


def test_a_gated_model_says_what_to_do(hub, named, storage_uri):
    hub.gated.add("org/small")
    with pytest.raises(PermissionDenied, match="HF_TOKEN"):
        materialise(named("hub", "org/small"), storage_uri)


def test_no_hub_is_told_quickly(named, storage_uri, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"did not answer .* local path"):
            materialise(named("hub", "org/small"), storage_uri)


def test_a_model_of_pickles_only_is_refused_before_anything_travels(hub, named, model, storage_uri):
    (model / "model.safetensors").unlink()
    (model / "consolidated.safetensors").unlink()
    with pytest.raises(InvalidArgument, match=r"only as pytorch_model\.bin") as error:
        materialise(named("hub", "org/small"), storage_uri)
    assert error.value.reason == "UNSAFE_WEIGHTS"
    assert hub.downloads() == []


def test_a_model_that_wants_its_own_code_is_refused_before_its_weights_travel(hub, named, model, storage_uri):
    (model / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_own.Own"}}))
    with pytest.raises(InvalidArgument) as error:
        materialise(named("hub", "org/small"), storage_uri)
    assert error.value.reason == "REMOTE_CODE"
    assert "model.safetensors" not in hub.downloads()
    assert not storage.exists(storage_uri)


def test_weights_that_lie_are_refused(hub, named, model, storage_uri):
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InvalidArgument) as error:
        materialise(named("hub", "org/small"), storage_uri)
    assert error.value.reason == "BAD_SAFETENSORS"
    assert not storage.exists(storage_uri)


def test_a_local_folder_gives_the_same_artifact_as_the_hub(hub, named, model, storage_uri):
    local = materialise(named("path", str(model)), storage_uri)
    remote = materialise(named("hub", "org/small"), storage_uri)
    assert (local.uri, local.content_hash) == (remote.uri, remote.content_hash)
    assert local.revision == ""
    (model / "tokenizer.json").write_text('{"changed": 1}')
    assert materialise(named("path", str(model)), storage_uri).content_hash != local.content_hash
    assert manifest.verify(local.local_dir).sha256 == local.content_hash


def test_links_are_followed_to_the_hubs_blobs_and_nowhere_else(named, model, storage_uri, tmp_path):
    cache = tmp_path / "models--org--small"
    (cache / "blobs").mkdir(parents=True)
    shutil.copytree(model, cache / "snapshots" / "abc")
    weights = cache / "snapshots" / "abc" / "model.safetensors"
    weights.rename(cache / "blobs" / "1234")
    weights.symlink_to("../../blobs/1234")
    assert names_in(materialise(named("path", str(weights.parent)), storage_uri).local_dir) == TAKEN
    (tmp_path / "secret").write_text("{}")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidArgument, match="leaves the folder"):
        materialise(named("path", str(model)), storage_uri)


@pytest.mark.parametrize(
    ("kind", "name", "error", "says"),
    [
        ("path", "/nonexistent/model", NotFound, "no model folder at /nonexistent/model"),
        ("path", "relative/model", InvalidArgument, "not absolute"),
        ("builtin", "builtin:huge", NotFound, "there is builtin:tiny"),
        ("registry", "tickets@3", InvalidArgument, "without a uri"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(named, storage_uri, kind, name, error, says):
    with pytest.raises(error, match=says):
        materialise(named(kind, name), storage_uri)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["config.json", "model.safetensors", "model.fp16.safetensors"], ["config.json", "model.safetensors"]),
        (
            ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "consolidated.safetensors"],
            ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["config.json", "odd.safetensors", "a.model", "b.jinja", "c.msgpack"],
            ["a.model", "b.jinja", "config.json", "odd.safetensors"],
        ),
    ],
)
def test_weights_are_taken_once(names, taken):
    assert choose_files(names, "it") == taken


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model.safetensors"], "no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["config.json"], "no .safetensors weights"),
        (["config.json", "a\\..\\b.json", "model.safetensors"], "not a safe file name"),
    ],
)
def test_what_is_no_model_is_told(names, says):
    with pytest.raises(InvalidArgument, match=says):
        choose_files(names, "it")


def test_patterns_in_names_are_taken_literally():
    assert hub_module._literal("a[1]*.json") == "a[[]1][*].json"
