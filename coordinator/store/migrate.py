"""Bring the schema of a database up to date."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from coordinator.store.faults import is_fault, unavailable

MIGRATIONS = Path(__file__).parent / "migrations"


def config(engine: Engine) -> Config:
    """Alembic's settings for this package's migrations on `engine`."""
    settings = Config()
    settings.set_main_option("script_location", str(MIGRATIONS))
    settings.attributes["engine"] = engine
    return settings


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Apply every migration up to `revision` that has not been applied yet.

    Raises Unavailable where the database does not answer.
    """
    try:
        command.upgrade(config(engine), revision)
    except SQLAlchemyError as error:
        if not is_fault(error):
            raise
        raise unavailable(error) from error
