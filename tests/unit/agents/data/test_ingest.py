"""A file becomes a version, and its content decides everything about it."""

import csv
import io
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agents.data import ingest as ingest_module
from common import manifest
from common.errors import FailedPrecondition, InvalidArgument
from common.rows import Row, content_hash, read_split
from luthier.v1 import dataset_pb2

TICKETS = [
    {"text": f'Printer {n} says "paper, jam"\nin tray {n % 3}', "label": ["hardware", "billing", "other"][n % 3]}
    for n in range(60)
]


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def rows_of(version, split):
    return read_split(manifest.fetch(version.uri, version.content_hash) / f"{split}.parquet")


def test_rows_arrive_as_they_were_written(take, jsonl):
    version = take("tickets.jsonl", jsonl(TICKETS))
    assert version.row_count == 60
    assert version.schema.shape == dataset_pb2.ROW_SHAPE_TEXT_LABEL
    assert list(version.schema.labels) == ["billing", "hardware", "other"]
    assert {s.name: s.row_count for s in version.splits} == {"train": 54, "test": 6}
    there = rows_of(version, "train") + rows_of(version, "test")
    assert sorted((row.prompt, row.completion, row.label) for row in there) == sorted(
        (ticket["text"], ticket["label"], ticket["label"]) for ticket in TICKETS
    )
    assert all(TICKETS[row.line - 1]["text"] == row.prompt for row in there)
    for split in version.splits:
        assert split.content_hash == content_hash(rows_of(version, split.name))
    assert dict(version.report.label_counts) == {"billing": 20, "hardware": 20, "other": 20}


def test_the_content_hash_does_not_know_the_format(take, jsonl, tmp_path):
    renamed = [{"Body": ticket["text"], "Queue": ticket["label"]} for ticket in TICKETS]
    versions = [
        take("a.jsonl", jsonl(TICKETS)),
        take("b.csv", as_csv(TICKETS)),
        take("c.parquet", as_parquet(TICKETS, tmp_path / "p")),
        take("d.csv", "\ufeff" + as_csv(renamed).replace("\r\n", "\n"), columns={"text": "Body", "label": "Queue"}),
        take("e", jsonl(TICKETS)),
        take("f", as_csv(TICKETS)),
        take("g", as_parquet(TICKETS, tmp_path / "p")),
    ]
    assert len({version.content_hash for version in versions}) == 1
    assert len({version.uri for version in versions}) == 1
    assert dict(versions[3].schema.columns) == {"text": "Body", "label": "Queue"}


def test_the_order_of_rows_does_not_move_them_between_splits(take, jsonl):
    first = take("a.jsonl", jsonl(TICKETS), test_fraction=0.3)
    shuffled = random.Random(1).sample(TICKETS, len(TICKETS))
    second = take("a.jsonl", jsonl(shuffled), test_fraction=0.3)
    held = [{row.prompt for row in rows_of(version, "test")} for version in (first, second)]
    assert held[0] == held[1]
    assert len(held[0]) == 18
    other_seed = take("a.jsonl", jsonl(TICKETS), test_fraction=0.3, split_seed=43)
    assert {row.prompt for row in rows_of(other_seed, "test")} != held[0]
    assert other_seed.content_hash != first.content_hash


def test_rows_that_repeat_stay_together(take, jsonl):
    version = take("a.jsonl", jsonl(TICKETS * 3), test_fraction=0.5)
    train, test = ({row.prompt for row in rows_of(version, split)} for split in ("train", "test"))
    assert not train & test
    assert {s.name: s.row_count for s in version.splits} == {"train": 90, "test": 90}
    assert version.report.duplicate_rows == 120
    assert any("120 rows repeat" in warning for warning in version.report.warnings)


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"), [(2, 0.01, [1, 1]), (20, 0.1, [2, 18]), (1, 0.5, [1]), (20, 0.0, [20])]
)
def test_the_part_held_out_is_exact_and_never_all(take, jsonl, rows, fraction, expected):
    version = take("a.jsonl", jsonl(TICKETS[:rows]), test_fraction=fraction)
    assert [split.row_count for split in version.splits] == expected
    warned = any("held out" in warning for warning in version.report.warnings)
    assert warned == (len(expected) == 1)


def test_a_split_column_is_respected(take, jsonl):
    rows = [{**ticket, "split": ["train", "Test", "extra"][n % 3]} for n, ticket in enumerate(TICKETS)]
    version = take("a.jsonl", jsonl(rows), test_fraction=0.5)
    assert {s.name: s.row_count for s in version.splits} == {"extra": 20, "test": 20, "train": 20}
    assert [row.prompt for row in rows_of(version, "test")] == [ticket["text"] for ticket in TICKETS[1::3]]


def test_rows_of_test_that_are_in_train_too_are_reported(take, jsonl):
    rows = [{**ticket, "split": split} for split in ("train", "test") for ticket in TICKETS[: 60 if split == "train" else 7]]
    version = take("a.jsonl", jsonl(rows))
    assert any("7 rows of test are in train too" in warning for warning in version.report.warnings)


def test_a_label_that_train_lacks_is_reported(take, jsonl):
    rows = [{"text": "a", "label": "x", "split": "train"}, {"text": "b", "label": "new", "split": "test"}]
    warnings = take("a.jsonl", jsonl(rows)).report.warnings
    assert any("labels that train lacks: 'new'" in warning for warning in warnings)
    assert any("fewer than 5 rows" in warning for warning in warnings)


def test_no_train_rows_is_refused(take, jsonl, datasets):
    with pytest.raises(InvalidArgument, match="no row is in the split train; the splits are test"):
        take("a.jsonl", jsonl([{"text": "a", "label": "x", "split": "test"}]))
    assert not datasets.exists()


def test_chats_and_completions_with_labels_are_kept(take, jsonl):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    version = take("a.jsonl", jsonl([{"messages": chat}, {"messages": shared}]), test_fraction=0)
    first, second = rows_of(version, "train")
    assert [(m.role, m.content) for m in first.messages] == [(m["role"], m["content"]) for m in chat]
    assert [m.role for m in second.messages] == ["user", "assistant"]
    in_csv = take("a.csv", as_csv([{"messages": json.dumps(chat)}, {"messages": json.dumps(shared)}]), test_fraction=0)
    assert in_csv.content_hash == version.content_hash
    pair = take("a.jsonl", jsonl([{"prompt": "p", "completion": '{"c": 1}', "label": 7}]))
    assert rows_of(pair, "train") == [Row(prompt="p", completion='{"c": 1}', label="7", line=1)]


def test_a_version_is_a_whole_artifact(take, jsonl):
    version = take("a.jsonl", jsonl(TICKETS))
    folder = manifest.fetch(version.uri)
    assert folder == manifest.fetch(version.uri, version.content_hash)
    assert set(manifest.verify(folder).files) == {"train.parquet", "test.parquet", "dataset.json"}
    assert json.loads((folder / "dataset.json").read_text())["content_hash"] == version.content_hash
    with pytest.raises(FailedPrecondition, match="was expected"):
        manifest.fetch(version.uri, "0" * 64)


def test_nothing_is_left_in_the_scratch_folder(take, jsonl, tmp_path):
    take("a.jsonl", jsonl(TICKETS))
    with pytest.raises(InvalidArgument):
        take("a.jsonl", "{")
    assert not list((tmp_path / "node" / "scratch").iterdir())


def run_program(request, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "agents.data.ingest"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={"LUTHIER_NODE_HOME": str(tmp_path / "node"), "PATH": ""},
        cwd=ingest_module.__file__.rsplit("/", 3)[0],
    )
    return done, json.loads(done.stdout)


def test_the_program_answers_with_one_json_document(tmp_path, jsonl, datasets):
    staged = tmp_path / "upload"
    staged.write_text(jsonl(TICKETS))
    request = {"staged_path": str(staged), "filename": "t.jsonl", "format": "", "columns": {}, "out_uri": datasets.as_uri()}
    done, answer = run_program({**request, "test_fraction": None}, tmp_path)
    assert (done.returncode, answer["row_count"], answer["source_filename"]) == (0, "60", "t.jsonl")
    for heavy in ("torch", "ray", "transformers"):
        assert f"| {heavy}\n" not in done.stderr
    staged.write_text("{\n")
    done, answer = run_program(request, tmp_path)
    assert done.returncode == 2
    assert answer["error"]["reason"] == "BAD_ROWS"
    assert answer["error"]["violations"][0]["field"] == "line 1"
    done, answer = run_program({**request, "test_fraction": 0.9}, tmp_path)
    assert (done.returncode, answer["error"]["violations"][0]["field"]) == (2, "test_fraction")
    done, answer = run_program({**request, "staged_path": "/nonexistent"}, tmp_path)
    assert (done.returncode, answer["error"]["reason"]) == (1, "INTERNAL")
