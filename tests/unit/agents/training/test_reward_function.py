"""A user's reward function can compute, and nothing else; whatever it does, the run is told which row it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.training.rewards.base import Answer
from agents.training.rewards.function import Function
from common.errors import InvalidArgument
from luthier.v1 import training_pb2

ROW = Answer("two and two", "4", "4", 12)
HEAD = "def reward(prompt, completion, answer):\n    "


def _made(source: str, **limits: float) -> Function:
    settings = {"timeout_seconds": 5, "memory_mib": 256} | limits
    return Function(training_pb2.FunctionReward(source=source, **settings), "mine")  # type: ignore[arg-type]


@pytest.fixture
def function(request: pytest.FixtureRequest) -> Iterator[Function]:
    made = _made(request.param)
    yield made
    made.close()


def test_it_sees_prompt_completion_and_answer() -> None:
    made = _made(
        "import difflib, re\n"
        + HEAD
        + "return len(prompt) + (completion == answer) + difflib.SequenceMatcher(None, 'a', 'a').ratio()"
    )
    try:
        assert made.score([ROW, Answer("", "5", "4", 13)]) == [13.0, 1.0]
    finally:
        made.close()


def test_what_it_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    made = _made("import sys\n" + HEAD + "print('x' * 5_000_000); sys.stderr.write('y' * 1000); return 0.5", timeout_seconds=5)
    try:
        assert made.score([ROW]) == [0.5]
    finally:
        made.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("while True: pass", "it took longer than 0.4 s"),
        ("import time; time.sleep(60)", "it took longer than 0.4 s"),
        ("import os; os._exit(3)", "its process ended with status 3"),
        ("raise ValueError('no such unit')", r"it raised ValueError: no such unit \(line 2 of its source\)"),
        ("return bytearray(10 * 2**30)", "it raised MemoryError"),
        ("return [bytearray(2**20) for _ in range(10_000)]", "it raised MemoryError"),
        ("return 'good'", "it returned \"str 'good'\" instead of a finite number"),
        ("return float('nan')", "instead of a finite number"),
        ("return None", "instead of a finite number"),
        ("raise SystemExit(0)", "it raised SystemExit"),
        ("return reward(prompt, completion, answer)", "it raised RecursionError"),
        ("import os; os.fork()", "it raised PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "it raised PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "it raised PermissionError"),
        ("open('/etc/passwd')", "it raised PermissionError"),
        ("open('mine', 'w')", "it raised PermissionError"),
        ("import os; os.unlink('/tmp/luthier-jail-canary')", "it raised PermissionError"),
        ("import _socket; _socket.socket()", "it raised (PermissionError|ModuleNotFoundError|ImportError)"),
        ("import threading; threading.Thread(target=print).start()", "it raised"),
    ],
)
def test_it_can_do_no_harm_and_the_row_is_named(body: str, says: str) -> None:
    Path("/tmp/luthier-jail-canary").touch()
    made = _made(HEAD + body, timeout_seconds=0.4 if "took longer" in says else 5)
    began = time.monotonic()
    try:
        with pytest.raises(InvalidArgument, match=f"'mine' failed on the row at line 12: .*{says}") as caught:
            made.score([ROW])
    finally:
        made.close()
    assert caught.value.reason == "REWARD_FAILED"
    assert time.monotonic() - began < 10
    assert Path("/tmp/luthier-jail-canary").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(made._process.pid, 0)


def test_what_it_writes_to_the_channel_of_results_is_no_result() -> None:
    each = "for n in range(3, 20):\n        try: os.write(n, b'junk\\n')\n        except OSError: pass"
    made = _made(f"{HEAD}import os\n    {each}\n    return 1.0")
    try:
        with pytest.raises(InvalidArgument, match="wrote to the channel"):
            made.score([ROW])
    finally:
        made.close()


@pytest.mark.parametrize(
    ("source", "says"), [("def reward(:", "SyntaxError"), ("import torch\ndef reward(p, c, a): return 1", "raised")]
)
def test_a_source_that_does_not_load_fails_at_once(source: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=f"when it was loaded: .*{says}"):
        _made(source)


def test_it_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    made = _made("import os\n" + HEAD + "return len([name for name in os.environ if name != 'LC_CTYPE'])")
    try:
        assert made.score([ROW]) == [0.0]
    finally:
        made.close()
