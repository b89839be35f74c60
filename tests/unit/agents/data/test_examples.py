"""The examples hold what they promise: unseen frames, known words, job files that are jobs."""

import collections
import csv
import importlib.util
import json
import re
import string
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format

from agents.data.recognise import recognise
from luthier.v1 import dataset_pb2, job_pb2

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.fixture(scope="module")
def tickets():
    spec = importlib.util.spec_from_file_location("examples_tickets", EXAMPLES / "tickets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tickets):
    return list(tickets.rows())


def frames(tickets, which):
    groups = [*tickets.PROBLEMS.values(), *tickets.ASIDES.values(), *tickets.URGENCY.values()]
    groups += [tickets.SETTLED, tickets.NEUTRAL, tickets.OPENERS, tickets.CLOSERS]
    return [frame for group in groups for frame in group[which] if frame]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def test_there_are_enough_tickets_of_every_category(rows):
    count = collections.Counter((row["split"], row["label"]) for row in rows)
    assert len(rows) == 2720
    assert {split: {n for (s, _), n in count.items() if s == split} for split in ("train", "test")} == {
        "train": {300},
        "test": {40},
    }
    assert len({row["label"] for row in rows}) == 8
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_answer_is_json_with_the_category_first(rows):
    for row in rows:
        answer = json.loads(row["completion"])
        assert list(answer) == ["category", "urgency"]
        assert answer["category"] == row["label"]
        assert answer["urgency"] in ("low", "normal", "high")


def test_no_frame_is_used_on_both_sides(tickets):
    assert not set(frames(tickets, 0)) & set(frames(tickets, 1))
    assert len(frames(tickets, 0)) > 130
    assert len(frames(tickets, 1)) > 55


def test_every_word_of_the_held_out_tickets_is_in_training(rows):
    known = collections.Counter(word for row in rows if row["split"] == "train" for word in words(row["prompt"]))
    held_out = {word for row in rows if row["split"] == "test" for word in words(row["prompt"])}
    assert {word for word in held_out if known[word] < 3} == set()


def test_every_slot_has_fillers(tickets):
    used = {
        name for which in (0, 1) for frame in frames(tickets, which) for _, name, _, _ in string.Formatter().parse(frame) if name
    }
    assert used == {*tickets.SLOTS, "quote"}


def test_the_tickets_are_the_same_every_time(tickets, rows, tmp_path):
    assert list(tickets.rows()) == rows
    assert tickets.write_jsonl(tmp_path / "t.jsonl") == 2720
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()] == rows


def test_the_small_table_is_the_one_that_is_made(tickets, tmp_path):
    assert tickets.write_csv(tmp_path / "t.csv") == 200
    assert (tmp_path / "t.csv").read_bytes() == (EXAMPLES / "tickets.csv").read_bytes()
    with (EXAMPLES / "tickets.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert recognise(header, {"text": "Body", "label": "Queue"}).shape == dataset_pb2.ROW_SHAPE_TEXT_LABEL


@pytest.mark.parametrize(("name", "spec"), [("finetune.yaml", "finetune"), ("sweep.yaml", "sweep")])
def test_the_job_files_are_jobs(name, spec):
    job = json_format.ParseDict(yaml.safe_load((EXAMPLES / name).read_text()), job_pb2.Job())
    assert job.WhichOneof("spec") == spec
    finetune = job.finetune if spec == "finetune" else job.sweep.finetune
    assert (finetune.base, finetune.dataset, finetune.method) == ("builtin:tiny", "tickets", "full")


def test_the_docstrings_are_real_text_in_eight_groups():
    from tests.support.docstrings import GROUPS, rows

    count = collections.Counter(group for _, group in rows())
    assert sum(count.values()) >= 2000
    assert set(count) == set(GROUPS)
    assert min(count.values()) >= 100
