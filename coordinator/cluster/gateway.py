"""Asking the gateway what it counted, over HTTP, with a token of the coordinator's own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SECONDS = 5.0


@dataclass(frozen=True)
class GatewayReport:
    """What the gateway says of itself (serving/gateway/traffic.py)."""

    version: str = ""  # of the snapshot that it goes by
    adapters: Mapping[str, str] = field(default_factory=dict)  # by `app/adapter`: empty where it applies, else what is wrong
    started: str = ""  # counts begin anew with another one
    in_flight: Mapping[str, int] = field(default_factory=dict)  # by application
    routes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # counts by `project/endpoint/model_version`


class GatewayClient:
    """Asks one gateway."""

    def __init__(self, url: str, token: str) -> None:
        self._request = urllib.request.Request(f"{url}/-/report", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
        # A proxy of the environment has no way to the gateway.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def report(self) -> GatewayReport | None:
        """What it says; None where it does not answer, or does not know this coordinator yet. Blocks."""
        try:
            with self._opener.open(self._request, timeout=SECONDS) as answer:
                return GatewayReport(**json.load(answer))
        except (OSError, ValueError, TypeError, urllib.error.URLError):
            return None
