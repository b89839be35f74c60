"""ModelService."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from sqlalchemy import exists
from sqlmodel import Session, col, select

from common import manifest, storage
from common.chat import template_sha256
from common.errors import AlreadyExists, InvalidArgument, Violation
from common.model_files import check_model_file_name, check_model_folder, read_chat_template
from common.names import VersionRef, check_id, parse_version_ref
from coordinator import messages, registry
from coordinator.collector import TOPIC as COLLECTOR
from coordinator.garbage import BASES, publishing
from coordinator.notify import Notifier
from coordinator.removal import delete_model_version
from coordinator.services import paging
from coordinator.services.principal import Context, principal
from coordinator.services.uploads import Sink, Staging
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import model_pb2, model_pb2_grpc


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Translates calls about models."""

    def __init__(self, store: Store, notifier: Notifier, staging: Staging, storage_uri: str) -> None:
        self._store = store
        self._notifier = notifier
        self._staging = staging
        self._bases_uri = f"{storage_uri}/{BASES}"

    async def UploadModel(
        self, request_iterator: AsyncIterator[model_pb2.UploadModelRequest], context: Context
    ) -> model_pb2.UploadModelResponse:
        """See model.proto."""
        who = principal()
        with self._staging.folder() as folder:
            header = await _receive(request_iterator, folder, self._staging.max_bytes)
            who.own(header.parent, field="header.parent")
            kind = (await asyncio.to_thread(check_model_folder, folder)).kind
            if kind != "full":
                why = "an adapter alone cannot be registered; upload the whole model, or train the adapter here"
                raise InvalidArgument.of([Violation("file", why)], "ADAPTER_WITHOUT_BASE")
            built = await asyncio.to_thread(manifest.build, folder)
            request_sha256 = hashlib.sha256(f"{header.model_id}\n{built.sha256}".encode()).hexdigest()
            row = await self._store.read(lambda session: _earlier(session, who.project, header.request_id, request_sha256))
            if row is None:
                uri = storage.join(self._bases_uri, built.sha256)
                template = read_chat_template(folder)
                version = model_pb2.ModelVersion(
                    base=header.source[:500],
                    method="import",
                    content_hash=built.sha256,
                    artifact_uri=uri,
                    kind=model_pb2.MODEL_KIND_FULL,
                    size_bytes=built.size_bytes,
                    chat_template_sha256=template_sha256(template) if template else "",
                    lineage=model_pb2.Lineage(base=header.source[:500], base_content_hash=built.sha256),
                )

                def work(session: Session) -> tables.ModelVersion:
                    earlier = _earlier(session, who.project, header.request_id, request_sha256)
                    return earlier or registry.add_model_version(
                        session,
                        who.project,
                        header.model_id,
                        version,
                        request_id=header.request_id,
                        request_sha256=request_sha256,
                    )

                async with publishing(self._store, BASES):
                    await asyncio.to_thread(manifest.publish, folder, uri)
                    row = await self._store.write(work)
        return model_pb2.UploadModelResponse(
            model_version=await self._store.read(lambda session: registry.model_version(session, row))
        )

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """See model.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> tuple[Sequence[tables.Model], Sequence[tables.ModelAlias], dict[str, int]]:
            query = select(tables.Model).where(tables.Model.project_id == who.project)
            if after is not None:
                query = query.where(tables.Model.id > after[0])
            # One whose versions were all deleted is there for its number's sake alone.
            version = tables.ModelVersion
            query = query.where(exists().where(col(version.project_id) == who.project, col(version.model_id) == tables.Model.id))
            rows = session.exec(query.order_by(tables.Model.id).limit(size + 1)).all()
            ids = [row.id for row in rows]
            alias = tables.ModelAlias
            aliases = session.exec(select(alias).where(alias.project_id == who.project, col(alias.model_id).in_(ids))).all()
            return rows, aliases, registry.latest_models(session, who.project, ids)

        rows, aliases, latest = await self._store.read(work)
        response = model_pb2.ListModelsResponse(
            models=[
                model_pb2.Model(
                    name=f"projects/{row.project_id}/models/{row.id}",
                    latest_version=f"{row.id}@{latest[row.id]}",
                    aliases={each.alias: f"{row.id}@{each.version}" for each in aliases if each.model_id == row.id},
                    create_time=messages.stamp(row.create_time),
                )
                for row in rows[:size]
            ]
        )
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def GetModelVersion(
        self, request: model_pb2.GetModelVersionRequest, context: Context
    ) -> model_pb2.GetModelVersionResponse:
        """See model.proto."""
        who = principal()
        who.own(request.name, "models", "versions")
        ref = parse_version_ref(request.name, "name", "models")

        def work(session: Session) -> model_pb2.ModelVersion:
            return registry.model_version(session, registry.find_model(session, who.project, ref))

        return model_pb2.GetModelVersionResponse(model_version=await self._store.read(work))

    async def ListModelVersions(
        self, request: model_pb2.ListModelVersionsRequest, context: Context
    ) -> model_pb2.ListModelVersionsResponse:
        """See model.proto."""
        who = principal()
        (model_id,) = who.own(request.parent, "models", field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> list[tuple[int, model_pb2.ModelVersion]]:
            registry.find_model(session, who.project, VersionRef(model_id))
            version = tables.ModelVersion
            query = select(version).where(version.project_id == who.project, version.model_id == model_id)
            if after is not None:
                query = query.where(version.version < after[0])
            rows = session.exec(query.order_by(col(version.version).desc()).limit(size + 1)).all()
            return [(row.version, registry.model_version(session, row)) for row in rows]

        rows = await self._store.read(work)
        response = model_pb2.ListModelVersionsResponse(model_versions=[version for _, version in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1][0])
        return response

    async def SetAlias(self, request: model_pb2.SetAliasRequest, context: Context) -> model_pb2.SetAliasResponse:
        """See model.proto."""
        who = principal()
        who.own(request.name, "models", "versions")
        ref = parse_version_ref(request.name, "name", "models")
        check_id(request.alias, "alias")

        def work(session: Session) -> model_pb2.ModelVersion:
            row = registry.find_model(session, who.project, ref)
            registry.set_alias(session, row, request.alias)
            session.flush()
            return registry.model_version(session, row)

        model_version = await self._store.write(work)
        self._notifier.notify("endpoints")  # the gateway leads by aliases
        return model_pb2.SetAliasResponse(model_version=model_version)

    async def GetLineage(self, request: model_pb2.GetLineageRequest, context: Context) -> model_pb2.GetLineageResponse:
        """See model.proto."""
        who = principal()
        who.own(request.name, "models", "versions")
        ref = parse_version_ref(request.name, "name", "models")
        nodes = await self._store.read(lambda session: lineage(session, who.project, ref))
        return model_pb2.GetLineageResponse(nodes=nodes)

    async def DeleteModelVersion(
        self, request: model_pb2.DeleteModelVersionRequest, context: Context
    ) -> model_pb2.DeleteModelVersionResponse:
        """See model.proto."""
        who = principal()
        who.own(request.name, "models", "versions")
        ref = parse_version_ref(request.name, "name", "models")
        await self._store.write(lambda session: delete_model_version(session, who.project, ref))
        self._notifier.notify(COLLECTOR)
        return model_pb2.DeleteModelVersionResponse()


def lineage(session: Session, project: str, ref: VersionRef) -> list[model_pb2.LineageNode]:
    """A version and everything it came from, breadth first; each thing once."""
    nodes: dict[str, model_pb2.LineageNode] = {}
    todo = [ref]
    while todo:
        row = registry.find_model(session, project, todo.pop(0))
        version = registry.model_version(session, row)
        if version.name in nodes:
            continue
        origin = version.lineage
        node = model_pb2.LineageNode(name=version.name, kind="model", content_hash=version.content_hash)
        nodes[version.name] = node
        parents = [("job", origin.job, ""), ("dataset", origin.dataset_version, origin.dataset_content_hash)]
        id_, at, number = origin.base.partition("@")
        if at and number.isdecimal() and session.get(tables.ModelVersion, (project, id_, int(number))) is not None:
            parent = f"projects/{project}/models/{id_}/versions/{number}"
            node.parents.append(parent)
            todo.append(VersionRef(id_, number))
        else:
            parents.append(("base", origin.base, origin.base_content_hash))
        for kind, name, content_hash in parents:
            if name:
                node.parents.append(name)
                nodes.setdefault(name, model_pb2.LineageNode(name=name, kind=kind, content_hash=content_hash))
    return list(nodes.values())


async def _receive(
    items: AsyncIterator[model_pb2.UploadModelRequest], folder: Path, max_bytes: int
) -> model_pb2.UploadModelHeader:
    """Write the files of an upload into `folder` and return the header. Names are checked before anything is opened."""
    header: model_pb2.UploadModelHeader | None = None
    sink: Sink | None = None
    expected, name = 0, ""
    try:
        async for item in items:
            kind = item.WhichOneof("item")
            if header is None:
                if kind != "header":
                    raise InvalidArgument.of([Violation("header", "missing: the first message has to be the header")])
                header = item.header
                check_id(header.model_id, "header.model_id")
            elif kind == "file":
                _finish(sink, name, expected)
                name, expected = storage.check_relative(item.file.path), item.file.size_bytes
                check_model_file_name(name)
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    raise InvalidArgument.of([Violation("file.path", f"{name!r} was sent twice")])
                sink = Sink(path, max_bytes)
            elif kind == "chunk" and sink is not None:
                await asyncio.to_thread(sink.write, item.chunk)
            else:
                raise InvalidArgument.of([Violation("file", "a chunk came before its file was opened")])
        _finish(sink, name, expected)
    finally:
        if sink is not None:
            sink.close()
    if header is None:
        raise InvalidArgument.of([Violation("header", "missing: the stream ended before it began")])
    return header


def _finish(sink: Sink | None, name: str, expected: int) -> None:
    if sink is not None:
        sink.close()
        if sink.size != expected:
            raise InvalidArgument.of([Violation("file", f"{name!r} has {sink.size} bytes, {expected} were announced")])


def _earlier(session: Session, project: str, request_id: str, request_sha256: str) -> tables.ModelVersion | None:
    if not request_id:
        return None
    version = tables.ModelVersion
    row = session.exec(select(version).where(version.project_id == project, version.request_id == request_id)).first()
    if row is not None and row.request_sha256 != request_sha256:
        raise AlreadyExists(f"request_id {request_id!r} made {row.model_id}@{row.version} from other files", "REQUEST_ID_REUSED")
    return row
