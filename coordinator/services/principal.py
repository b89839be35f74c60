"""Who calls, and what each call needs."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from common import scopes
from common.errors import NotFound, PermissionDenied, Unauthenticated
from common.names import parse
from luthier.v1 import admin_pb2

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

Context: TypeAlias = "ServicerContext[Any, Any]"
"""What gRPC hands to every call."""

VIEWER, EDITOR, ADMIN, OPERATOR = (
    admin_pb2.ROLE_VIEWER,
    admin_pb2.ROLE_EDITOR,
    admin_pb2.ROLE_ADMIN,
    admin_pb2.ROLE_OPERATOR,
)

NEEDS: dict[str, admin_pb2.Role.ValueType] = {
    "/luthier.v1.JobService/CreateJob": EDITOR,
    "/luthier.v1.JobService/EstimateJob": VIEWER,
    "/luthier.v1.JobService/GetJob": VIEWER,
    "/luthier.v1.JobService/ListJobs": VIEWER,
    "/luthier.v1.JobService/UpdateJob": EDITOR,
    "/luthier.v1.JobService/CancelJob": EDITOR,
    "/luthier.v1.JobService/PauseJob": EDITOR,
    "/luthier.v1.JobService/ResumeJob": EDITOR,
    "/luthier.v1.JobService/DeleteJob": EDITOR,
    "/luthier.v1.JobService/WatchJob": VIEWER,
    "/luthier.v1.JobService/WatchJobs": VIEWER,
    "/luthier.v1.JobService/TailLogs": VIEWER,
    "/luthier.v1.JobService/ListCheckpoints": VIEWER,
    "/luthier.v1.JobService/ListJobMetrics": VIEWER,
    "/luthier.v1.DatasetService/UploadDataset": EDITOR,
    "/luthier.v1.DatasetService/ListDatasets": VIEWER,
    "/luthier.v1.DatasetService/GetDatasetVersion": VIEWER,
    "/luthier.v1.DatasetService/ListDatasetVersions": VIEWER,
    "/luthier.v1.DatasetService/DeleteDatasetVersion": EDITOR,
    "/luthier.v1.ModelService/UploadModel": EDITOR,
    "/luthier.v1.ModelService/ListModels": VIEWER,
    "/luthier.v1.ModelService/GetModelVersion": VIEWER,
    "/luthier.v1.ModelService/ListModelVersions": VIEWER,
    "/luthier.v1.ModelService/SetAlias": EDITOR,
    "/luthier.v1.ModelService/GetLineage": VIEWER,
    "/luthier.v1.ModelService/DeleteModelVersion": EDITOR,
    "/luthier.v1.ScheduleService/CreateSchedule": EDITOR,
    "/luthier.v1.ScheduleService/GetSchedule": VIEWER,
    "/luthier.v1.ScheduleService/ListSchedules": VIEWER,
    "/luthier.v1.ScheduleService/UpdateSchedule": EDITOR,
    "/luthier.v1.ScheduleService/DeleteSchedule": EDITOR,
    "/luthier.v1.ScheduleService/RunSchedule": EDITOR,
    "/luthier.v1.EndpointService/DeployEndpoint": EDITOR,
    "/luthier.v1.EndpointService/UpdateEndpoint": EDITOR,
    "/luthier.v1.EndpointService/WatchEndpoint": VIEWER,
    "/luthier.v1.EndpointService/GetEndpoint": VIEWER,
    "/luthier.v1.EndpointService/ListEndpoints": VIEWER,
    "/luthier.v1.EndpointService/DeleteEndpoint": EDITOR,
    "/luthier.v1.SecretService/SetSecret": EDITOR,
    "/luthier.v1.SecretService/ListSecrets": VIEWER,
    "/luthier.v1.SecretService/DeleteSecret": EDITOR,
    "/luthier.v1.MemberService/SetMember": ADMIN,
    "/luthier.v1.MemberService/ListMembers": VIEWER,
    "/luthier.v1.MemberService/RemoveMember": ADMIN,
    "/luthier.v1.AdminService/CreateKey": ADMIN,
    "/luthier.v1.AdminService/ListKeys": ADMIN,
    "/luthier.v1.AdminService/RevokeKey": ADMIN,
    "/luthier.v1.AdminService/CreateProject": OPERATOR,
    "/luthier.v1.AdminService/GetProject": VIEWER,
    "/luthier.v1.AdminService/ListProjects": VIEWER,
    "/luthier.v1.AdminService/UpdateProject": OPERATOR,
    "/luthier.v1.AdminService/GetStatus": VIEWER,
    "/luthier.v1.AdminService/BackupRecords": OPERATOR,
}
"""The least role for every call that takes a key. A call that is missing here is refused."""

NOUNS: dict[str, str] = {
    "/luthier.v1.JobService/": "jobs",
    "/luthier.v1.ScheduleService/": "jobs",
    "/luthier.v1.DatasetService/": "datasets",
    "/luthier.v1.ModelService/": "models",
    "/luthier.v1.EndpointService/": "endpoints",
    "/luthier.v1.SecretService/": "secrets",
    "/luthier.v1.MemberService/": "members",
    "/luthier.v1.AdminService/CreateKey": "keys",
    "/luthier.v1.AdminService/ListKeys": "keys",
    "/luthier.v1.AdminService/RevokeKey": "keys",
    "/luthier.v1.AdminService/CreateProject": "projects",
    "/luthier.v1.AdminService/GetProject": "projects",
    "/luthier.v1.AdminService/ListProjects": "projects",
    "/luthier.v1.AdminService/UpdateProject": "projects",
    "/luthier.v1.AdminService/GetStatus": "",
    "/luthier.v1.AdminService/BackupRecords": "projects",
}
"""What each call is about, for keys with scopes: a whole service, or one call. Nothing where any key may, and a call that is
missing here is refused to keys with scopes."""

READS = ("Get", "List", "Watch", "Tail", "Estimate")
"""What the names of calls begin with that only look."""

OPEN = ("/grpc.health.v1.Health/", "/luthier.agent.v1.AgentService/")
"""Services that take no key: health tells nothing, and agents prove themselves by their run's secret."""


@dataclass(frozen=True)
class Principal:
    """The key behind a call. Its role is what counts: the lesser one of the key and its member."""

    project: str
    key_id: str
    display_name: str
    role: admin_pb2.Role.ValueType
    scopes: tuple[str, ...] = ()
    member: str = ""

    @property
    def creator(self) -> str:
        """Who is named as having made something: the key's member, else the key."""
        return self.member or self.display_name

    def own(self, name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
        """Ids of a resource name without its project. Another project's name is NotFound, whether or not it exists."""
        project, *ids = parse(name, "projects", *collections, field=field)
        if project != self.project:
            raise NotFound(f"there is no {name}")
        return tuple(ids)

    def administered(self, name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
        """Project and ids of a name in any project for operators, else in the key's own: NotFound for another's."""
        project, *ids = parse(name, "projects", *collections, field=field)
        if self.role < OPERATOR and project != self.project:
            raise NotFound(f"there is no {name}")
        return project, *ids

    def may(self, scope: str) -> bool:
        """Whether the key's scopes allow what needs `scope`."""
        return scopes.allowed(self.scopes, scope)


def scope_of(method: str) -> str | None:
    """The scope that a call needs of a key that has scopes; empty where any will do, None for a call that nobody listed."""
    service, _, name = method.rpartition("/")
    noun = NOUNS.get(method, NOUNS.get(f"{service}/"))
    return noun + scopes.READ if noun and name.startswith(READS) else noun


def check_scope(who: Principal, method: str) -> None:
    """Raise PermissionDenied, naming the scope, where the key behind a call has scopes and none of them allows it."""
    needed = scope_of(method)
    if who.scopes and needed != "" and (needed is None or not who.may(needed)):
        lacks = f"the scope {needed}" if needed else "a scope for this call; make one without scopes"
        raise PermissionDenied(f"this key lacks {lacks}; it has {', '.join(who.scopes)}", "SCOPE_MISSING")


current: ContextVar[Principal] = ContextVar("principal")


def principal() -> Principal:
    """Who makes the present call."""
    try:
        return current.get()
    except LookupError:
        raise Unauthenticated("this call needs a key") from None
