"""Short names for people (`tickets@2`) and the full ones that calls take (`projects/p/datasets/tickets/versions/2`)."""

from __future__ import annotations


def full_name(project: str, collection: str, name: str) -> str:
    """`projects/{project}/{collection}/{name}`; a name that is full already stays as it is."""
    return name if "/" in name else f"projects/{project}/{collection}/{name}"


def full_version(project: str, collection: str, reference: str) -> str:
    """The full name of `name`, `name@3` or `name@alias`; without a version the latest."""
    if "/" in reference:
        return reference
    name, _, version = reference.partition("@")
    return f"projects/{project}/{collection}/{name}/versions/{version or 'latest'}"


def short_name(name: str) -> str:
    """What people type for a full name: `j-1` for `projects/p/jobs/j-1`, `tickets@2` for `.../tickets/versions/2`."""
    parts = name.split("/")
    return f"{parts[3]}@{parts[5]}" if len(parts) == 6 and parts[4] == "versions" else parts[-1]
