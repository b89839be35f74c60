"""The agent of a run, started on the cluster as `python -m agents`: claims the run, carries it out, and reports how it ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import FrameType

from agents import concealed
from agents.failures import RunCancelled, outcome_of
from agents.link import Link, claim, install_logging
from agents.trail import Trail
from common import tracing
from common.errors import InvalidArgument, LuthierError
from luthier.agent.v1 import agent_pb2

logger = logging.getLogger("agents")

# By the oneof of a job's spec; imported when needed, because each pulls in much.
RUNNERS = {
    "finetune": "agents.training.job",
    "sweep": "agents.tuning.job",
    "evaluate": "agents.evaluation.job",
    "import_model": "agents.models.job",
}
GRACE_SECONDS = 25.0
HURRY_SECONDS = 3.0
VARIABLES = ("LUTHIER_COORDINATOR", "LUTHIER_JOB_UID", "LUTHIER_RUN", "LUTHIER_CLAIM_TOKEN")

Runner = Callable[[Link, agent_pb2.ClaimRunResponse], agent_pb2.OutcomeReport]


def main() -> int:
    """Do the run that the environment names. Returns 0 once its outcome is acknowledged, whatever it is."""
    try:
        address, job_uid, run, token = _environment()
        link, response = claim(address, job_uid, run, token)
    except LuthierError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    # The token is spent; nothing that this process starts needs to see it.
    os.environ.pop("LUTHIER_CLAIM_TOKEN", None)
    concealed.take(response.secrets)
    # What is made of the claim may be written down, as Ray Tune does; the secrets go on by themselves.
    response.ClearField("secrets")
    install_logging(link)
    who: dict[str, str | int] = {"luthier.job.uid": job_uid, "luthier.run": run}
    trail = link.trail = Trail("luthier-agent", f"run {response.job.WhichOneof('spec')}", response.trace_parent, **who)
    link.config = replace(link.config, trace_parent=trail.traceparent)  # for the processes that this one starts
    done = threading.Event()
    hurry = _listen_for_signals(link)
    grace = float(os.environ.get("LUTHIER_GRACE_SECONDS", GRACE_SECONDS))
    threading.Thread(target=_enforce_wish, args=(link, done, hurry, grace), name="luthier-wish", daemon=True).start()
    outcome = carry_out(link, response)
    done.set()
    trail.end(outcome.error.code)
    try:
        link.outcome(outcome)
    except LuthierError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    finally:
        tracing.stop()
    link.close()
    return 0


def carry_out(link: Link, response: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Run the job's runner and turn whatever it raises into an outcome."""
    try:
        return find_runner(response.job.WhichOneof("spec"))(link, response)
    except BaseException as error:
        if link.wished.is_set() and not isinstance(error, RunCancelled):
            # Whatever broke while the run was being stopped is a consequence of the stop.
            logger.info("stopped with %s: %s", type(error).__name__, error)
            return outcome_of(RunCancelled(link.wish_reason))
        outcome = outcome_of(error)
        if outcome.HasField("error"):
            logger.error("the run failed: %s", outcome.error.message, exc_info=error)
        return outcome


def find_runner(kind: str | None) -> Runner:
    """Return the runner of a kind of job. Raises InvalidArgument where this version has none."""
    if kind not in RUNNERS:
        raise InvalidArgument(f"this agent has no runner for jobs of kind {kind!r}; coordinator and agents differ in version")
    runner: Runner = import_module(RUNNERS[kind]).run
    return runner


def _environment() -> tuple[str, str, int, str]:
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise InvalidArgument(f"{', '.join(missing)} not set; `python -m agents` is started by the coordinator, not by hand")
    address, job_uid, run, token = (os.environ[name] for name in VARIABLES)
    if not run.isdigit():
        raise InvalidArgument(f"LUTHIER_RUN is {run!r}, which is no number")
    return address, job_uid, int(run), token


def _listen_for_signals(link: Link) -> threading.Event:
    """Return an event that the first signal sets, after asking the run to stop; a second one ends the process at once.

    Ranks hear wishes from the coordinator only, so there is no point in waiting long for them after a signal.
    """
    signalled = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        if signalled.is_set():
            os._exit(128 + number)
        signalled.set()
        link.stop_locally()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return signalled


def _enforce_wish(link: Link, done: threading.Event, hurry: threading.Event, grace: float) -> None:
    """Where a run does not stop by itself within the grace period, report its end and leave; Ray reaps what it started."""
    link.wished.wait()
    began = time.monotonic()
    while not done.wait(0.1):
        patience = min(grace, HURRY_SECONDS) if hurry.is_set() else grace
        if time.monotonic() - began > patience:
            break
    else:
        return
    logger.warning("the run did not stop by itself within %.0f s; ending it", time.monotonic() - began)
    watchdog = threading.Timer(60.0, os._exit, args=(1,))
    watchdog.daemon = True
    watchdog.start()
    link.outcome(outcome_of(RunCancelled(link.wish_reason)))
    if link.trail is not None:
        link.trail.end("CANCELLED")
        tracing.stop()
    sys.stdout.flush()
    time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
