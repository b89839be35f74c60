"""Reward `json_schema`: 1 where the answer is JSON that a schema accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import re2
from jsonschema import Draft202012Validator, ValidationError, validators
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from agents.training.rewards.base import Answer, Plain
from common.errors import InvalidArgument, Violation
from luthier.v1 import training_pb2

FENCE = "```"


def json_schema(settings: training_pb2.JsonSchemaReward) -> Plain:
    """Make the reward. Raises InvalidArgument where the schema is none, or refers to places outside of itself."""
    schema = json.loads(settings.schema)
    try:
        Draft202012Validator.check_schema(schema)
        # An empty registry: a reference to elsewhere is fetched from nowhere.
        validator = _Validator(schema, registry=Registry())
        _try(validator)
    except (SchemaError, Unresolvable, re2.error) as error:
        why = f"is no JSON schema that can be used: {' '.join(str(error).split())[:200]}"
        raise InvalidArgument.of([Violation("reinforcement.rewards.json_schema.schema", why)]) from error

    def judge(answer: Answer) -> float:
        try:
            value = json.loads(_inner(answer.text))
            return float(validator.is_valid(value))
        except (ValueError, RecursionError, Unresolvable):
            return 0.0

    return Plain(judge, needs_reference=False)


def _inner(text: str) -> str:
    """What stands between the first fences, where there are any."""
    parts = text.split(FENCE)
    return parts[1].partition("\n")[2] if len(parts) >= 3 else text


def _try(validator: Any) -> None:
    """Look up every reference in the schema once, so that a bad one fails the run at its start."""
    resolver = validator._resolver
    pending: list[Any] = [validator.schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                resolver.lookup(part["$ref"])
            named = part.get("patternProperties")
            for pattern in (part.get("pattern"), *(named if isinstance(named, dict) else ())):
                if isinstance(pattern, str):
                    re2.compile(pattern)
            pending += part.values()
        elif isinstance(part, list):
            pending += part


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not re2.search(pattern, instance):
        yield ValidationError(f"does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, subschema in patterns.items():
            for name, value in instance.items():
                if re2.search(pattern, name):
                    yield from validator.descend(value, subschema, path=name, schema_path=pattern)


# Python's own expressions may take for ever on a text that a model wrote.
_Validator: Any = validators.extend(Draft202012Validator, {"pattern": _pattern, "patternProperties": _pattern_properties})
