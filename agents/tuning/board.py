"""What is known of the trials of a sweep: told to the coordinator as it changes, and ranked at the end. Does not import Ray."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from agents.tuning.space import Search, as_text, settle
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2, sweep_pb2

# Keys of what a trial reports to Ray Tune: its latest figures, the place its ranks hold, and at its end the outcome, or the root
# cause, in hex.
FIGURES, PLACE, OUTCOME, FAILURE = "figures", "place", "outcome", "failure"

_STATES = {
    "PENDING": sweep_pb2.TRIAL_STATE_PENDING,
    "PAUSED": sweep_pb2.TRIAL_STATE_PENDING,
    "RUNNING": sweep_pb2.TRIAL_STATE_RUNNING,
    "ERROR": sweep_pb2.TRIAL_STATE_FAILED,
}
_RANKS = {
    sweep_pb2.TRIAL_STATE_COMPLETED: 0,
    sweep_pb2.TRIAL_STATE_PRUNED: 1,
    sweep_pb2.TRIAL_STATE_RUNNING: 2,
    sweep_pb2.TRIAL_STATE_PENDING: 3,
    sweep_pb2.TRIAL_STATE_FAILED: 4,
}


class TuneTrial(Protocol):
    """The part of Ray Tune's trial that is read here."""

    trial_id: str
    status: str
    config: Mapping[str, Any]
    last_result: Mapping[str, Any]


class Listener(Protocol):
    """Who is told; `agents.link.Link` is one."""

    def trial(self, trial: sweep_pb2.Trial) -> None:
        """A trial changed."""

    def progress(self, progress: job_pb2.Progress) -> None:
        """How far the sweep is."""


@dataclass
class _Entry:
    """One trial: what was told of it last, and what came of it."""

    told: sweep_pb2.Trial
    started: float | None = None
    outcome: agent_pb2.OutcomeReport | None = None


@dataclass
class Board:
    """All trials of a sweep. `release` is called with the place of a trial that was stopped early."""

    listener: Listener
    search: Search
    wished: threading.Event = field(default_factory=threading.Event)
    release: Callable[[str], None] = lambda _: None
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _failures: list[job_pb2.JobError] = field(default_factory=list)

    def look(self, trials: Iterable[TuneTrial]) -> None:
        """Tell the listener of every trial that changed since the last look, until `wished` is set."""
        if self.wished.is_set():
            return  # trials end now for no reason of their own
        changed = [self._look(trial) for trial in trials]
        if any(changed):
            self.listener.progress(self._progress())

    def ranking(self) -> list[sweep_pb2.Trial]:
        """Return the trials, best first: those that completed by the metric, then the others."""

        def key(trial: sweep_pb2.Trial) -> tuple[int, float, str]:
            value = trial.metrics.get(self.search.metric, math.nan)
            score = math.inf if math.isnan(value) else -value if self.search.maximize else value
            return _RANKS.get(trial.state, 9), score, trial.id

        return sorted((entry.told for entry in self._entries.values()), key=key)

    def best(self) -> tuple[str, agent_pb2.OutcomeReport] | None:
        """Return id and outcome of the best trial that completed, or None where none did."""
        for trial in self.ranking():
            outcome = self._entries[trial.id].outcome
            value = trial.metrics.get(self.search.metric, math.nan)
            if outcome is not None and math.isfinite(value):
                return trial.id, outcome
        return None

    def first_failure(self) -> job_pb2.JobError | None:
        """Return what went wrong in the trial that failed first."""
        return self._failures[0] if self._failures else None

    def _look(self, trial: TuneTrial) -> bool:
        name = trial_name(trial.trial_id)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry(sweep_pb2.Trial())
        elif entry.told.state in (sweep_pb2.TRIAL_STATE_COMPLETED, sweep_pb2.TRIAL_STATE_PRUNED, sweep_pb2.TRIAL_STATE_FAILED):
            return False
        result = trial.last_result or {}
        if result.get(OUTCOME) and entry.outcome is None:
            entry.outcome = agent_pb2.OutcomeReport.FromString(bytes.fromhex(result[OUTCOME]))
        state = _STATES.get(trial.status, sweep_pb2.TRIAL_STATE_PRUNED)
        if state == sweep_pb2.TRIAL_STATE_PRUNED and entry.outcome is not None:
            state = sweep_pb2.TRIAL_STATE_COMPLETED
        elif state == sweep_pb2.TRIAL_STATE_PRUNED and FAILURE in result:
            state = sweep_pb2.TRIAL_STATE_FAILED
        if state == sweep_pb2.TRIAL_STATE_RUNNING and entry.started is None:
            entry.started = time.monotonic()
        now = sweep_pb2.Trial(
            id=name,
            state=state,
            parameters={path: as_text(value) for path, value in settle(trial.config).items()},
            metrics={key: value for key, value in result.get(FIGURES, {}).items() if math.isfinite(value)},
        )
        if state == sweep_pb2.TRIAL_STATE_FAILED:
            failure = self._failure(name, result)
            self._failures.append(failure)
            now.error = failure.message
        if state == sweep_pb2.TRIAL_STATE_PRUNED and result.get(PLACE):
            self.release(result[PLACE])
        now.seconds = entry.told.seconds  # a clock that ticks is no change
        if now == entry.told:
            return False
        now.seconds = time.monotonic() - entry.started if entry.started is not None else 0.0
        entry.told = now
        self.listener.trial(now)
        return True

    def _failure(self, name: str, result: Mapping[str, Any]) -> job_pb2.JobError:
        if FAILURE in result:
            return job_pb2.JobError.FromString(bytes.fromhex(result[FAILURE]))
        message = f"the process of {name} died without a word; it was killed, or its node was lost"
        return job_pb2.JobError(code="TRIAL_LOST", source=f"{name}/driver", message=message)

    def _progress(self) -> job_pb2.Progress:
        told = [entry.told for entry in self._entries.values()]
        ended = [trial for trial in told if _RANKS[trial.state] in (0, 1, 4)]
        losses = [trial.metrics["eval_loss"] for trial in told if "eval_loss" in trial.metrics]
        word = job_pb2.Progress(step=len(ended), total_steps=self.search.trials, phase="searching")
        word.loss = min(losses, default=0.0)
        if ended:
            mean = sum(trial.seconds for trial in ended) / len(ended)
            word.remaining.FromMilliseconds(round(1000 * mean * (self.search.trials - len(ended)) / self.search.concurrent))
        return word


def trial_name(tune_id: str) -> str:
    """Return our id of a trial from Ray Tune's, which is some hash and the trial's number: `trial-00003`."""
    return f"trial-{int(tune_id.rpartition('_')[2]):05d}"
