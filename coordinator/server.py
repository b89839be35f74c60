"""The composition root: the only place where the coordinator's parts are put together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlmodel import Session, select

from common import tracing
from common.errors import FailedPrecondition
from common.settings import Settings
from coordinator import metrics, secret_store
from coordinator.cluster.launcher import Launcher
from coordinator.cluster.ray_cluster import RayCluster
from coordinator.collector import Collector
from coordinator.compaction import Retention
from coordinator.endpoints.reconcile import Deployer
from coordinator.exposition import exposed
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.tokens import sha256
from coordinator.notify import Notifier
from coordinator.schedules.runner import ScheduleRunner
from coordinator.services.admin import AdminService, static_status
from coordinator.services.agent import AgentService
from coordinator.services.datasets import DatasetService
from coordinator.services.endpoints import EndpointService
from coordinator.services.interceptor import Guard
from coordinator.services.jobs import JobService
from coordinator.services.keys import Keys
from coordinator.services.members import MemberService
from coordinator.services.models import ModelService
from coordinator.services.schedules import ScheduleService
from coordinator.services.secrets import SecretService
from coordinator.services.streams import Streams
from coordinator.services.uploads import Staging
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.migrate import upgrade
from coordinator.store.restore import restored
from coordinator.tls import agent_environment, server_credentials
from coordinator.vault import Vault
from luthier.agent.v1 import agent_pb2, agent_pb2_grpc
from luthier.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    member_pb2,
    member_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    schedule_pb2,
    schedule_pb2_grpc,
    secret_pb2,
    secret_pb2_grpc,
)

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""How long calls under way may take to finish when the coordinator stops."""

MAX_MESSAGE = 4 << 20
"""Bytes of one gRPC message. Uploads come in chunks of at most 1 MiB."""

MAX_PENDING = 100_000
"""Calls that have arrived and that nobody has looked at yet."""

PROJECT = "default"
"""The project that every stack begins with."""

ADMIN_KEY_FILE = "admin.key"
"""File in the home with the key of whoever runs the stack, made by `luthier up`."""

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (job_pb2, "JobService"),
        (dataset_pb2, "DatasetService"),
        (model_pb2, "ModelService"),
        (schedule_pb2, "ScheduleService"),
        (endpoint_pb2, "EndpointService"),
        (secret_pb2, "SecretService"),
        (member_pb2, "MemberService"),
        (admin_pb2, "AdminService"),
        (agent_pb2, "AgentService"),
    )
)


async def serve(settings: Settings) -> None:
    """Run a coordinator until SIGTERM or SIGINT. Raises FailedPrecondition where it cannot start."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(settings.home), _traced(settings):
        store = Store(settings.database_url)
        try:
            notifier = Notifier()
            server = grpc.aio.server(
                interceptors=[Guard(Keys(store, notifier), Streams(settings.max_streams, settings.max_project_streams))],
                options=[
                    ("grpc.so_reuseport", 0),
                    ("grpc.max_receive_message_length", MAX_MESSAGE),
                    ("grpc.max_send_message_length", 16 * MAX_MESSAGE),
                    # Of a flood, gRPC would drop what it has not looked at yet without a reason.
                    ("grpc.server.max_pending_requests", MAX_PENDING),
                    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
                    ("grpc.keepalive_permit_without_calls", 1),
                    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ],
            )
            address = _bind(server, settings)
            await asyncio.to_thread(upgrade, store.engine)
            with exposed(settings.metrics_host, settings.metrics_port, store) as metrics_address:
                await _run(server, store, notifier, settings, address, metrics_address)
        finally:
            store.close()


async def _run(
    server: grpc.aio.Server, store: Store, notifier: Notifier, settings: Settings, address: str, metrics_address: str
) -> None:
    vault = Vault.of(settings.secrets_key_path, settings.home)

    def begin(session: Session) -> str:
        secret_store.encrypt_anew(session, vault)
        return seed(session, settings.home)

    secret = await store.write(begin)
    cluster = RayCluster(settings.ray_address, settings.ray_token_path, settings.ray_gcs_address)
    traces = tracing.environment(settings.otlp_endpoint, settings.trace_sample_ratio)
    environment = agent_environment(settings) | traces
    launcher = Launcher(cluster, settings.advertise or address, settings.agent_python, secret, environment)
    leadership = Leadership(store, settings.advertise or address)
    mark = await store.read(restored)
    reconciler = Reconciler(store, launcher, notifier, leadership, restored=bool(mark))
    deployer = Deployer(store, cluster, notifier, leadership, settings.gateway_host, settings.gateway_port, secret, traces)
    staging = Staging(settings.home / "uploads", settings.max_upload_bytes)
    status = static_status(address, store.kind, deployer.url, settings.ray_address, metrics_address)
    _watch(leadership, reconciler)

    job_pb2_grpc.add_JobServiceServicer_to_server(JobService(store, notifier, reconciler, vault), server)
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetService(store, notifier, staging, settings.storage), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(store, notifier, staging, settings.storage), server)
    secret_pb2_grpc.add_SecretServiceServicer_to_server(SecretService(store, vault), server)
    member_pb2_grpc.add_MemberServiceServicer_to_server(MemberService(store, notifier), server)
    endpoints = EndpointService(store, notifier, reconciler, deployer)
    endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(endpoints, server)
    schedule_pb2_grpc.add_ScheduleServiceServicer_to_server(ScheduleService(store, notifier, reconciler, vault), server)
    admin = AdminService(store, notifier, reconciler, leadership, status, lambda: deployer.gateway_state, settings.home)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    agent = AgentService(store, notifier, secret, settings.storage, vault, mark)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    for name in ("", *SERVICES):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    tls = "mutual TLS" if settings.tls_client_ca else "TLS" if settings.tls_cert else "no TLS"
    log.info("serving on %s with %s, store %s, Ray at %s", address, tls, store.kind, settings.ray_address or "nowhere")
    collector = Collector(store, notifier, leadership, settings.storage, Retention.of(settings))
    runner = ScheduleRunner(store, notifier, leadership, reconciler, vault)
    loops = [asyncio.create_task(each.run()) for each in (reconciler, deployer, collector, runner)]
    running = asyncio.get_running_loop()
    leadership.run(lambda: running.call_soon_threadsafe(notifier.notify, "scheduler", "endpoints"))
    await stop.wait()
    log.info("stopping")
    await healthy.enter_graceful_shutdown()
    notifier.close()
    await server.stop(GRACE_SECONDS)
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    await asyncio.to_thread(leadership.stop)


@contextlib.contextmanager
def _traced(settings: Settings) -> Iterator[None]:
    """Send traces where the settings say to, and what is left of them at the end."""
    if settings.otlp_endpoint:
        tracing.start("luthier-coordinator", settings.otlp_endpoint, settings.trace_sample_ratio)
    try:
        yield
    finally:
        tracing.stop()


def _watch(leadership: Leadership, reconciler: Reconciler) -> None:
    """Figures of the parts, for Prometheus."""
    metrics.watch("luthier_leader", "Whether this coordinator leads.", lambda: bool(leadership.epoch))
    metrics.watch("luthier_leader_epoch", "Number of this coordinator's reign; 0 while it follows.", lambda: leadership.epoch)
    metrics.watch("luthier_ray_up", "Whether the Ray cluster answers.", lambda: reconciler.queue.capacity is not None)
    metrics.watch("luthier_cluster_nodes", "Nodes alive.", lambda: reconciler.queue.nodes)
    metrics.watch("luthier_cluster_cpus", "Logical CPUs of the cluster.", lambda: reconciler.queue.total.cpus)
    metrics.watch("luthier_cluster_gpus", "GPUs of the cluster.", lambda: reconciler.queue.total.gpus)
    metrics.watch("luthier_cluster_cpus_held", "Logical CPUs that jobs and endpoints hold.", lambda: reconciler.queue.held.cpus)
    metrics.watch("luthier_cluster_gpus_held", "GPUs that jobs and endpoints hold.", lambda: reconciler.queue.held.gpus)


def _bind(server: grpc.aio.Server, settings: Settings) -> str:
    """Take the port before anything slow begins, and return host:port."""
    wanted = f"{settings.host}:{settings.port}"
    credentials = server_credentials(settings)
    try:
        port = server.add_secure_port(wanted, credentials) if credentials else server.add_insecure_port(wanted)
    except RuntimeError:
        port = 0
    if not port:
        raise FailedPrecondition(
            f"cannot listen on {wanted}: the port is in use or not allowed; choose another with --port", "PORT_TAKEN"
        )
    return f"{settings.host}:{port}"


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home's lock, so that no two coordinators share a home. The kernel lets go of it however the process ends."""
    with (home / "coordinator.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(f"another coordinator runs in {home}; use --home for a second stack", "HOME_TAKEN") from None
        yield


def seed(session: Session, home: Path) -> str:
    """Make sure of what every stack has: its secret, the default project, the operator's key of the home. Returns the secret."""
    fact = session.get(tables.StackFact, "secret")
    if fact is None:
        fact = tables.StackFact(key="secret", value=secrets.token_urlsafe(32))
        session.add(fact)
    if session.get(tables.Project, PROJECT) is None:
        session.add(tables.Project(id=PROJECT, create_time=tables.now()))
        session.flush()
    file = home / ADMIN_KEY_FILE
    if file.exists():
        token_sha256 = sha256(file.read_text().strip())
        key = session.exec(select(tables.ApiKey).where(tables.ApiKey.token_sha256 == token_sha256)).first()
        if key is None:
            key = tables.ApiKey(
                id=f"key-{secrets.token_hex(5)}",
                project_id=PROJECT,
                display_name="admin",
                role=admin_pb2.ROLE_OPERATOR,
                token_sha256=token_sha256,
                create_time=tables.now(),
            )
        # A store from before there were operators knows whoever runs the stack as an admin.
        key.role = admin_pb2.ROLE_OPERATOR
        session.add(key)
    return fact.value
