"""The channel from an agent to the coordinator."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from common.tls import read_ca, read_pair


def open_channel(address: str) -> grpc.Channel:
    """Open a channel to the coordinator; the only place where agents make one.

    Over TLS where the environment names a CA. The launcher sets it for the run's driver, and Ray hands it on to the ranks. Raises
    FailedPrecondition where this node does not have the files.
    """
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    ca, cert, key = (os.environ.get(f"LUTHIER_AGENT_{name}") for name in ("CA", "CERT", "KEY"))
    if not ca:
        return grpc.insecure_channel(address, options=options)
    pair = read_pair(Path(cert) if cert else None, Path(key) if key else None, "LUTHIER_AGENT_CERT", "LUTHIER_AGENT_KEY")
    credentials = grpc.ssl_channel_credentials(read_ca(Path(ca), "LUTHIER_AGENT_CA"), *(pair or ()))
    return grpc.secure_channel(address, credentials, options=options)
