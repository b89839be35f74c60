"""A rank that stands still is found by its own clock, told with its stack, and given up; one that moves slowly never is."""

from __future__ import annotations

import threading
import time

import pytest

from agents.training.watch import BYTES_A_SECOND, LEAST_SECONDS, LONG_SECONDS, STEPS, Guard, Watch, stacks
from luthier.agent.v1 import agent_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeLink:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[agent_pb2.StandingReport] = []
        self.flushed = 0

    def standing(self, standing: agent_pb2.StandingReport) -> None:
        self.told.append(standing)

    def flush(self, timeout: float) -> bool:
        self.flushed += 1
        return True


class Rank:
    """A rank whose guard looks every second of a clock that the test turns."""

    def __init__(self, hang_seconds: float = 0.0) -> None:
        self.clock, self.link, self.left = Clock(), FakeLink(), 0
        self.watch = Watch(hang_seconds, self.clock)
        self.guard = Guard(self.watch, self.link, self._leave)  # type: ignore[arg-type]

    def _leave(self) -> None:
        self.left += 1

    def pass_time(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + max(1.0, seconds / 500))
            self.guard.look()

    def steps(self, count: int, seconds: float, first: int = 1) -> int:
        """Do steps that take so long, the rows being there at once."""
        for step in range(first, first + count):
            self.watch.at(step - 1, f"computes step {step}")
            self.pass_time(seconds)
            self.watch.stepped(step, "agrees")
            self.watch.at(step, f"waits for the rows of step {step + 1}")
        return first + count - 1


@pytest.mark.parametrize("seconds", [0.5, 14.0, 200.0, 900.0])
def test_a_run_that_moves_however_slowly_is_left_alone(seconds: float) -> None:
    rank = Rank()
    rank.watch.at_length(0, "loads the model")
    rank.pass_time(LONG_SECONDS * 0.9)
    rank.watch.at(0, "waits for the rows of step 1")
    rank.steps(60, seconds)
    # Now and then one takes much longer, as when a node is busy with something else.
    rank.steps(1, max(LEAST_SECONDS, STEPS * seconds) * 0.95, first=61)
    assert rank.left == 0


def test_a_rank_that_stands_is_told_at_half_the_time_and_given_up_after_the_whole() -> None:
    rank = Rank()
    step = rank.steps(37, 1.0)
    rank.pass_time(LEAST_SECONDS / 2 - 2)
    assert rank.link.told == []
    rank.pass_time(4)
    (told,) = rank.link.told
    assert (told.step, told.doing, told.gives_up) == (step, "waits for the rows of step 38", False)
    assert told.seconds == pytest.approx(LEAST_SECONDS / 2, abs=3)
    assert "test_watch.py" in told.traceback
    rank.pass_time(LEAST_SECONDS / 2 - 4)
    assert (rank.left, len(rank.link.told)) == (0, 1)
    rank.pass_time(10)
    assert [each.gives_up for each in rank.link.told] == [False, True]
    assert (rank.left, rank.link.flushed) == (1, 1)


def test_one_that_moves_again_takes_back_what_it_told() -> None:
    rank = Rank(hang_seconds=100)
    step = rank.steps(3, 1.0)
    rank.pass_time(70)
    rank.steps(1, 1.0, first=step + 1)
    assert [each.seconds > 0 for each in rank.link.told] == [True, False]
    rank.pass_time(70)
    assert [each.seconds > 0 for each in rank.link.told] == [True, False, True]
    assert rank.left == 0


def test_the_limit_of_the_job_counts_within_steps_alone() -> None:
    rank = Rank(hang_seconds=10)
    rank.watch.at(0, "waits for the rows of step 1")
    rank.pass_time(LONG_SECONDS * 0.9)  # the first step compiles
    step = rank.steps(5, 1.0)
    rank.watch.at_length(step, "saves")
    rank.pass_time(LONG_SECONDS * 0.9)
    rank.watch.at(step, "waits for the rows of step 6")
    assert rank.left == 0
    rank.pass_time(12)
    assert rank.left == 1


def test_a_longer_limit_of_the_job_counts_everywhere() -> None:
    rank = Rank(hang_seconds=2 * LONG_SECONDS)
    rank.watch.at(0, "waits for the rows of step 1")
    rank.pass_time(1.5 * LONG_SECONDS)
    rank.watch.at_length(0, "saves")
    rank.pass_time(1.5 * LONG_SECONDS)
    assert rank.left == 0


def test_a_large_checkpoint_has_the_time_that_its_bytes_take() -> None:
    rank = Rank()
    step = rank.steps(3, 1.0)
    rank.watch.at_length(step, "saves", 5 * LONG_SECONDS * BYTES_A_SECOND)
    rank.pass_time(4 * LONG_SECONDS)
    assert rank.left == 0


def test_the_time_of_a_save_is_no_part_of_the_median_step() -> None:
    rank = Rank()
    step = 0
    for _ in range(20):
        step = rank.steps(1, 1.0, first=step + 1)
        rank.watch.at_length(step, "saves")
        rank.pass_time(1000)
        rank.watch.at(step, "waits for rows")
    standing = rank.watch.standing()
    assert standing is not None
    assert standing.limit == LEAST_SECONDS


def test_a_method_that_tells_nothing_is_never_judged() -> None:
    rank = Rank(hang_seconds=1)
    rank.pass_time(10 * LONG_SECONDS)
    rank.steps(3, 0.4)
    rank.watch.rest()
    rank.pass_time(10 * LONG_SECONDS)
    assert rank.left == 0


def test_ranks_that_did_the_same_have_moved_alike() -> None:
    ahead, behind = Rank(), Rank()
    for rank in (ahead, behind):
        rank.steps(5, 1.0)
    ahead.watch.at(5, "computes step 6")
    first, second = ahead.watch.standing(), behind.watch.standing()
    assert first is not None
    assert second is not None
    assert first.moves == second.moves + 1


def test_the_stacks_of_all_threads_are_told_the_main_one_first() -> None:
    stop = threading.Event()

    def sleeps_in_a_loader() -> None:
        stop.wait(5)

    thread = threading.Thread(target=sleeps_in_a_loader, name="loader")
    thread.start()
    found: list[list[tuple[str, str]]] = []
    looker = threading.Thread(target=lambda: found.append(stacks()))
    time.sleep(0.01)
    looker.start()
    looker.join()
    stop.set()
    thread.join()
    names = [name for name, _ in found[0]]
    assert names[0] == threading.main_thread().name
    assert "sleeps_in_a_loader" in dict(found[0])["loader"]
