"""A checked sweep in Ray Tune's terms: search space, algorithm, and the ties to the board."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray import PlacementGroupID, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.placement_group import PlacementGroup, remove_placement_group

from agents.tuning.board import Board
from agents.tuning.space import Dimension, Search, Value
from agents.tuning.trial import TRIAL_CPUS

# Read by Ray Tune in this process. Its own result files are not needed, and the agent handles its signals itself.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def make_tuner(
    search: Search, trial: Callable[[dict[str, Value]], None], board: Board, storage_uri: str, selector: Mapping[str, str]
) -> tune.Tuner:
    """Return a tuner that runs the trials, on nodes that `selector` matches, and ends early once the board's `wished` is set."""
    os.environ.update(_ENVIRONMENT)
    # It misses the result files that are turned off, and tells of failed trials with long traces; the board tells of them too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return tune.Tuner(
        tune.with_resources(trial, _place(selector)),
        param_space={one.path: _domain(one, search.algorithm == "grid") for one in search.dimensions},
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(max_concurrent=search.concurrent, random_state=search.seed),
            scheduler=_scheduler(search),
            num_samples=1 if search.algorithm == "grid" else search.trials,
            max_concurrent_trials=search.concurrent,
            # Saves a trial's imports. A trial that is stopped early leaves a process that cannot be used again.
            reuse_actors=search.algorithm != "asha",
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage_uri,
            callbacks=[_Watch(board)],
            stop=_StopWhenWished(board.wished),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _place(selector: Mapping[str, str]) -> Any:
    """Where the driver of a trial goes."""
    held = {"CPU": TRIAL_CPUS}
    if not selector:
        return held
    return tune.PlacementGroupFactory([held], bundle_label_selector=[dict(selector)])


def release(place: str) -> None:
    """Give the place of a trial's ranks back to the cluster, and end them.

    Ray Tune kills a trial that it stops, and Ray Train with it; what Ray Train had reserved would be held until the sweep ends.
    """
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(place))))


def _domain(one: Dimension, grid: bool) -> Any:
    if one.kind == "choice":
        return tune.grid_search(list(one.values)) if grid else tune.choice(list(one.values))
    if one.kind == "integer":
        return tune.randint(int(one.low), int(one.high) + 1)
    return tune.loguniform(one.low, one.high) if one.kind == "log_uniform" else tune.uniform(one.low, one.high)


def _scheduler(search: Search) -> TrialScheduler:
    """With asha, a trial reports after every `grace` of its own steps; rungs are at the first, second, fourth ... report.

    Trials with other batch sizes or epochs have other numbers of steps, so that parts of them are compared, not steps. The
    last report is no rung: there is nothing to save any more.
    """
    last_rung = math.ceil(1 / search.grace - 1e-9) - 1
    if search.algorithm != "asha" or last_rung < 1:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="training_iteration",
        # On the way there is no generation, so the held-out loss judges, whatever the trials are ranked by in the end.
        metric="eval_loss",
        mode="min",
        max_t=last_rung,
        grace_period=1,
        reduction_factor=2,
        stop_last_trials=False,
    )


class _Unpickled:
    """Ray Tune writes its settings down to restore a broken sweep by. A run is restored by us, so these leave nothing behind."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Watch(_Unpickled, tune.Callback):
    """Lets the board look at the trials after every step of Ray Tune's loop."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Something may have changed."""
        self._board.look(trials)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """All trials have ended."""
        self._board.look(trials)


class _StopWhenWished(_Unpickled, tune.Stopper):
    """Ends the sweep once the run is asked to stop."""

    def __init__(self, wished: threading.Event) -> None:
        self._wished = wished

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for its own results."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials are to be stopped."""
        return self._wished.is_set()
