"""The builtin model can be made anywhere, is always the same, and can be talked to."""

import threading
import time

import pytest

from agents.link import Link
from agents.models.builtin import END, build_tiny
from agents.models.job import run
from agents.models.resolve import materialise
from common import manifest, storage
from common.chat import template_sha256
from common.errors import InvalidArgument
from common.model_files import check_model_folder, read_chat_template
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

CHAT = [
    {"role": "user", "content": "Was ist  los?\n"},
    {"role": "assistant", "content": '{"category": "bug"}'},
    {"role": "user", "content": "☃"},
    {"role": "assistant", "content": "ok"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def test_it_is_a_model_folder_of_a_few_million_parameters(tiny):
    from transformers import AutoModelForCausalLM

    assert check_model_folder(tiny).kind == "full"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert 2e6 < model.num_parameters() < 5e6
    assert model.config.max_position_embeddings == 1024


def test_building_it_again_gives_the_same_bytes_and_touches_no_random_state(tiny, tmp_path):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    started = time.process_time()
    build_tiny(tmp_path / "again")
    assert time.process_time() - started < 60
    assert torch.equal(torch.rand(3), expected)
    assert manifest.build(tmp_path / "again") == manifest.build(tiny)
    build_tiny(tmp_path / "other", seed=1)
    assert manifest.build(tmp_path / "other") != manifest.build(tiny)


def test_text_survives_its_tokenizer(tokenizer):
    text = 'Größe\t"x" ☃\n  two  spaces, {"a": 1}'
    assert len(tokenizer) == 4096
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("Return the number of items in the list.")["input_ids"]) < 15


def test_the_template_ends_every_turn_and_opens_the_next(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert prompt == '<|user|>Was ist  los?\n<|end|><|assistant|>{"category": "bug"}<|end|><|user|>☃<|end|><|assistant|>'
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == f"{prompt}ok{END}"
    assert tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id


def test_the_template_marks_what_the_assistant_says(tokenizer):
    both = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(both["input_ids"], both["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == f'{{"category": "bug"}}{END}ok{END}'


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="role tool is not known"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_files_tell_the_template_that_the_tokenizer_uses(tiny, tokenizer):
    assert read_chat_template(tiny) == tokenizer.chat_template


def test_the_training_tickets_are_short(tokenizer):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("tickets", Path(__file__).parents[3] / "examples" / "tickets.py")
    tickets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tickets)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in tickets.rows()]
    assert max(lengths) < 80


class Recorder:
    """The part of a link that importing a model uses."""

    def __init__(self):
        self.phases, self.logs = [], []
        self.wished, self.wish_reason = threading.Event(), job_pb2.END_REASON_USER
        self.wish = agent_pb2.WISH_UNSPECIFIED

    phase = lambda self, phase, message="": self.phases.append(phase)  # noqa: E731
    log = lambda self, level, message, when=None: self.logs.append((level, message))  # noqa: E731


def claim(storage_uri, **artifact):
    return agent_pb2.ClaimRunResponse(inputs={"base": agent_pb2.Artifact(**artifact)}, storage_uri=storage_uri)


def test_importing_the_builtin_model_reports_what_to_register(storage_uri, node, tmp_path, monkeypatch):
    assert all(hasattr(Link, name) for name in ("phase", "log"))
    link = Recorder()
    outcome = run(link, claim(storage_uri, kind="builtin", name="builtin:tiny"))
    model = outcome.model
    assert outcome.state == job_pb2.JOB_STATE_SUCCEEDED
    assert (model.model_kind, model.base.name, model.base.content_hash) == ("full", "builtin:tiny", model.content_hash)
    assert model.uri == storage.join(storage_uri, "bases", model.content_hash)
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "elsewhere"))
    folder = manifest.fetch(model.uri, model.content_hash)
    assert model.size_bytes == manifest.verify(folder).size_bytes
    assert model.chat_template_sha256 == template_sha256(read_chat_template(folder))
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(node))
    started = time.monotonic()
    assert materialise(agent_pb2.Artifact(kind="builtin", name="builtin:tiny"), storage_uri).uri == model.uri
    assert time.monotonic() - started < 5  # built once a node


def test_a_model_without_a_chat_template_is_imported_with_a_warning(storage_uri, model):
    (model / "tokenizer_config.json").write_text("{}")
    link = Recorder()
    outcome = run(link, claim(storage_uri, kind="path", name=str(model)))
    assert outcome.model.chat_template_sha256 == ""
    assert link.logs[0][0] == "warning"


def test_a_run_without_a_model_says_so(storage_uri):
    with pytest.raises(InvalidArgument, match="no model to import"):
        run(Recorder(), agent_pb2.ClaimRunResponse(storage_uri=storage_uri))
