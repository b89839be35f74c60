"""What a method is given, and what it gives back. No torch at import, so that the driver can read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from agents.training.config import TrainConfig
from agents.training.watch import Watch
from luthier.v1 import job_pb2, training_pb2


class Wish(IntEnum):
    """What is wanted of a run."""

    NONE = 0
    """Go on."""
    END = 1
    """Stop, and save nothing."""
    PAUSE = 2
    """Save a checkpoint and stop."""
    FINISH = 3
    """Train no further; what was learned is the result."""


class Reporter(Protocol):
    """Where a method reports to; `agents.link.Link` is one."""

    def phase(self, phase: str, message: str = "") -> None:
        """A new phase begins."""

    def progress(self, progress: job_pb2.Progress) -> None:
        """How far the run is."""

    def metrics(self, step: int, values: Mapping[str, float], trial: str = "") -> None:
        """Figures of one step."""

    def checkpoint(self, checkpoint: job_pb2.Checkpoint) -> None:
        """A checkpoint lies in storage."""

    def engine(self, report: training_pb2.EngineReport) -> None:
        """What really runs."""


@dataclass(frozen=True)
class TrialReports:
    """For sweeps: measure the held-out loss every so many steps, and hand the figures to `report`."""

    report: Callable[[dict[str, float]], None]
    every_steps: int
    split: str = "test"
    max_rows: int = 0


@dataclass(frozen=True)
class TrainContext:
    """One rank's view of a fine-tune: settings, local folders, and whom to tell."""

    config: TrainConfig
    base_dir: Path
    base_name: str
    data_dir: Path
    output_dir: Path
    rank: int
    world_size: int
    reporter: Reporter
    use_gpu: bool = False
    run: int = 1
    run_uri: str = ""
    trial: str = ""
    node: str = ""
    trial_reports: TrialReports | None = None
    # Folders of other models that the method reads, by role: reward models by the names of their rewards.
    models: Mapping[str, Path] = field(default_factory=dict)
    # A whole, verified checkpoint of an earlier run, in a local folder; None for a start from the beginning.
    resume_from: Path | None = None
    # Read on rank 0 only; the ranks agree on it at step boundaries.
    wish: Callable[[], Wish] = field(default=lambda: Wish.NONE)
    # Told what the rank is at; a method that tells it nothing is never taken for hung.
    watch: Watch = field(default_factory=Watch)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def phase(self, phase: str, message: str) -> None:
        """Report a new phase, from rank 0 only."""
        if self.is_main:
            self.reporter.phase(phase, message)

    def agreed_wish(self) -> Wish:
        """What is wanted of the run, the same answer on every rank. All ranks have to call it at the same step."""
        if self.world_size == 1:
            return self.wish()
        from agents.training.distributed import agree

        return Wish(agree(self.wish() if self.is_main else Wish.NONE, self.use_gpu))


@dataclass(frozen=True)
class TrainedModel:
    """What a method leaves behind: on rank 0 a folder with the model, everywhere the figures."""

    kind: str
    local_dir: Path
    steps: int
    metrics: dict[str, float]
    engine: training_pb2.EngineReport
    # The wish that ended the training early; NONE and FINISH leave a model, the others none.
    wish: Wish = Wish.NONE

    @property
    def stopped(self) -> bool:
        """Whether the run stopped without a model."""
        return self.wish in (Wish.END, Wish.PAUSE)
