"""What the rows are follows from the columns, or the user says it."""

import pytest

from agents.data.recognise import recognise
from common.errors import InvalidArgument
from luthier.v1 import dataset_pb2

CHAT, PAIR, TEXT = (
    dataset_pb2.ROW_SHAPE_CHAT,
    dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION,
    dataset_pb2.ROW_SHAPE_TEXT_LABEL,
)


@pytest.mark.parametrize(
    ("columns", "explicit", "shape", "found"),
    [
        (["messages", "id"], {}, CHAT, {"messages": "messages"}),
        (["conversations"], {}, CHAT, {"messages": "conversations"}),
        (["prompt", "completion"], {}, PAIR, {"prompt": "prompt", "completion": "completion"}),
        (["id", "Question", "Answer"], {}, PAIR, {"prompt": "Question", "completion": "Answer"}),
        (["instruction", "output"], {}, PAIR, {"prompt": "instruction", "completion": "output"}),
        (["prompt", "question", "completion"], {}, PAIR, {"prompt": "prompt", "completion": "completion"}),
        (
            ["prompt", "completion", "label", "split"],
            {},
            PAIR,
            {"prompt": "prompt", "completion": "completion", "label": "label", "split": "split"},
        ),
        (["prompt", "completion", "label"], {"label": ""}, PAIR, {"prompt": "prompt", "completion": "completion"}),
        (["text", "label"], {}, TEXT, {"text": "text", "label": "label"}),
        (["Body", "class"], {}, TEXT, {"text": "Body", "label": "class"}),
        (["Body", "Queue"], {"label": "Queue"}, TEXT, {"text": "Body", "label": "Queue"}),
        (["a", "b"], {"text": "a", "label": "b"}, TEXT, {"text": "a", "label": "b"}),
        (["a", "b"], {"prompt": "a", "completion": "b"}, PAIR, {"prompt": "a", "completion": "b"}),
        (["prompt", "completion", "text", "label"], {"text": "text"}, TEXT, {"text": "text", "label": "label"}),
        (["instruction", "input", "output"], {"prompt": "input"}, PAIR, {"prompt": "input", "completion": "output"}),
        (["text", "label", "fold"], {"split": "fold"}, TEXT, {"text": "text", "label": "label", "split": "fold"}),
    ],
)
def test_columns_tell_the_shape(columns, explicit, shape, found):
    mapped = recognise(columns, explicit)
    assert (mapped.shape, mapped.columns) == (shape, found)


@pytest.mark.parametrize(
    ("columns", "explicit", "field", "says"),
    [
        (["a", "b"], {}, "columns", "from the columns 'a', 'b'; map them"),
        ([], {}, "columns", "(none)"),
        (
            ["Body", "Queue"],
            {"text": "Bodi", "label": "Queue"},
            "columns.text",
            "no column 'Bodi'; the columns are 'Body', 'Queue'",
        ),
        (["a"], {"txt": "a"}, "columns.txt", "no part of a row"),
        (["a"], {"text": "a", "label": "a"}, "columns", "mapped to more than one"),
        (["a", "label"], {"text": "a", "prompt": "label"}, "columns", "cannot tell"),
        (["instruction", "input", "output"], {}, "columns.prompt", "both 'instruction' and 'input' could be the prompt"),
        (
            ["prompt", "completion", "m"],
            {"messages": "m", "prompt": "prompt"},
            "columns.prompt",
            "rows with messages have no part",
        ),
        ([f"c{n}" for n in range(30)], {}, "columns", "and 10 more"),
    ],
)
def test_what_cannot_be_told_is_said(columns, explicit, field, says):
    with pytest.raises(InvalidArgument) as error:
        recognise(columns, explicit)
    assert error.value.violations[0].field == field
    assert says in error.value.violations[0].description
