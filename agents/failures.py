"""What went wrong, as a JobError: one plain sentence for people, a stable word for programs, the end of the stack trace."""

from __future__ import annotations

import traceback

from agents.concealed import blot
from agents.link import Link
from common.causes import BAD_DATA, OUT_OF_MEMORY, end_reason
from common.errors import LuthierError
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

TRACEBACK_LIMIT = 6000
MESSAGE_LIMIT = 2000
# What a rank raises because another one is gone; never the root cause where anything else was raised.
_PEER_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout", "ncclremoteerror", "gloo")


class RunCancelled(Exception):
    """The coordinator, or a signal, asked this run to stop."""

    def __init__(self, reason: job_pb2.EndReason.ValueType = job_pb2.END_REASON_USER) -> None:
        super().__init__(f"the run was asked to stop ({job_pb2.EndReason.Name(reason)})")
        self.reason = reason

    def __reduce__(self) -> tuple[type[RunCancelled], tuple[job_pb2.EndReason.ValueType]]:
        return type(self), (self.reason,)


class RunPaused(Exception):
    """This run was asked to give its place up, and has saved what there was to save."""


class RunFailed(Exception):
    """A run failed for a cause that is known already; carries it across process borders."""

    def __init__(self, error: bytes) -> None:
        super().__init__(job_pb2.JobError.FromString(error).message)
        self.error = error

    @classmethod
    def of(cls, error: job_pb2.JobError) -> RunFailed:
        """Wrap a cause."""
        return cls(error.SerializeToString())

    @property
    def job_error(self) -> job_pb2.JobError:
        """The cause."""
        return job_pb2.JobError.FromString(self.error)

    def __reduce__(self) -> tuple[type[RunFailed], tuple[bytes]]:
        return type(self), (self.error,)


def check_wish(link: Link) -> None:
    """Raise RunCancelled if the run has been asked to end, RunPaused if it has been asked to give its place up."""
    if link.wished.is_set():
        raise RunCancelled(link.wish_reason)
    if link.wish == agent_pb2.WISH_PAUSE:
        raise RunPaused


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's MemoryError, torch's, or the allocator's RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "TorchOutOfMemoryError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_peer_loss(error: job_pb2.JobError) -> bool:
    """Whether the error only tells that another process went away."""
    text = error.message.lower()
    return error.code not in (BAD_DATA, OUT_OF_MEMORY) and any(sign in text for sign in _PEER_LOST)


def job_error_of(error: BaseException, source: str, code: str = "RUN_ERROR") -> job_pb2.JobError:
    """Describe an exception as it is shown to users. `code` is used where the exception has no word of its own."""
    if isinstance(error, RunFailed):
        return error.job_error
    result = job_pb2.JobError(code=code, source=source, exception=f"{type(error).__module__}.{type(error).__qualname__}")
    if isinstance(error, LuthierError):
        result.code, result.message = error.reason, error.message
        result.field_violations.extend(
            job_pb2.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations[:20]
        )
    elif is_out_of_memory(error):
        result.code = OUT_OF_MEMORY
        result.message = (
            f"memory ran out ({_one_line(error)}); use a smaller batch_size or max_length, more workers, or a higher zero_stage"
        )
    else:
        result.message = f"{type(error).__name__}: {_one_line(error)}"
    # Blotted before they are cut: half a secret would not be recognised.
    result.message = blot(result.message)[:MESSAGE_LIMIT]
    result.traceback = blot("".join(traceback.format_exception(error)))[-TRACEBACK_LIMIT:]
    return result


def end_reason_of(error: job_pb2.JobError) -> job_pb2.EndReason.ValueType:
    """The end reason that a retry policy should see for this error."""
    return job_pb2.EndReason.Value(f"END_REASON_{end_reason(error.code)}")


def outcome_of(error: BaseException, source: str = "driver") -> agent_pb2.OutcomeReport:
    """The outcome of a run that ended with an exception."""
    if isinstance(error, RunPaused):
        return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_PAUSED)
    if isinstance(error, RunCancelled):
        if error.reason != job_pb2.END_REASON_TIME_LIMIT:
            return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_CANCELLED, end_reason=error.reason or job_pb2.END_REASON_USER)
        cause = job_pb2.JobError(
            code="TIME_LIMIT", message="the job's time limit passed; raise time_limit or do less", source=source
        )
        return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_FAILED, end_reason=error.reason, error=cause)
    cause = job_error_of(error, source)
    return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_FAILED, end_reason=end_reason_of(cause), error=cause)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return blot(lines[0] if lines else type(error).__name__)[:MESSAGE_LIMIT]
