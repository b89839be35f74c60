"""The states of a job and the moves between them, as data."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

from luthier.v1 import job_pb2


class State(StrEnum):
    """What was last observed of a job. Names are those of the contract without their prefix."""

    BLOCKED = "BLOCKED"
    """Waits for another job."""
    QUEUED = "QUEUED"
    """Waits for capacity."""
    STARTING = "STARTING"
    """Handed to Ray; not claimed by its agent yet."""
    RUNNING = "RUNNING"
    """Claimed; its agent reports."""
    PAUSING = "PAUSING"
    """Saves a checkpoint before giving its place up."""
    PAUSED = "PAUSED"
    """Holds a checkpoint and no resources."""
    SUCCEEDED = "SUCCEEDED"
    """Ended with a result."""
    FAILED = "FAILED"
    """Ended with an error."""
    CANCELLED = "CANCELLED"
    """Ended because somebody asked."""

    @property
    def proto(self) -> job_pb2.JobState.ValueType:
        """The same state in the contract."""
        return job_pb2.JobState.Value(f"JOB_STATE_{self.value}")


MOVES = MappingProxyType(
    {
        State.BLOCKED: frozenset({State.QUEUED, State.CANCELLED}),
        State.QUEUED: frozenset({State.STARTING, State.CANCELLED}),
        State.STARTING: frozenset({State.RUNNING, State.QUEUED, State.PAUSED, State.FAILED, State.CANCELLED}),
        State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.PAUSING, State.QUEUED}),
        State.PAUSING: frozenset({State.PAUSED, State.QUEUED, State.SUCCEEDED, State.FAILED, State.CANCELLED}),
        State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
        State.SUCCEEDED: frozenset(),
        State.FAILED: frozenset(),
        State.CANCELLED: frozenset(),
    }
)
"""From each state, the states that may follow."""

SOURCES = MappingProxyType({to: frozenset(source for source, targets in MOVES.items() if to in targets) for to in State})
"""The same table read backwards: to each state, the states that may precede it."""

TERMINAL = frozenset(state for state, targets in MOVES.items() if not targets)
"""States that nothing follows."""

ACTIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSING})
"""States in which a run may hold resources of the cluster."""


class EndReason(StrEnum):
    """Why a job ended. Names are those of the contract without their prefix."""

    UNSPECIFIED = "UNSPECIFIED"
    COMPLETED = "COMPLETED"
    USER = "USER"
    QUOTA = "QUOTA"
    BUDGET = "BUDGET"
    TIME_LIMIT = "TIME_LIMIT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_LOST = "NODE_LOST"
    BAD_DATA = "BAD_DATA"
    ERROR = "ERROR"
    AGENT_LOST = "AGENT_LOST"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    DEPENDENCY = "DEPENDENCY"
    PREEMPTED = "PREEMPTED"
    HANG = "HANG"

    @property
    def proto(self) -> job_pb2.EndReason.ValueType:
        """The same reason in the contract."""
        return job_pb2.EndReason.Value(f"END_REASON_{self.value}")

    @classmethod
    def of(cls, value: job_pb2.EndReason.ValueType) -> EndReason:
        """The reason that a proto value stands for."""
        return cls(job_pb2.EndReason.Name(value).removeprefix("END_REASON_"))
