"""Joining the Ray cluster from a run's driver."""

from __future__ import annotations

import signal
import threading


def connect() -> None:
    """Join the cluster that this process was started on, unless it has; the agent's signal handlers stay in force.

    The processes of the run send their log over links of their own, so Ray does not copy it to the driver.
    """
    import ray

    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ray.init(address="auto", log_to_driver=False)
    if threading.current_thread() is threading.main_thread():
        # Ray puts handlers of its own in place, which would end the driver before it has reported anything.
        for number, handler in handlers.items():
            signal.signal(number, handler)
