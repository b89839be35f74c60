"""From the word that an error carries to why a run ended; for agents, and for the coordinator where an agent died."""

from __future__ import annotations

BAD_DATA = "BAD_DATA"
OUT_OF_MEMORY = "OUT_OF_MEMORY"
WORKER_LOST = "WORKER_LOST"
NOT_PLACED = "NOT_PLACED"
HANG = "HANG"

_REASONS = {
    BAD_DATA: "BAD_DATA",
    OUT_OF_MEMORY: "OUT_OF_MEMORY",
    WORKER_LOST: "NODE_LOST",
    NOT_PLACED: "LAUNCH_FAILED",
    HANG: "HANG",
}


def end_reason(code: str) -> str:
    """The contract's EndReason, without its prefix, for an error's code; ERROR for every code of a job's own."""
    return _REASONS.get(code, "ERROR")
