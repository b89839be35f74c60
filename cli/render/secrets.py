"""Secrets as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from cli.render.text import ago, plain_table
from luthier.client import short_name
from luthier.v1.secret_pb2 import Secret


def secrets_table(secrets: Iterable[Secret]) -> Table:
    """Secrets, one a row, without their values."""
    table = plain_table("secret", "made", "set")
    for secret in secrets:
        table.add_row(short_name(secret.name), ago(secret.create_time), ago(secret.update_time))
    return table
