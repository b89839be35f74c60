"""Job files: the YAML or JSON form of the Job message, read with errors that name the field and the line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cli.failures import USAGE, Failure
from luthier.v1.job_pb2 import Job

Lines = dict[str, int]


class _Loader(yaml.SafeLoader):
    """YAML without its dates, which protobuf would refuse, so that `version: 2026-01-01` stays a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_job(source: str) -> Job:
    """Read the job file at a path, or from stdin for `-`. Raises Failure naming the file, the line and the field."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}", USAGE) from error
    except OSError as error:
        raise Failure(f"{source}: {error.strerror}", USAGE) from error
    name = "stdin" if source == "-" else source
    data, lines = _load(text, name)
    if not isinstance(data, dict):
        raise Failure(f"{name}: a job file is a mapping of the fields of a Job, for example `finetune: {{base: ...}}`", USAGE)
    job = Job()
    fill(job, data, "job", name, lines)
    if job.WhichOneof("spec") is None:
        kinds = ", ".join(field.name for field in Job.DESCRIPTOR.oneofs_by_name["spec"].fields)
        raise Failure(f"{name}: says nothing to do; give one of {kinds}", USAGE)
    return job


def _load(text: str, name: str) -> tuple[Any, Lines]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=lambda items: _no_twice(items, name)), {}
        except json.JSONDecodeError as error:
            if name.endswith(".json"):
                raise Failure(f"{name}, line {error.lineno}: {error.msg}", USAGE) from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise Failure(f"{name} is empty", USAGE)
        lines: Lines = {}
        _note_lines(node, "job", lines, name)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        what = " ".join(text for text in (error.context, error.problem) if text) or "not YAML"
        raise Failure(f"{name}{where}: {what}", USAGE) from error
    except yaml.YAMLError as error:
        raise Failure(f"{name}: {error}", USAGE) from error
    finally:
        loader.dispose()


def _no_twice(items: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Failure(f"{name}: {twice!r} is given twice", USAGE)
    return found


def _note_lines(node: yaml.Node, path: str, lines: Lines, name: str) -> None:
    """Remember at which line each field stands, and refuse a key that stands twice."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise Failure(f"{name}, line {key.start_mark.line + 1}: {key.value!r} is given twice", USAGE)
            seen.add(key.value)
            _note_lines(value, f"{path}.{key.value}", lines, name)
            lines[f"{path}.{key.value}"] = key.start_mark.line + 1


def fill(message: Message, data: Mapping[str, Any], path: str, source: str, lines: Lines) -> None:
    """Set the fields of `message` from `data`. Raises Failure that names the field by its path."""
    fields = {name: field for field in message.DESCRIPTOR.fields for name in (field.name, field.json_name)}
    for key, value in data.items():
        here = f"{path}.{key}"
        if key not in fields:
            known = ", ".join(field.name for field in message.DESCRIPTOR.fields)
            raise _bad(source, lines, here, f"there is no such field; {path} has {known}")
        field = fields[key]
        if value is None:
            continue
        if field.containing_oneof is not None and message.WhichOneof(field.containing_oneof.name) not in (None, field.name):
            other = message.WhichOneof(field.containing_oneof.name)
            raise _bad(source, lines, here, f"{path} has {other} already; give one of them")
        if _is_plain_message(field):
            if not isinstance(value, dict):
                raise _bad(source, lines, here, f"is a group of fields, not {value!r}")
            child = getattr(message, field.name)
            child.SetInParent()
            fill(child, value, here, source, lines)
            continue
        try:
            parsed = json_format.ParseDict({field.name: _plain(value)}, type(message)())
            if not _is_map(field):
                message.ClearField(field.name)
            message.MergeFrom(parsed)
        except (json_format.ParseError, TypeError, ValueError, AttributeError) as error:
            raise _bad(source, lines, here, f"{value!r} is not {_wanted(field)}") from error


def _is_plain_message(field: Any) -> bool:
    kind = field.message_type
    if kind is None or field.is_repeated:
        return False
    return not kind.full_name.startswith("google.protobuf.")


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _plain(value: Any) -> Any:
    """Spell numbers that JSON does not know the way protobuf does."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _wanted(field: Any) -> str:
    if _is_map(field):
        return "a mapping that fits"
    if field.is_repeated:
        return "a list that fits"
    if field.enum_type is not None:
        return f"one of {', '.join(value.name for value in field.enum_type.values[1:])}"
    if field.message_type is not None and field.message_type.name == "Duration":
        return "a length of time in seconds like 1800s"
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return "a number"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return "a text; put it in quotes"
    return "a whole number that fits"


def _bad(source: str, lines: Lines, path: str, problem: str) -> Failure:
    where = f"{source}, line {lines[path]}" if path in lines else source
    return Failure(f"{where}: {path}: {problem}", USAGE)
