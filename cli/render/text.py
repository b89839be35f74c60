"""Small pieces of text that several tables use."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

COLOURS = {
    "SUCCEEDED": "green",
    "READY": "green",
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "PAUSING": "magenta",
    "PAUSED": "magenta",
    "BLOCKED": "dim",
    "STARTING": "cyan",
    "DEPLOYING": "cyan",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "DELETING": "yellow",
    "PRUNED": "yellow",
}


def state_text(name: str) -> Text:
    """`JOB_STATE_RUNNING` as a coloured RUNNING."""
    short = name.partition("_STATE_")[2] or name
    return Text(short, COLOURS.get(short, ""))


def enum_text(name: str, prefix: str) -> str:
    """An enum's name without its prefix, in small letters."""
    return name.removeprefix(prefix).lower().replace("_", " ")


def ago(time: Timestamp, now: datetime | None = None) -> str:
    """How long ago something was, roughly."""
    if not time.seconds:
        return ""
    seconds = ((now or datetime.now(UTC)) - time.ToDatetime(UTC)).total_seconds()
    return f"{span(max(seconds, 0))} ago"


def span(seconds: float) -> str:
    """A length of time with its two largest units."""
    whole = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part_size
            return f"{whole // size}{unit}{f' {rest}{part}' if rest else ''}"
    return f"{whole}s"


def duration(value: Duration) -> str:
    """A Duration like `span`."""
    return span(value.seconds + value.nanos / 1e9)


def when(time: Timestamp) -> str:
    """A moment in local time."""
    return time.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time.seconds else ""


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(value: float) -> str:
    """A figure in a handful of digits."""
    return f"{int(value)}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def plain_table(*columns: str) -> Table:
    """A table without lines; figures of people's shells."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def facts(rows: list[tuple[str, object]]) -> Table:
    """Names on the left, values on the right; empty values are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if isinstance(value, Text | Table):
            table.add_row(name, value)
        elif value not in ("", None):
            table.add_row(name, Text(str(value)))
    return table
