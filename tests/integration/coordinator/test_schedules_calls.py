"""Schedules through the API of a live coordinator: what is checked, what is changed, and that its clock makes jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import Session

from cli.main import main
from coordinator.store import tables
from luthier.client import Aborted, AlreadyExists, Client, InvalidArgument, NotFound
from luthier.v1.job_pb2 import Job
from luthier.v1.schedule_pb2 import OVERLAP_ALLOW, OVERLAP_REPLACE, OVERLAP_SKIP, Schedule
from luthier.v1.training_pb2 import FinetuneSpec
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.tenants import in_store

IMPORT = Job(import_model={"source": "builtin:tiny", "output_model": "m"})  # type: ignore[arg-type]


def test_one_is_made_read_changed_and_ended(client: Client) -> None:
    made = client.create_schedule("nightly", Schedule(cron=" 0  3 * * * ", time_zone="Europe/Berlin", job=IMPORT))
    assert (made.cron, made.overlap, made.catch_up.seconds) == ("0 3 * * *", OVERLAP_SKIP, 3600)
    assert made.next_time.ToDatetime(UTC) > datetime.now(UTC)
    assert client.get_schedule("nightly") == made
    assert client.create_schedule("nightly", Schedule(cron="0 3 * * *", time_zone="Europe/Berlin", job=IMPORT)) == made
    with pytest.raises(AlreadyExists, match="differs in cron"):
        client.create_schedule("nightly", Schedule(cron="0 4 * * *", time_zone="Europe/Berlin", job=IMPORT))
    paused = client.update_schedule("nightly", Schedule(paused=True, overlap=OVERLAP_ALLOW), "paused", "overlap")
    assert (paused.paused, paused.overlap, paused.cron) == (True, OVERLAP_ALLOW, "0 3 * * *")
    assert not paused.HasField("next_time")
    with pytest.raises(Aborted):
        client.update_schedule("nightly", Schedule(paused=False), "paused", etag=made.etag)
    assert client.update_schedule("nightly", Schedule(), "paused").HasField("next_time")
    assert "nightly" in [each.name.rpartition("/")[2] for each in client.list_schedules()]
    client.delete_schedule("nightly")
    with pytest.raises(NotFound):
        client.get_schedule("nightly")


def test_everything_that_is_wrong_is_named(client: Client) -> None:
    job = Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="rows", method="full"), after=["projects/default/jobs/x"])
    bad = Schedule(cron="0 25 * * *", time_zone="Mars/Base", overlap=9, job=job)  # type: ignore[arg-type]
    bad.catch_up.seconds = 10**7
    with pytest.raises(InvalidArgument) as caught:
        client.create_schedule("bad", bad)
    assert [each.field for each in caught.value.violations] == [
        "schedule.time_zone",
        "schedule.cron",
        "schedule.overlap",
        "schedule.catch_up",
        "schedule.job.after",
    ]
    with pytest.raises(InvalidArgument) as caught:
        client.create_schedule("bad", Schedule(cron="@daily", job=Job(finetune=FinetuneSpec(base="builtin:tiny", method="x"))))
    assert {each.field for each in caught.value.violations} >= {"schedule.job.finetune.dataset"}
    nothing = FinetuneSpec(base="builtin:tiny", dataset="nothing", method="full")
    with pytest.raises(NotFound, match="there is no data set 'nothing'"):
        client.create_schedule("bad", Schedule(cron="@daily", job=Job(finetune=nothing)))
    with pytest.raises(InvalidArgument, match="update_mask"):
        client.update_schedule("bad", Schedule(), "next_time")
    with pytest.raises(NotFound):
        client.get_schedule("bad")


def test_its_job_is_to_be_had_now_and_the_same_request_makes_it_once(client: Client) -> None:
    client.create_schedule("yearly", Schedule(cron="@yearly", job=IMPORT))
    first, again = client.run_schedule("yearly", "r-1"), client.run_schedule("yearly", "r-1")
    assert first.name == again.name
    assert first.schedule == "projects/default/schedules/yearly"
    assert client.run_schedule("yearly", "r-2").name != first.name
    assert [each.job for each in client.get_schedule("yearly").firings][-1] == first.name


def test_the_coordinators_own_clock_makes_the_job_and_a_kill_makes_no_second(
    fresh: Callable[..., CoordinatorProcess], store_url: str
) -> None:
    process = fresh(store_url=store_url).start()
    with process.client() as client:
        client.create_schedule("often", Schedule(cron="@yearly", job=IMPORT))
        moment = tables.now() - timedelta(seconds=1)

        def now_is_the_time(session: Session) -> None:
            row = session.get_one(tables.Schedule, ("default", "often"))
            # Each minute, and one has just gone by.
            row.cron, row.next_time = "* * * * *", moment.replace(second=0, microsecond=0)
            session.add(row)

        in_store(process, now_is_the_time)
        deadline = time.monotonic() + 30
        while not client.get_schedule("often").firings:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.update_schedule("often", Schedule(paused=True), "paused")
        made = client.get_schedule("often").firings
        process.kill()
        process.start()
        assert client.get_schedule("often").firings == made
        jobs = [job.name for job in client.list_jobs() if job.schedule == "projects/default/schedules/often"]
    assert sorted(jobs) == sorted(each.job for each in made if each.job)
    assert jobs


def test_people_use_it_from_the_command_line(
    coordinator: CoordinatorProcess,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LUTHIER_SERVER", coordinator.address)
    monkeypatch.setenv("LUTHIER_TOKEN", TOKEN)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))

    def luthier(*arguments: str) -> tuple[int, str]:
        status = main(["schedule", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    file = tmp_path / "job.yaml"
    file.write_text("display_name: bring it in\nimport_model: {source: 'builtin:tiny', output_model: m}\n")
    flags = ["--cron", "30 3 * * MON", "--tz", "Europe/Berlin", "-f", str(file), "--overlap", "replace", "--catch-up", "2h"]
    status, said = luthier("create", "cli", *flags)
    assert status == 0
    assert "30 3 * * MON Europe/Berlin" in said
    found = client.get_schedule("cli")
    assert (found.overlap, found.catch_up.seconds, found.job.display_name) == (OVERLAP_REPLACE, 7200, "bring it in")
    assert luthier("run", "cli")[0] == 0
    job = client.get_schedule("cli").firings[0].job.rpartition("/")[2]
    said = luthier("list")[1]
    assert "bring it in" in said
    assert job in said
    assert "paused" in luthier("pause", "cli")[1]
    assert client.get_schedule("cli").paused
    assert luthier("resume", "cli")[0] == 0
    assert luthier("update", "cli", "--cron", "@daily")[0] == 0
    assert (client.get_schedule("cli").cron, client.get_schedule("cli").paused) == ("@daily", False)
    status, said = luthier("update", "cli", "--cron", "daily")
    assert status != 0
    assert "schedule.cron" in said
    assert luthier("update", "cli")[0] == 2
    assert luthier("delete", "cli")[0] == 2  # nobody is there to be asked
    assert luthier("delete", "cli", "--yes") == (0, "deleted cli\n")
    with pytest.raises(NotFound):
        client.get_schedule("cli")
