"""What the rows of a file are, by its columns: chats, pairs, prompts and completions, texts and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import InvalidArgument, Violation
from luthier.v1 import dataset_pb2

# Part of a row -> names a column for it usually has, the part's own name first.
USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "response", "answer", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "text": ("text", "body", "content"),
    "label": ("label", "category", "class"),
    "split": ("split",),
}
SHAPES: dict[dataset_pb2.RowShape, tuple[str, ...]] = {
    # First, because files of pairs often have the chosen chat in a column of its own too.
    dataset_pb2.ROW_SHAPE_PREFERENCE: ("chosen", "rejected"),
    dataset_pb2.ROW_SHAPE_CHAT: ("messages",),
    dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION: ("prompt", "completion"),
    dataset_pb2.ROW_SHAPE_TEXT_LABEL: ("text", "label"),
    dataset_pb2.ROW_SHAPE_PROMPT: ("prompt",),
    dataset_pb2.ROW_SHAPE_TEXT: ("text",),
}
OPTIONAL = ("label", "split")
# Parts that only rows of some shapes may have, beside those that all of that shape have.
_ALSO: dict[dataset_pb2.RowShape, tuple[str, ...]] = {
    dataset_pb2.ROW_SHAPE_PREFERENCE: ("prompt", "split"),
    dataset_pb2.ROW_SHAPE_PROMPT: ("split",),
    dataset_pb2.ROW_SHAPE_TEXT: ("split",),
}


@dataclass(frozen=True)
class Mapped:
    """The shape of the rows, and the column of each part of a row."""

    shape: dataset_pb2.RowShape
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def optional(self) -> frozenset[str]:
        """Parts that the rows could do without."""
        return frozenset(_ALSO.get(self.shape, OPTIONAL)) - frozenset(SHAPES[self.shape])


def recognise(columns: Sequence[str], explicit: Mapping[str, str]) -> Mapped:
    """Return what rows with these columns are. Parts mapped explicitly win over usual names; one mapped to nothing is left out.

    Raises InvalidArgument that lists the columns there are, where a mapped one is missing, a part could be two of them, or the
    shape cannot be told.
    """
    _check_explicit(columns, explicit)
    found = {part: explicit[part] if part in explicit else _usual(part, columns, explicit) for part in USUAL}
    explicit = {part: column for part, column in explicit.items() if column}
    for shape, parts in _candidates(explicit):
        if all(found[part] for part in parts):
            wanted = [*parts, *(part for part in _ALSO.get(shape, OPTIONAL) if part not in parts)]
            chosen = {part: column for part in wanted if (column := found[part])}
            unused = sorted(set(explicit) - set(chosen))
            if unused and shape in (dataset_pb2.ROW_SHAPE_PROMPT, dataset_pb2.ROW_SHAPE_TEXT):
                continue
            if unused:
                raise _bad([Violation(f"columns.{unused[0]}", f"rows with {' and '.join(parts)} have no part {unused[0]!r}")])
            _check_unambiguous(chosen, columns, explicit)
            return Mapped(shape, chosen)
    there = _listed(columns)
    raise _bad(
        [
            Violation(
                "columns",
                f"cannot tell what the rows are from the columns {there}; map them, for example "
                "--map text=COLUMN,label=COLUMN or --map prompt=COLUMN,completion=COLUMN or --map messages=COLUMN",
            )
        ]
    )


def _candidates(explicit: Mapping[str, str]) -> list[tuple[dataset_pb2.RowShape, tuple[str, ...]]]:
    """The shapes to try: those with a part that is mapped explicitly come first, the others only if there is none."""
    named = [item for item in SHAPES.items() if any(part in explicit and part not in OPTIONAL for part in item[1])]
    return named or list(SHAPES.items())


def _check_explicit(columns: Sequence[str], explicit: Mapping[str, str]) -> None:
    violations = []
    for part, column in explicit.items():
        if part not in USUAL:
            violations.append(Violation(f"columns.{part}", f"{part!r} is no part of a row; the parts are {', '.join(USUAL)}"))
        elif column and column not in columns:
            violations.append(Violation(f"columns.{part}", f"there is no column {column!r}; the columns are {_listed(columns)}"))
    columns_used = [column for column in explicit.values() if column]
    for column in sorted({column for column in columns_used if columns_used.count(column) > 1}):
        violations.append(Violation("columns", f"the column {column!r} is mapped to more than one part"))
    if violations:
        raise _bad(violations)


def _usual(part: str, columns: Sequence[str], explicit: Mapping[str, str]) -> str:
    """Return the column that usually holds the part; empty where there is none."""
    free = [column for column in columns if column not in explicit.values()]
    by_name = {column.strip().lower(): column for column in reversed(free)}
    return next((by_name[name] for name in USUAL[part] if name in by_name), "")


def _check_unambiguous(chosen: Mapping[str, str], columns: Sequence[str], explicit: Mapping[str, str]) -> None:
    """Refuse to guess where two columns could be the same part, as `instruction` and `input`: one would be lost silently."""
    for part, column in chosen.items():
        if part in explicit or column.strip().lower() == part or part in OPTIONAL:
            continue
        others = [c for c in columns if c.strip().lower() in USUAL[part] and c not in chosen.values()]
        if others:
            both = f"{column!r} and {others[0]!r}"
            raise _bad([Violation(f"columns.{part}", f"both {both} could be the {part}; say which with --map {part}=COLUMN")])


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(column[:60]) for column in columns[:20]) or "(none)"
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _bad(violations: Sequence[Violation]) -> InvalidArgument:
    return InvalidArgument.of(violations, "BAD_COLUMNS")
