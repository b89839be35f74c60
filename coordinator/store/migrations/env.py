"""Alembic's entry: runs the migrations on the engine it is given."""

from alembic import context
from sqlmodel import SQLModel

from coordinator.store import tables  # noqa: F401  (fills the metadata)
from coordinator.store.engines import for_writing

engine = context.config.attributes["engine"]

with for_writing(engine).connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
