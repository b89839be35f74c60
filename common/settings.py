"""The one settings object of a stack: a file, the environment and flags, in that order of increasing strength."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def default_home() -> Path:
    """Where a stack keeps everything unless told otherwise."""
    return Path.home() / ".luthier"


class Settings(BaseSettings):
    """What a coordinator needs to know. Each field is also the environment variable `LUTHIER_<FIELD>`.

    `<home>/luthier.toml` is read first, the environment overrides it, and arguments override both.
    """

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", extra="ignore")

    home: Path = Field(default_factory=default_home, description="Folder of the stack: store, keys, logs, local storage.")
    host: str = Field("127.0.0.1", description="Address the gRPC server listens on.")
    port: int = Field(7420, ge=0, le=65535, description="Port of the gRPC server; 0 picks a free one.")
    advertise: str = Field(
        "",
        description="host:port at which agents on other nodes reach the coordinator; host:port if empty. Where several run on one"
        " store: a name that resolves to all of them, or ipv4:A:PORT,B:PORT.",
    )
    store_url: str = Field("", description="SQLAlchemy URL of the records; SQLite in the home if empty.")
    storage_uri: str = Field("", description="URI under which artifacts are kept; a folder in the home if empty.")
    ray_address: str = Field("", description="URL of the Ray dashboard (http://host:8265); empty while there is none.")
    ray_gcs_address: str = Field(
        "",
        description="host:port of Ray's GCS (6379 on the head), by which its autoscaler is told what is queued; empty where the"
        " cluster has no autoscaler.",
    )
    ray_token_path: Path | None = Field(None, description="File with Ray's token; no token is sent if empty.")
    agent_python: str = Field("python", description="Python interpreter of the agents on the cluster's nodes.")
    tls_cert: Path | None = Field(None, description="File with the gRPC server's certificate; without one nothing is encrypted.")
    tls_key: Path | None = Field(None, description="File with the private key of tls_cert.")
    tls_client_ca: Path | None = Field(
        None, description="File with the CA that has to have signed clients' certificates, if any."
    )
    agent_ca: str = Field("", description="File, on the cluster's nodes, with the CA of tls_cert, for agents to check it.")
    agent_cert: str = Field(
        "", description="File, on the cluster's nodes, with the certificate that agents show (tls_client_ca)."
    )
    agent_key: str = Field("", description="File, on the cluster's nodes, with the private key of agent_cert.")
    gateway_host: str = Field("127.0.0.1", description="Address the HTTP gateway listens on.")
    gateway_port: int = Field(8000, ge=1, le=65535, description="Port of the HTTP gateway.")
    secrets_key_path: Path | None = Field(
        None,
        description="File with the keys that secrets are encrypted with, one a line, the newest first; if empty, secrets.key in"
        " the home, made at the first start. Several coordinators on one store need the same.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address that Prometheus asks for metrics.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the metrics; 0 picks a free one, and there are none if it is absent."
    )
    otlp_endpoint: str = Field(
        "", description="Collector that traces go to, by OTLP over gRPC (http://host:4317); there are no traces if empty."
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Part of the traces kept of those that begin here; a caller's own are kept if he keeps them."
    )
    local_bases: bool = Field(True, description="Whether admins may name base models by absolute path on the cluster.")
    checkpoint_days: float = Field(
        7.0, ge=0, description="Days after which the checkpoints of a job that succeeded and registered its model are deleted."
    )
    event_days: float = Field(
        30.0, ge=0, description="Days after its end for which all events of a job are kept; then only its last. inf for good."
    )
    log_days: float = Field(90.0, ge=0, description="Days after its end for which a job's log lines are kept; inf for good.")
    log_lines: int = Field(200_000, ge=1000, description="Log lines of a job that are kept; the oldest go first.")
    max_streams: int = Field(4096, ge=1, description="Watches and log followers that may be open at once; some 30 kB each.")
    max_project_streams: int = Field(2048, ge=1, description="Of these, the most that one project may have open.")
    max_upload_bytes: int = Field(16 * 2**30, gt=0, description="Largest data set or model file that is taken.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the signature is pydantic's)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the file below the environment, and the environment below the arguments."""
        home = init_settings().get("home") or env_settings().get("home") or default_home()
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(home) / "luthier.toml")

    @property
    def database_url(self) -> str:
        """URL of the records."""
        return self.store_url or f"sqlite:///{self.home / 'luthier.db'}"

    @property
    def storage(self) -> str:
        """URI of the artifacts' root, without a trailing slash."""
        return self.storage_uri.rstrip("/") or (self.home / "storage").absolute().as_uri()
