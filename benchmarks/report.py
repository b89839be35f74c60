"""What every benchmark shares: where it ran, how a ratio is told, and where the result is kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and 95th percentile of a sample."""

    median: float
    lower: float
    upper: float
    p95: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Summarise at least four values."""
        quarters = statistics.quantiles(sample, n=4)
        return cls(statistics.median(sample), quarters[0], quarters[2], statistics.quantiles(sample, n=20)[18])


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ray", "grpcio", "torch", "transformers", "deepspeed")},
        "load_before": os.getloadavg()[0],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def keep(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write a result file, to be committed with the table in README.md."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, **result}, indent=2) + "\n")
    return path
