"""Who asks, and by which host name."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping

from serving.gateway.errors import ApiError, unauthenticated
from serving.gateway.snapshot import Key, Snapshot


def authenticate(headers: Mapping[str, str], snapshot: Snapshot) -> Key:
    """Return the key of a request, or raise a 401."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise unauthenticated("You did not provide an API key. Send it as 'Authorization: Bearer KEY'.", code=None)
    # Looked up by digest: how long that takes says nothing about the secret.
    key = snapshot.keys.get(hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest())
    if key is None:
        raise unauthenticated("Incorrect API key provided.")
    if key.expire_time is not None and key.expire_time <= time.time():
        raise unauthenticated("The API key has expired.")
    return key


def only_coordinator(headers: Mapping[str, str], snapshot: Snapshot) -> None:
    """Raise a 404 unless the coordinator asks: nobody else has to know that there is something."""
    token = headers.get("authorization", "").partition(" ")[2].strip()
    digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
    if not snapshot.coordinator or not hmac.compare_digest(digest, snapshot.coordinator):
        raise ApiError(404, "Unknown request URL: GET /-/report.", "unknown_url")


def check_host(host_header: str | None, snapshot: Snapshot) -> None:
    """Raise a 403 where a browser was led here under a foreign name (DNS rebinding)."""
    if snapshot.allowed_hosts and host_name(host_header or "") not in snapshot.allowed_hosts:
        raise ApiError(403, "This host name is not one that the gateway answers to.", "host_not_allowed")


def host_name(header: str) -> str:
    """Return a Host header without its port, in lower case; IPv6 addresses without brackets."""
    header = header.strip().lower()
    if header.startswith("["):
        name, closed, rest = header[1:].partition("]")
        return name if closed and (not rest or (rest[0] == ":" and rest[1:].isdigit())) else ""
    name, _, port = header.partition(":")
    return name.rstrip(".") if not port or port.isdigit() else ""
