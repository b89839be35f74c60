"""The coordinator as a process: it starts quickly, alone, and survives being killed."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.v1 import job_pb2, training_pb2
from tests.support.coordinator_process import CoordinatorProcess, free_port

Fresh = Callable[..., CoordinatorProcess]


def run(process: CoordinatorProcess) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator"], env=process.environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_it_imports_neither_ray_nor_torch() -> None:
    code = "import sys, coordinator.server; print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_what_was_acknowledged_is_there_after_a_kill_and_watches_go_on(fresh: Fresh, rows: Path, store_url: str) -> None:
    process = fresh(store_url=store_url).start()
    with process.client() as client:
        client.upload_dataset(rows, "rows")
        spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
        names = [client.create_job(job_pb2.Job(finetune=spec)).name for _ in range(10)]
        watch = client.watch(names[0])
        seen = [next(watch).event.sequence]
        process.kill()
        process.start()
        listed = {job.name for job in client.list_jobs()}
        client.jobs.CancelJob(job_pb2.CancelJobRequest(name=names[0]))
        seen += [item.event.sequence for item in watch if item.WhichOneof("item") == "event"]
    assert listed == set(names)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 2


def test_it_stops_gracefully_and_watches_resume(fresh: Fresh, rows: Path, store_url: str) -> None:
    process = fresh(store_url=store_url).start()
    with process.client() as client:
        client.upload_dataset(rows, "rows")
        job = client.create_job(
            job_pb2.Job(finetune=training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full"))
        )
        watch = client.watch(job.name)
        seen = [next(watch).event.sequence]
        # A watch that would go on for ever does not hold it up: `stop` gives it its grace period and some seconds.
        assert process.stop() == 0
        process.start()
        client.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
        seen += [item.event.sequence for item in watch if item.WhichOneof("item") == "event"]
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 2
    assert "Traceback" not in process.log()


def test_a_taken_port_is_an_error_in_one_line(fresh: Fresh) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process = fresh()
        process.port = holder.getsockname()[1]
        done = run(process)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{process.port}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_home_holds_one_coordinator(fresh: Fresh) -> None:
    first = fresh().start()
    second = fresh(first.home)
    assert second.port != first.port
    done = run(second)
    assert done.returncode == 1
    assert "another coordinator runs in" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("port", "many"), ("gateway_port", "99999999")])
def test_a_bad_setting_is_named(fresh: Fresh, name: str, value: str) -> None:
    process = fresh(**{name: value})
    if name == "port":
        process.environment = lambda: {**CoordinatorProcess.environment(process), "LUTHIER_PORT": value}  # type: ignore[method-assign]
    done = run(process)
    assert done.returncode == 2
    assert f"LUTHIER_{name.upper()}" in done.stderr


def test_it_says_that_ray_does_not_answer(fresh: Fresh) -> None:
    from luthier.v1 import admin_pb2

    process = fresh(ray_address=f"http://127.0.0.1:{free_port()}").start()
    with process.client() as client:
        status = client.admin.GetStatus(admin_pb2.GetStatusRequest())
    assert not status.ray.connected
    assert "does not answer" in status.ray.error
