"""Which nodes a job asks for by their labels: Ray's label selectors, matched as Ray matches them.

A selector holds one condition a label: `x` (it is x), `!x` (it is not x, or the node does not have it), `in(x,y)` and `!in(x,y)`.
What a selector comes to on the nodes is worked out once a round for every selector, and for nodes that are alike in the labels
that it names only once: what asks for no labels pays nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Selector = tuple[tuple[str, str], ...]
"""Conditions by label, sorted by label; empty where any node will do."""

SHOWN = 5
"""So many values of a label are named to whoever finds none that he wants."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The nodes that a selector matches, by number. Compared by identity: equal selectors of one round share one."""

    selector: Selector
    nodes: tuple[int, ...]
    members: frozenset[int]

    @classmethod
    def of(cls, selector: Selector, labels: Sequence[Mapping[str, str]]) -> Group:
        """Find the nodes with such labels, which are given in the order of the nodes' numbers."""
        conditions = [(name, *_read(condition)) for name, condition in selector]
        known: dict[tuple[str | None, ...], bool] = {}
        found = []
        for number, own in enumerate(labels):
            values = tuple(own.get(name) for name, _ in selector)
            fits = known.get(values)
            if fits is None:
                fits = known[values] = all(
                    (value in wanted) is inside for value, (_, inside, wanted) in zip(values, conditions, strict=True)
                )
            if fits:
                found.append(number)
        return cls(selector, tuple(found), frozenset(found))


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether one node has the labels that are asked for."""
    return bool(Group.of(selector, [labels]).nodes)


def words(selector: Selector) -> str:
    """A selector in words, for example "accelerator-type H100 and zone other than a"."""
    return " and ".join(_words(*each) for each in selector)


def no_such_node(selector: Selector, labels: Sequence[Mapping[str, str]]) -> str:
    """A selector that no node of the cluster matches, and what the nodes have instead."""
    for name, condition in selector:
        if not Group.of(((name, condition),), labels).nodes:
            counts = Counter(own.get(name) for own in labels)
            ranked = sorted(counts.items(), key=lambda row: (row[0] is None, -row[1], row[0] or ""))
            have = [f"{value or 'none'} ({count})" for value, count in ranked[:SHOWN]]
            more = f" and {len(ranked) - SHOWN} more values" if len(ranked) > SHOWN else ""
            return f"a node with {_words(name, condition)}; nodes have {', '.join(have)}{more}"
    return f"a node with {words(selector)}; no node has all of that"


def _words(name: str, condition: str) -> str:
    inside, wanted = _read(condition)
    return f"{name.removeprefix('ray.io/')} {'' if inside else 'other than '}{' or '.join(sorted(wanted))}"


def _read(condition: str) -> tuple[bool, frozenset[str]]:
    """Whether the label has to be among some values, or must not be, and the values."""
    inside = not condition.startswith("!")
    text = condition.removeprefix("!")
    if text.startswith("in(") and text.endswith(")"):
        return inside, frozenset(value.strip() for value in text[3:-1].split(","))
    return inside, frozenset([text])
