"""Where a job may run, as Ray's label selectors: what is valid, and what a Placement comes to."""

from __future__ import annotations

import re

from common.errors import Violation
from luthier.v1 import job_pb2

ACCELERATOR_TYPE = "ray.io/accelerator-type"
"""The label of a node with its accelerators' type."""

MOST = 16
"""Conditions of one job."""

# As Ray has them (ray._private.label_utils).
NAME = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
PREFIX = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
CONDITION = re.compile(r"!?(in\((?P<values>[^()]*)\)|(?P<value>[^()!]*))")


def selector_of(placement: job_pb2.Placement) -> dict[str, str]:
    """The conditions by label, in one order, that a valid placement comes to."""
    conditions = dict(placement.node_labels)
    types = sorted(set(placement.gpu_types))
    if types:
        conditions[ACCELERATOR_TYPE] = types[0] if len(types) == 1 else f"in({','.join(types)})"
    return dict(sorted(conditions.items()))


def violations(placement: job_pb2.Placement, path: str) -> list[Violation]:
    """What is wrong with a placement, by field below `path`."""
    bad = []
    if len(placement.node_labels) > MOST or len(placement.gpu_types) > MOST:
        bad.append(Violation(path, f"more than {MOST} labels or types"))
    for label, condition in sorted(placement.node_labels.items())[:MOST]:
        field = f"{path}.node_labels.{label[:80]}"
        prefix, slash, name = label.rpartition("/")
        if not NAME.fullmatch(name) or (slash and not PREFIX.fullmatch(prefix)):
            bad.append(Violation(field, "is no name of a label: letters, digits, dots, dashes and underscores, at most 63"))
        found = CONDITION.fullmatch(condition)
        values = [] if found is None else (found["values"].split(",") if found["values"] is not None else [found["value"]])
        if not values or not all(NAME.fullmatch(value.strip()) for value in values):
            bad.append(Violation(field, f"{condition[:80]!r} is no condition; write a, !a, in(a,b) or !in(a,b)"))
    for number, type_ in enumerate(placement.gpu_types[:MOST]):
        if not NAME.fullmatch(type_):
            bad.append(
                Violation(f"{path}.gpu_types[{number}]", f"{type_[:80]!r} is no type of an accelerator; write for example H100")
            )
    if placement.gpu_types and ACCELERATOR_TYPE in placement.node_labels:
        bad.append(Violation(f"{path}.gpu_types", f"given together with the label {ACCELERATOR_TYPE}, which means the same"))
    return bad
