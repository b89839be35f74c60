"""Data sets, models, endpoints and administration of the fake coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from luthier.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    member_pb2,
    member_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    secret_pb2,
    secret_pb2_grpc,
)
from tests.support.fake_calls import Failure, Service, page, refuse

if TYPE_CHECKING:
    from tests.support.fake_services import FakeCoordinator


def _find_version(fake: FakeCoordinator, context: Any, held: dict[str, list[Any]], name: str) -> Any:
    _, _, collection, thing, _, version = name.split("/")
    versions = held.get(thing, [])
    for item in versions:
        aliases = getattr(item, "aliases", ())
        if item.name.endswith(f"/{version}") or version in aliases:
            return item
    if version != "latest" or not versions:
        refuse(context, Failure(grpc.StatusCode.NOT_FOUND, f"there is no {collection[:-1]} {thing}@{version}", "NOT_FOUND"))
    return versions[-1]


class Datasets(Service, dataset_pb2_grpc.DatasetServiceServicer):
    def UploadDataset(self, request_iterator: Iterable[Any], context: Any) -> Any:
        fake = self.fake
        header, body = None, b""
        for item in request_iterator:
            if item.WhichOneof("item") == "header":
                header = item.header
                fake.enter(context, "UploadDataset", header)
            else:
                body += item.chunk
        assert header is not None

        def make() -> Any:
            versions = fake.datasets[header.dataset_id]
            version = dataset_pb2.DatasetVersion(
                name=f"{header.parent}/datasets/{header.dataset_id}/versions/{len(versions) + 1}",
                row_count=body.count(b"\n"),
                content_hash=header.sha256,
                schema=dataset_pb2.DatasetSchema(
                    shape=dataset_pb2.ROW_SHAPE_TEXT_LABEL, columns=header.columns, labels=["a", "b"]
                ),
                splits=[
                    dataset_pb2.DatasetSplit(name="train", row_count=body.count(b"\n") - 1),
                    dataset_pb2.DatasetSplit(name="test", row_count=1),
                ],
                state=dataset_pb2.DATASET_STATE_READY,
                source_filename=header.filename,
            )
            versions.append(version)
            fake.uploads[version.name] = body
            return version

        version = fake.once(context, header.request_id, header.SerializeToString(), make)
        return dataset_pb2.UploadDatasetResponse(dataset_version=version)

    def ListDatasets(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListDatasets", request)
        held = [
            dataset_pb2.Dataset(name=f"projects/default/datasets/{name}", latest_version=f"{name}@{len(versions)}")
            for name, versions in sorted(self.fake.datasets.items())
        ]
        datasets, token = page(held, request)
        return dataset_pb2.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    def GetDatasetVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetDatasetVersion", request)
        version = _find_version(self.fake, context, self.fake.datasets, request.name)
        return dataset_pb2.GetDatasetVersionResponse(dataset_version=version)

    def ListDatasetVersions(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListDatasetVersions", request)
        versions, token = page(self.fake.datasets[request.parent.split("/")[-1]][::-1], request)
        return dataset_pb2.ListDatasetVersionsResponse(dataset_versions=versions, next_page_token=token)

    def DeleteDatasetVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteDatasetVersion", request)
        version = _find_version(self.fake, context, self.fake.datasets, request.name)
        self.fake.datasets[request.name.split("/")[3]].remove(version)
        return dataset_pb2.DeleteDatasetVersionResponse()


class Models(Service, model_pb2_grpc.ModelServiceServicer):
    def UploadModel(self, request_iterator: Iterable[Any], context: Any) -> Any:
        fake = self.fake
        header, path, body = None, "", {}
        for item in request_iterator:
            match item.WhichOneof("item"):
                case "header":
                    header = item.header
                    fake.enter(context, "UploadModel", header)
                case "file":
                    path = item.file.path
                    body[path] = b""
                case "chunk":
                    body[path] += item.chunk
        assert header is not None

        def make() -> Any:
            version = self.add(header.model_id, base=header.source, method="import")
            fake.uploads |= {f"{version.name}/{name}": content for name, content in body.items()}
            return version

        version = fake.once(context, header.request_id, header.SerializeToString(), make)
        return model_pb2.UploadModelResponse(model_version=version)

    def add(self, model: str, **values: Any) -> model_pb2.ModelVersion:
        versions = self.fake.models[model]
        version = model_pb2.ModelVersion(name=f"projects/default/models/{model}/versions/{len(versions) + 1}", **values)
        versions.append(version)
        return version

    def ListModels(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListModels", request)
        held = [
            model_pb2.Model(name=f"projects/default/models/{name}", latest_version=f"{name}@{len(versions)}")
            for name, versions in sorted(self.fake.models.items())
        ]
        models, token = page(held, request)
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    def GetModelVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetModelVersion", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        return model_pb2.GetModelVersionResponse(model_version=version)

    def ListModelVersions(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListModelVersions", request)
        versions, token = page(self.fake.models[request.parent.split("/")[-1]][::-1], request)
        return model_pb2.ListModelVersionsResponse(model_versions=versions, next_page_token=token)

    def DeleteModelVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteModelVersion", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        self.fake.models[request.name.split("/")[3]].remove(version)
        return model_pb2.DeleteModelVersionResponse()

    def SetAlias(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "SetAlias", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        version.aliases.append(request.alias)
        return model_pb2.SetAliasResponse(model_version=version)

    def GetLineage(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetLineage", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        return model_pb2.GetLineageResponse(nodes=self.fake.lineage[version.name])


class Endpoints(Service, endpoint_pb2_grpc.EndpointServiceServicer):
    def DeployEndpoint(self, request: Any, context: Any) -> Any:
        fake = self.fake
        fake.enter(context, "DeployEndpoint", request)
        name = f"{request.parent}/endpoints/{request.endpoint_id}"
        endpoint = endpoint_pb2.Endpoint()
        endpoint.CopyFrom(request.endpoint)
        endpoint.name, endpoint.url, endpoint.state = name, fake.gateway_url, endpoint_pb2.ENDPOINT_STATE_DEPLOYING
        if not request.validate_only:
            fake.endpoints[name] = endpoint
        return endpoint_pb2.DeployEndpointResponse(endpoint=endpoint)

    def UpdateEndpoint(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "UpdateEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.endpoint.name)
        if "routes" in request.update_mask.paths:
            del endpoint.routes[:]
            endpoint.routes.extend(request.endpoint.routes)
        if request.rollout_action == endpoint_pb2.ROLLOUT_ACTION_PROMOTE:
            endpoint.rollout_status.state = endpoint_pb2.ROLLOUT_STATE_PROMOTED
        elif request.rollout_action == endpoint_pb2.ROLLOUT_ACTION_ROLL_BACK:
            endpoint.rollout_status.state = endpoint_pb2.ROLLOUT_STATE_ROLLED_BACK
        return endpoint_pb2.UpdateEndpointResponse(endpoint=endpoint)

    def WatchEndpoint(self, request: Any, context: Any) -> Any:
        """One state, one more after an event, and gone."""
        self.fake.enter(context, "WatchEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.name)
        for number, percent in enumerate((20, 100), 1):
            endpoint.etag = f'"{number}"'
            endpoint.rollout_status.percent = percent
            endpoint.rollout_status.state = endpoint_pb2.ROLLOUT_STATE_PROGRESSING
            endpoint.events.add(message=f"{percent}% of the traffic goes to tickets@2").time.FromSeconds(number)
            if percent == 100:
                endpoint.rollout_status.state = endpoint_pb2.ROLLOUT_STATE_PROMOTED
            yield endpoint_pb2.WatchEndpointResponse(endpoint=endpoint)
        del self.fake.endpoints[request.name]

    def GetEndpoint(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.name)
        answer = endpoint_pb2.GetEndpointResponse(endpoint=endpoint)
        # Each look brings it on: deploying, then ready; deleting, then gone.
        if endpoint.state == endpoint_pb2.ENDPOINT_STATE_DEPLOYING:
            endpoint.state = endpoint_pb2.ENDPOINT_STATE_READY
        elif endpoint.state == endpoint_pb2.ENDPOINT_STATE_DELETING:
            del self.fake.endpoints[request.name]
        return answer

    def ListEndpoints(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListEndpoints", request)
        endpoints, token = page(list(self.fake.endpoints.values()), request)
        return endpoint_pb2.ListEndpointsResponse(endpoints=endpoints, next_page_token=token)

    def DeleteEndpoint(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.name)
        endpoint.state = endpoint_pb2.ENDPOINT_STATE_DELETING
        return endpoint_pb2.DeleteEndpointResponse(endpoint=endpoint)


class Secrets(Service, secret_pb2_grpc.SecretServiceServicer):
    def SetSecret(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "SetSecret", request)
        secret = self.fake.secrets.setdefault(request.name, secret_pb2.Secret(name=request.name))
        secret.update_time.GetCurrentTime()
        return secret_pb2.SetSecretResponse(secret=secret)

    def ListSecrets(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListSecrets", request)
        secrets, token = page([self.fake.secrets[name] for name in sorted(self.fake.secrets)], request)
        return secret_pb2.ListSecretsResponse(secrets=secrets, next_page_token=token)

    def DeleteSecret(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteSecret", request)
        del self.fake.secrets[self.fake.find(context, self.fake.secrets, request.name).name]
        return secret_pb2.DeleteSecretResponse()


class Members(Service, member_pb2_grpc.MemberServiceServicer):
    def SetMember(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "SetMember", request)
        self.fake.members[request.member.name] = request.member
        return member_pb2.SetMemberResponse(member=request.member)

    def ListMembers(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListMembers", request)
        members, token = page([self.fake.members[name] for name in sorted(self.fake.members)], request)
        return member_pb2.ListMembersResponse(members=members, next_page_token=token)

    def RemoveMember(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "RemoveMember", request)
        member = self.fake.members.pop(self.fake.find(context, self.fake.members, request.name).name)
        revoked = [key for key in self.fake.keys if key.member == member.name.rpartition("/")[2]]
        return member_pb2.RemoveMemberResponse(revoked_keys=revoked)


class Admin(Service, admin_pb2_grpc.AdminServiceServicer):
    def CreateKey(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "CreateKey", request)
        key = admin_pb2.Key()
        key.CopyFrom(request.key)
        key.name = f"{request.parent}/keys/k-{len(self.fake.keys) + 1}"
        self.fake.keys.insert(0, key)
        return admin_pb2.CreateKeyResponse(key=key, token="lut_" + "n" * 43)

    def ListKeys(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListKeys", request)
        keys, token = page(self.fake.keys, request)
        return admin_pb2.ListKeysResponse(keys=keys, next_page_token=token)

    def RevokeKey(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "RevokeKey", request)
        key = self.fake.find(context, {key.name: key for key in self.fake.keys}, request.name)
        key.revoke_time.GetCurrentTime()
        return admin_pb2.RevokeKeyResponse(key=key)

    def CreateProject(self, request: Any, context: Any) -> Any:
        fake = self.fake
        fake.enter(context, "CreateProject", request)
        name = f"projects/{request.project_id}"
        if name in fake.projects:
            refuse(context, Failure(grpc.StatusCode.ALREADY_EXISTS, f"there is a {name} already", "PROJECT_EXISTS"))
        project = admin_pb2.Project()
        project.CopyFrom(request.project)
        project.name, project.etag = name, '"1"'
        fake.projects[name] = project
        return admin_pb2.CreateProjectResponse(project=project)

    def GetProject(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetProject", request)
        return admin_pb2.GetProjectResponse(project=self.fake.find(context, self.fake.projects, request.name))

    def ListProjects(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListProjects", request)
        projects, token = page([self.fake.projects[name] for name in sorted(self.fake.projects)], request)
        return admin_pb2.ListProjectsResponse(projects=projects, next_page_token=token)

    def UpdateProject(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "UpdateProject", request)
        project = self.fake.find(context, self.fake.projects, request.project.name)
        if request.etag and request.etag != project.etag:
            refuse(context, Failure(grpc.StatusCode.ABORTED, "changed since it was read", "ETAG_MISMATCH"))
        for path in request.update_mask.paths:
            project.ClearField(path)
        request.update_mask.MergeMessage(request.project, project)
        project.etag = f'"{int(project.etag.strip(chr(34)) or 0) + 1}"'
        return admin_pb2.UpdateProjectResponse(project=project)

    def GetStatus(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetStatus", request)
        return self.fake.status

    def BackupRecords(self, request: Any, context: Any) -> Iterator[Any]:
        fake = self.fake
        fake.enter(context, "BackupRecords", request)
        yield admin_pb2.BackupRecordsResponse(progress=admin_pb2.BackupProgress(rows=3, total_rows=12))
        digest = hashlib.sha256(fake.backup).hexdigest()
        summary = admin_pb2.BackupSummary(size_bytes=len(fake.backup), sha256=digest, schema="0015", without="artifacts and keys")
        summary.rows.update({"job": 5, "job_event": 7})
        yield admin_pb2.BackupRecordsResponse(summary=summary)
        content = fake.backup_sent or fake.backup
        for start in range(0, len(content), 1 << 19):
            if start:
                fake.enter(context, "BackupRecords.chunk", request)
            yield admin_pb2.BackupRecordsResponse(chunk=content[start : start + (1 << 19)])
