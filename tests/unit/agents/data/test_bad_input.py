"""Every kind of bad file gets an error that says where, and publishes nothing."""

import contextlib
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agents.data import readers
from common.errors import InvalidArgument

GOOD = '{"text": "a", "label": "x"}\n'
LONE = '{"text": "\\ud800", "label": "x"}\n'


def refused(take, filename, content, **options):
    with pytest.raises(InvalidArgument) as error:
        take(filename, content, **options)
    return error.value


def places(error):
    return [violation.field for violation in error.violations]


@pytest.fixture(autouse=True)
def _nothing_published(datasets):
    yield
    assert not datasets.exists()


@pytest.mark.parametrize(
    ("line", "field", "says"),
    [
        (b'{"text": "a", "label": \n', "line 2", "not JSON"),
        (b'{"text": "a", "la', "line 2", "cut off"),
        (b'{"text": "\xff", "label": "x"}\n', "line 2", "not UTF-8 (byte 0xff at position 10)"),
        (b"[1, 2]\n", "line 2", "a list, not a JSON object"),
        (b'"x"\n', "line 2", "text, not a JSON object"),
        (b'{"text": NaN, "label": "x"}\n', "line 2", "NaN is not a JSON value"),
        (b"[" * 100_000 + b"\n", "line 2", "nested deeper than 32"),
        (b'{"text":' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}\n", "line 2", "nested deeper than 32"),
        (b'{"text": ' + b"1" * 5000 + b"}\n", "line 2", "not JSON"),
        (b'{"label": "x"}\n', "line 2 column text", "is missing"),
        (b'{"text": null, "label": "x"}\n', "line 2 column text", "is missing"),
        (b'{"text": 5, "label": "x"}\n', "line 2 column text", "a number, not text"),
        (b'{"text": {"a": 1}, "label": "x"}\n', "line 2 column text", "an object, not text; write it as a JSON string"),
        (b'{"text": " \\n", "label": "x"}\n', "line 2 column text", "is empty"),
        (b'{"text": "a", "label": ""}\n', "line 2 column label", "is empty"),
        (b'{"text": "a", "label": 1.5}\n', "line 2 column label", "a number, not text"),
        (b'{"text": "a", "label": "' + b"y" * 300 + b'"}\n', "line 2 column label", "longer than 256"),
        (LONE.encode(), "line 2 column text", "lone surrogate"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(take, line, field, says):
    error = refused(take, "a.jsonl", GOOD.encode() + line)
    assert places(error) == [field]
    assert says in error.violations[0].description
    assert field in error.message


def test_blank_lines_count_but_are_no_rows(take):
    assert places(refused(take, "a.jsonl", GOOD + "\n  \n{")) == ["line 4"]


def test_all_bad_rows_are_named_up_to_twenty(take):
    error = refused(take, "a.jsonl", GOOD + "{\n" * 3 + GOOD + '{"text": 1, "label": 1.5}\n')
    assert places(error) == ["line 2", "line 3", "line 4", "line 6 column text", "line 6 column label"]
    assert "5 problems" in error.message
    error = refused(take, "a.jsonl", GOOD + "{\n" * 500)
    assert len(error.violations) == 20
    assert "at least 20" in error.message


def test_brackets_in_a_text_are_no_nesting():
    row = {"text": "[" * 500 + '\\"' + "{" * 500, "label": "x"}
    assert readers.parse_json(json.dumps(row)) == row


def test_an_endless_line_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.write(GOOD.encode())
        file.truncate(2**26)
        file.seek(0, io.SEEK_END)
        file.write(b"\n{\n")
    tracemalloc.start()
    items = list(readers.open_source(tmp_path / "large.jsonl", "large.jsonl").rows([]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.place for item in items] == ["line 1", "line 2", "line 3"]
    assert "longer than 1 MiB" in items[1].description
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("filename", "content", "says"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.csv", b"\n\n", "no header"),
        ("a.csv", b"\xff\xfet\x00", "UTF-16"),
        ("a.csv", b"te\xffxt,label\na,b\n", "line 1, the header, is not UTF-8"),
        ("a.csv", b"text,label,text\na,b,c\n", "'text' twice"),
        ("a.parquet", b"PAR1 not really", "not Parquet, or damaged"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "compressed"),
        ("a.json", b'[{"text": "a"}]', "write JSONL instead"),
        ("a.jsonl", b"{}\n{}\n", "cannot tell what the rows are"),
        ("a.xlsx", b"PK\x03\x04", "compressed"),
    ],
)
def test_a_file_without_rows_is_told(take, filename, content, says):
    assert says in refused(take, filename, content).message


def test_an_unknown_format_is_told(take):
    assert "use one of jsonl, csv, parquet" in refused(take, "a", GOOD, format="xml").message


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"a,x\nb\n", "line 3", "has 1 cell where the header has 2"),
        (b"a,x\nb,y,z\n", "line 3", "has 3 cells where the header has 2 (put text"),
        (b'a,x\n"b,y\nc,z\n', "line 3", "opens a quote that is not closed by line 4"),
        (b'a,x\n"b"c,y\n', "line 3", "is not CSV"),
        (b"a,x\n\xe9,y\n", "line 3", "not UTF-8"),
        (b'"a\nb",x\n,y\n', "line 4 column text", "is empty"),
    ],
)
def test_a_bad_row_of_csv_is_named_by_its_line(take, body, field, says):
    error = refused(take, "a.csv", b"text,label\n" + body)
    assert places(error) == [field]
    assert says in error.violations[0].description


def test_csv_with_byte_order_mark_semicolons_and_unnamed_index_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeff;text;label\r\n0;a, b;x\r\n".encode())
    source = readers.open_source(path, "a.csv")
    assert source.columns == ["text", "label"]
    (row,) = source.rows([])
    assert (row.values["text"], row.values["label"], row.place) == ("a, b", "x", "line 2")


def parquet(table):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def test_a_bad_row_of_parquet_is_named_by_its_row(take):
    table = pa.table({"text": ["a", None, "c"], "label": ["x", "y", " "]})
    error = refused(take, "a.parquet", parquet(table))
    assert places(error) == ["row 2 column text", "row 3 column label"]


def test_a_damaged_parquet_file_is_told(take):
    data = bytearray(parquet(pa.table({"text": [f"text {n}" * 50 for n in range(500)], "label": ["x"] * 500})))
    data[20:3000] = bytes(2980)
    error = refused(take, "a.parquet", bytes(data))
    assert "cannot be read" in error.message or "damaged" in error.message


def extension(name, nested=False):
    field = pa.field("text", pa.string(), metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": b"\x80\x04."})
    if nested:
        return pa.schema([pa.field("text", pa.list_(field)), pa.field("label", pa.string())])
    return pa.schema([field, pa.field("label", pa.string())])


@pytest.fixture
def no_registered_types():
    """Ray registers its types in whatever process imports it; the process that reads data files never does."""
    for name in ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"):
        with contextlib.suppress(pa.ArrowKeyError):
            pa.unregister_extension_type(name)


@pytest.mark.usefixtures("no_registered_types")
@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "arrow.py_extension_type", "own.type"])
@pytest.mark.parametrize("nested", [False, True])
def test_parquet_types_that_run_code_are_refused(take, name, nested):
    values = [["a"]] if nested else ["a"]
    table = pa.table([pa.array(values, extension(name, nested).field(0).type), pa.array(["x"])], schema=extension(name, nested))
    error = refused(take, "a.parquet", parquet(table))
    assert error.reason == "UNSAFE_PARQUET"


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([], "empty"),
        ("not json", "not JSON"),
        ({"role": "user"}, "an object, not a list"),
        ([{"role": "user", "content": "a"}], "ends with a message by user"),
        ([{"role": "assistant", "content": "a"}], "no message by the user"),
        ([{"role": "robot", "content": "a"}], "role 'robot'"),
        ([{"role": "user", "content": 5}], "content of message 1 is a number"),
        ([{"role": "user", "content": ""}], "content of message 1 is empty"),
        (["hello"], "message 1 is text, not an object"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}], "calls a tool"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}],
            "system message that is not the first",
        ),
    ],
)
def test_a_bad_chat_is_named(take, jsonl, chat, says):
    error = refused(take, "a.jsonl", jsonl([{"messages": chat}]))
    assert places(error) == ["line 1 column messages"]
    assert says in error.violations[0].description


def test_a_label_missing_from_some_rows_says_how_to_leave_labels_out(take, jsonl):
    error = refused(
        take, "a.jsonl", jsonl([{"prompt": "a", "completion": "b", "label": "x"}, {"prompt": "a", "completion": "b"}])
    )
    assert places(error) == ["line 2 column label"]
    assert "--map label=" in error.violations[0].description


def test_free_text_is_no_label(take, jsonl):
    error = refused(take, "a.jsonl", jsonl([{"text": "a", "label": f"free text {n}"} for n in range(1001)]))
    assert places(error) == ["columns.label"]


@pytest.mark.parametrize("name", ["../up", "a b", "-", "x" * 40])
def test_a_bad_split_name_is_named(take, jsonl, name):
    error = refused(take, "a.jsonl", jsonl([{"text": "a", "label": "x", "split": name}]))
    assert places(error) == ["line 1 column split"]
