"""DatasetService."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from sqlalchemy import exists
from sqlmodel import Session, col, select

from common import storage
from common.errors import AlreadyExists, InvalidArgument, Violation
from common.names import VersionRef, check_id, parse_version_ref
from coordinator import messages, registry
from coordinator.collector import TOPIC as COLLECTOR
from coordinator.garbage import DATASETS, publishing
from coordinator.ingest import ingest
from coordinator.notify import Notifier
from coordinator.removal import delete_dataset_version
from coordinator.services import paging
from coordinator.services.principal import Context, principal
from coordinator.services.uploads import Sink, Staging
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import dataset_pb2, dataset_pb2_grpc


class DatasetService(dataset_pb2_grpc.DatasetServiceServicer):
    """Translates calls about data sets."""

    def __init__(self, store: Store, notifier: Notifier, staging: Staging, storage_uri: str) -> None:
        self._store = store
        self._notifier = notifier
        self._staging = staging
        self._out_uri = f"{storage_uri}/{DATASETS}"

    async def UploadDataset(
        self, request_iterator: AsyncIterator[dataset_pb2.UploadDatasetRequest], context: Context
    ) -> dataset_pb2.UploadDatasetResponse:
        """See dataset.proto."""
        who = principal()
        header: dataset_pb2.UploadDatasetHeader | None = None
        with self._staging.folder() as folder:
            path = folder / "upload"
            sink = Sink(path, self._staging.max_bytes)
            try:
                async for item in request_iterator:
                    if header is None:
                        header = _check_header(item)
                        who.own(header.parent, field="header.parent")
                    else:
                        await asyncio.to_thread(sink.write, item.chunk)
            finally:
                sha256 = sink.close()
            if header is None:
                raise InvalidArgument.of([Violation("header", "missing: the stream ended before it began")])
            if header.sha256 and header.sha256.lower() != sha256:
                why = f"the file that arrived has {sha256}; it was cut short or changed on the way, send it again"
                raise InvalidArgument.of([Violation("header.sha256", why)], "CHECKSUM_MISMATCH")
            request_sha256 = _digest(header, sha256)
            earlier = await self._store.read(lambda session: _earlier(session, who.project, header.request_id, request_sha256))
            if earlier is not None:
                return _response(earlier)
            async with publishing(self._store, DATASETS):
                version = await ingest(path, header, self._out_uri)
                version.source_filename, version.creator = header.filename, who.creator
                manifest = await asyncio.to_thread(storage.read_bytes, storage.join(version.uri, "manifest.json"))
                manifest_sha256 = hashlib.sha256(manifest).hexdigest()

                def work(session: Session) -> tables.DatasetVersion:
                    row = _earlier(session, who.project, header.request_id, request_sha256)
                    return row or registry.add_dataset_version(
                        session, who.project, header.dataset_id, version, manifest_sha256, header.request_id, request_sha256
                    )

                return _response(await self._store.write(work))

    async def ListDatasets(self, request: dataset_pb2.ListDatasetsRequest, context: Context) -> dataset_pb2.ListDatasetsResponse:
        """See dataset.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> tuple[Sequence[tables.Dataset], dict[str, int]]:
            query = select(tables.Dataset).where(tables.Dataset.project_id == who.project)
            if after is not None:
                query = query.where(tables.Dataset.id > after[0])
            # One whose versions were all deleted is there for its number's sake alone.
            version = tables.DatasetVersion
            of_it = (col(version.project_id) == who.project, col(version.dataset_id) == tables.Dataset.id)
            query = query.where(exists().where(*of_it))
            rows = session.exec(query.order_by(tables.Dataset.id).limit(size + 1)).all()
            return rows, registry.latest_datasets(session, who.project, [row.id for row in rows])

        rows, latest = await self._store.read(work)
        response = dataset_pb2.ListDatasetsResponse(
            datasets=[
                dataset_pb2.Dataset(
                    name=f"projects/{row.project_id}/datasets/{row.id}",
                    latest_version=f"{row.id}@{latest[row.id]}",
                    create_time=messages.stamp(row.create_time),
                )
                for row in rows[:size]
            ]
        )
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def GetDatasetVersion(
        self, request: dataset_pb2.GetDatasetVersionRequest, context: Context
    ) -> dataset_pb2.GetDatasetVersionResponse:
        """See dataset.proto."""
        who = principal()
        who.own(request.name, "datasets", "versions")
        ref = parse_version_ref(request.name, "name", "datasets")
        row = await self._store.read(lambda session: registry.find_dataset(session, who.project, ref))
        return dataset_pb2.GetDatasetVersionResponse(dataset_version=_version(row))

    async def ListDatasetVersions(
        self, request: dataset_pb2.ListDatasetVersionsRequest, context: Context
    ) -> dataset_pb2.ListDatasetVersionsResponse:
        """See dataset.proto."""
        who = principal()
        (dataset_id,) = who.own(request.parent, "datasets", field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[tables.DatasetVersion]:
            registry.find_dataset(session, who.project, VersionRef(dataset_id))
            version = tables.DatasetVersion
            query = select(version).where(version.project_id == who.project, version.dataset_id == dataset_id)
            if after is not None:
                query = query.where(version.version < after[0])
            return session.exec(query.order_by(col(version.version).desc()).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = dataset_pb2.ListDatasetVersionsResponse(dataset_versions=[_version(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].version)
        return response

    async def DeleteDatasetVersion(
        self, request: dataset_pb2.DeleteDatasetVersionRequest, context: Context
    ) -> dataset_pb2.DeleteDatasetVersionResponse:
        """See dataset.proto."""
        who = principal()
        who.own(request.name, "datasets", "versions")
        ref = parse_version_ref(request.name, "name", "datasets")
        await self._store.write(lambda session: delete_dataset_version(session, who.project, ref))
        self._notifier.notify(COLLECTOR)
        return dataset_pb2.DeleteDatasetVersionResponse()


def _check_header(item: dataset_pb2.UploadDatasetRequest) -> dataset_pb2.UploadDatasetHeader:
    if item.WhichOneof("item") != "header":
        raise InvalidArgument.of([Violation("header", "missing: the first message has to be the header")])
    header = item.header
    check_id(header.dataset_id, "header.dataset_id")
    if header.HasField("test_fraction") and not 0 <= header.test_fraction <= 0.5:
        raise InvalidArgument.of([Violation("header.test_fraction", f"{header.test_fraction} is not between 0 and 0.5")])
    return header


def _digest(header: dataset_pb2.UploadDatasetHeader, sha256: str) -> str:
    body = dataset_pb2.UploadDatasetHeader()
    body.CopyFrom(header)
    body.sha256 = sha256
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()


def _earlier(session: Session, project: str, request_id: str, request_sha256: str) -> tables.DatasetVersion | None:
    if not request_id:
        return None
    version = tables.DatasetVersion
    row = session.exec(select(version).where(version.project_id == project, version.request_id == request_id)).first()
    if row is not None and row.request_sha256 != request_sha256:
        why = f"request_id {request_id!r} made {row.dataset_id}@{row.version} from another file or with other settings"
        raise AlreadyExists(why, "REQUEST_ID_REUSED")
    return row


def _version(row: tables.DatasetVersion) -> dataset_pb2.DatasetVersion:
    return messages.parse(row.document, dataset_pb2.DatasetVersion())


def _response(row: tables.DatasetVersion) -> dataset_pb2.UploadDatasetResponse:
    return dataset_pb2.UploadDatasetResponse(dataset_version=_version(row))
