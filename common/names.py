"""Resource names (`projects/p/jobs/j`), ids, and the short references people type (`tickets@2`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import InvalidArgument, NotFound, Violation

ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")
ID_RULE = "lower-case letters, digits and hyphens, 1 to 63 characters, no hyphen at either end"


def check_id(value: str, field: str) -> str:
    """Return `value` if it is a valid id, else raise InvalidArgument for `field`."""
    if not ID.fullmatch(value):
        raise InvalidArgument.of([Violation(field, f"{value[:80]!r} is not a valid name; use {ID_RULE}")])
    return value


def parse(name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
    """Split a resource name into its ids, e.g. `parse("projects/p/jobs/j", "projects", "jobs") == ("p", "j")`.

    Raises InvalidArgument for `field` where the name has another form.
    """
    parts = name.split("/")
    if len(parts) != 2 * len(collections) or tuple(parts[::2]) != collections or not all(parts[1::2]):
        pattern = "/".join(f"{collection}/{{{collection[:-1]}}}" for collection in collections)
        raise InvalidArgument.of([Violation(field, f"{name[:200]!r} is not of the form {pattern}")])
    ids = tuple(parts[1::2])
    for value in ids:
        check_id(value, field)
    return ids


@dataclass(frozen=True)
class VersionRef:
    """A model or data set version as people write it: `name`, `name@3` or `name@alias`."""

    id: str
    version: str = "latest"

    def __str__(self) -> str:
        return f"{self.id}@{self.version}"


def parse_version_ref(text: str, field: str, collection: str, project: str = "") -> VersionRef:
    """Read `name`, `name@version` or `projects/p/{collection}/name/versions/version`.

    Raises InvalidArgument for `field` where it is none of them, and NotFound for a full name of another project than `project`,
    where that is given: references never leave the caller's project.
    """
    if text.startswith("projects/"):
        owner, name, version = parse(text, "projects", collection, "versions", field=field)
        if project and owner != project:
            raise NotFound(f"there is no {text}", violations=[Violation(field, f"there is no {text}")])
        return VersionRef(name, version)
    name, _, version = text.partition("@")
    return VersionRef(check_id(name, field), check_id(version, field) if version else "latest")
