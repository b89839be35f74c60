"""Only data that is what it says it is passes as a model."""

import json
import struct

import pytest

from common.errors import InvalidArgument
from common.model_files import check_model_folder


def safetensors(header, data=b"", length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(safetensors(GOOD, bytes(24)))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def refusal(folder):
    with pytest.raises(InvalidArgument) as error:
        check_model_folder(folder)
    return error.value


def test_a_whole_model_passes(folder):
    found = check_model_folder(folder)
    assert (found.kind, found.files) == ("full", ("config.json", "model.safetensors", "tokenizer.json"))


def test_an_adapter_passes(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert check_model_folder(folder).kind == "adapter"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT", "x.pkl", "sub/a.ckpt", "w.h5", "optimizer.pth"])
def test_weights_that_may_run_code_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    error = refusal(folder)
    assert error.reason == "UNSAFE_WEIGHTS"
    assert name in error.message
    assert "save_pretrained" in error.message


def test_code_is_refused(folder):
    (folder / "modeling_x.py").write_text("print('canary')")
    assert refusal(folder).reason == "REMOTE_CODE"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_configuration_that_asks_for_code_is_refused(folder, name):
    (folder / name).write_text(json.dumps({"nested": [{"auto_map": {"AutoModel": "modeling_x.X"}}]}))
    error = refusal(folder)
    assert error.reason == "REMOTE_CODE"
    assert name in error.message


def test_a_token_called_auto_map_is_no_code(folder):
    (folder / "vocab.json").write_text('{"auto_map": 17}')
    assert check_model_folder(folder).kind == "full"


def test_a_link_is_refused(folder):
    (folder / "link.json").symlink_to("/etc/passwd")
    assert refusal(folder).reason == "UNSAFE_PATH"


def test_a_folder_without_model_or_weights_is_told(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert refusal(folder).reason == "NO_SAFETENSORS"
    (folder / "config.json").unlink()
    assert refusal(folder).reason == "NOT_A_MODEL"
    assert "no model folder" in refusal(tmp_path / "absent").message


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "\xff"])
def test_a_configuration_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).reason == "BAD_CONFIG"


def test_a_shard_missing_from_the_index_is_told(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002" in refusal(folder).message


def changed(tensor="a", **fields):
    return {**GOOD, tensor: {**GOOD[tensor], **fields}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "too short"),
        (safetensors(GOOD, bytes(24), length=2**62), "says its header has"),
        (safetensors(GOOD, bytes(24), length=2**63 + 5), "says its header has"),
        (safetensors(b"{not json"), "not JSON"),
        (safetensors(b"[" * 100_000), "not JSON"),
        (safetensors(b"[]"), "not a JSON object"),
        (safetensors({"__metadata__": {"format": "pt"}}), "no tensors"),
        (safetensors(GOOD, bytes(23)), "24"),
        (safetensors(GOOD, bytes(999)), "999"),
        (safetensors(changed(dtype="F128"), bytes(24)), "unknown dtype"),
        (safetensors(changed(dtype="F64"), bytes(24)), "bytes its shape and dtype say"),
        (safetensors(changed(shape=[2**40, 2**40]), bytes(24)), "bytes its shape and dtype say"),
        (safetensors(changed(shape=[-2, -2]), bytes(24)), "bad shape"),
        (safetensors(changed(shape=[True, 4]), bytes(24)), "bad shape"),
        (safetensors(changed("b", data_offsets=[8, 16]), bytes(24)), "overlaps"),
        (safetensors(changed("b", data_offsets=[17, 25]), bytes(25)), "gap"),
        (safetensors(changed(data_offsets=[16, 0]), bytes(24)), "bad shape"),
        (safetensors(changed(data_offsets=[0]), bytes(24)), "lacks"),
        (safetensors({"a": 5}, bytes(24)), "lacks"),
        (safetensors({"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}, bytes(4)), "dtype"),
    ],
)
def test_a_header_that_lies_is_refused(folder, data, says):
    (folder / "model.safetensors").write_bytes(data)
    error = refusal(folder)
    assert error.reason == "BAD_SAFETENSORS"
    assert says in error.message
