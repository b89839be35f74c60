"""Reading what people type: lengths of time, amounts, `a=b` pairs, and names made from paths."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cli.failures import USAGE, Failure

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str, flag: str) -> float:
    """Seconds of `90`, `90s`, `30m`, `2h`, `1d` or `1h30m`."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise Failure(f"{flag}: {text!r} is not a length of time; write 90s, 30m, 2h, 1d or 1h30m", USAGE)
    return sum(float(value) * UNITS[unit] for value, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))


def amount(text: str, flag: str) -> float | None:
    """The number that `text` is; None for `none`, which takes a bound away."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise Failure(f"{flag}: {text!r} is neither a number nor none", USAGE) from None


def pairs(items: Iterable[str], flag: str, separator: str = ",") -> dict[str, str]:
    """`["text=Body,label=Queue", "a=b"]` as a dictionary. With an empty separator each item is one pair."""
    found: dict[str, str] = {}
    for item in items:
        for part in item.split(separator) if separator else [item]:
            name, equals, value = part.partition("=")
            if not equals or not name.strip():
                raise Failure(f"{flag}: {part!r} is not of the form name=value", USAGE)
            if name.strip() in found:
                raise Failure(f"{flag}: {name.strip()!r} is given twice", USAGE)
            found[name.strip()] = value.strip()
    return found


def id_from(text: str) -> str:
    """A valid id that looks like `text`, for things that were not given a name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-") or "model"
