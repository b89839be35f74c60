"""SecretService."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, select

from common.errors import InvalidArgument, Violation
from coordinator import secret_store
from coordinator.messages import stamp
from coordinator.services import paging
from coordinator.services.principal import Context, principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.vault import Vault
from luthier.v1 import secret_pb2, secret_pb2_grpc

LEAST_BYTES = 8
"""Bytes of a value at least: shorter words turn up in logs by themselves, so that they could not be blotted out there."""

MOST_BYTES = 16_384
"""Bytes of a value at most; it has to fit into an environment."""


class SecretService(secret_pb2_grpc.SecretServiceServicer):
    """Translates calls about secrets. No value is in an answer, an error or a log."""

    def __init__(self, store: Store, vault: Vault) -> None:
        self._store = store
        self._vault = vault

    async def SetSecret(self, request: secret_pb2.SetSecretRequest, context: Context) -> secret_pb2.SetSecretResponse:
        """See secret.proto."""
        who = principal()
        (name,) = who.own(request.name, "secrets")
        size = len(request.value.encode())
        if not LEAST_BYTES <= size <= MOST_BYTES or "\0" in request.value:
            why = f"{size} bytes; text of {LEAST_BYTES} to {MOST_BYTES} bytes without NUL characters is taken"
            raise InvalidArgument.of([Violation("value", why)])
        sealed = self._vault.seal(who.project, name, request.value)
        row = await self._store.write(lambda session: secret_store.set_secret(session, self._vault, who.project, name, sealed))
        return secret_pb2.SetSecretResponse(secret=message(row))

    async def ListSecrets(self, request: secret_pb2.ListSecretsRequest, context: Context) -> secret_pb2.ListSecretsResponse:
        """See secret.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[tables.Secret]:
            query = select(tables.Secret).where(tables.Secret.project_id == who.project)
            if after is not None:
                query = query.where(tables.Secret.id > after[0])
            return session.exec(query.order_by(col(tables.Secret.id)).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = secret_pb2.ListSecretsResponse(secrets=[message(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def DeleteSecret(self, request: secret_pb2.DeleteSecretRequest, context: Context) -> secret_pb2.DeleteSecretResponse:
        """See secret.proto."""
        who = principal()
        (name,) = who.own(request.name, "secrets")
        await self._store.write(lambda session: secret_store.delete_secret(session, who.project, name))
        return secret_pb2.DeleteSecretResponse()


def message(row: tables.Secret) -> secret_pb2.Secret:
    """A secret's row as the contract's message."""
    return secret_pb2.Secret(
        name=f"projects/{row.project_id}/secrets/{row.id}",
        create_time=stamp(row.create_time),
        update_time=stamp(row.update_time),
    )
