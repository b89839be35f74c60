"""Run as a script: the very coordinator, in processes that stop at the points they were told (see `crash_points.py`).

Reads one JSON object a line from standard input and answers each with one: `{"start": {point: passes}}` forks a fresh coordinator
and tells its pid, `{"reap": pid}` waits for it and tells its status. What a coordinator imports is imported once, before the
first fork and before anything runs, because importing takes longer than everything else that a start does. Stops are told on the
file descriptor that is the first argument.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import alembic.autogenerate  # noqa: F401  (imported by the first migration otherwise)
import ray.dashboard.modules.serve.sdk
import ray.job_submission  # noqa: F401

import coordinator.__main__
from tests.support.crash_points import Stopper, install


def main(pipe: int) -> None:
    """Fork coordinators until standard input closes."""
    stopper = Stopper()
    install(stopper)
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            _, status = os.waitpid(order["reap"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                stopper.arm(order["start"], pipe)
                _be_a_coordinator()
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _be_a_coordinator() -> None:
    status = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        status = coordinator.__main__.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
