"""The coordinator's side of TLS: what it shows, whom it lets in, and what agents are told."""

from __future__ import annotations

import grpc

from common.errors import FailedPrecondition
from common.settings import Settings
from common.tls import REASON, read_ca, read_pair


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The credentials to listen with; None where TLS is not set up. Raises FailedPrecondition naming a bad setting."""
    pair = read_pair(settings.tls_cert, settings.tls_key, "LUTHIER_TLS_CERT", "LUTHIER_TLS_KEY")
    if pair is None:
        if settings.tls_client_ca is not None:
            raise FailedPrecondition("LUTHIER_TLS_CLIENT_CA is set, which needs LUTHIER_TLS_CERT and LUTHIER_TLS_KEY", REASON)
        return None
    clients = read_ca(settings.tls_client_ca, "LUTHIER_TLS_CLIENT_CA") if settings.tls_client_ca is not None else None
    _check_agents(settings)
    return grpc.ssl_server_credentials([pair], root_certificates=clients, require_client_auth=clients is not None)


def agent_environment(settings: Settings) -> dict[str, str]:
    """What tells agents to speak TLS: paths on their nodes, never what is in the files."""
    paths = {
        "LUTHIER_AGENT_CA": settings.agent_ca,
        "LUTHIER_AGENT_CERT": settings.agent_cert,
        "LUTHIER_AGENT_KEY": settings.agent_key,
    }
    return {name: path for name, path in paths.items() if path}


def _check_agents(settings: Settings) -> None:
    """Agents that could never report are found out now, not when the first job starts."""
    if not settings.agent_ca:
        why = "name the file, as the cluster's nodes have it, with the CA of LUTHIER_TLS_CERT"
        raise FailedPrecondition(f"LUTHIER_AGENT_CA is not set, so agents could not report over TLS; {why}", REASON)
    if settings.tls_client_ca is not None and not (settings.agent_cert and settings.agent_key):
        why = "name the files, as the cluster's nodes have them, of a certificate that LUTHIER_TLS_CLIENT_CA knows"
        raise FailedPrecondition(f"LUTHIER_AGENT_CERT and LUTHIER_AGENT_KEY have to be set for mutual TLS; {why}", REASON)
