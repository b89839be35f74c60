"""The coordinator is killed at every instant that matters, and at random: nothing acknowledged is lost, nothing happens twice."""

from __future__ import annotations

import itertools
import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from cli.stack.state import RayState
from coordinator.cluster.ray_cluster import RayCluster
from luthier.v1 import endpoint_pb2
from tests.support import kill_checks, tiny_agent
from tests.support.coordinator_process import free_port
from tests.support.crash_points import ANY_COMMIT, POINTS, POINTS_FOR_ENDPOINTS, RAY_CALLS, RAY_CALLS_FOR_ENDPOINTS
from tests.support.kill_checks import RayJob
from tests.support.kill_crowd import Crowd
from tests.support.kill_plans import CPUS, PLANS, numbered
from tests.support.mortal_coordinator import MortalCoordinator
from tests.support.postgres import Postgres
from tests.support.ray_head import running
from tests.support.tenants import in_store, spares

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
AT_ONCE = 8
"""Jobs under way at a time."""

PATIENCE = 300.0
"""Seconds within which a point has to be reached by some job, and within which all is quiet after the last kill."""

AT_RANDOM = "at random"

ON_POSTGRESQL = pytest.param("postgresql", marks=[pytest.mark.chaos, pytest.mark.postgres])
"""Besides SQLite, where there is time for it."""

OFTEN = (
    *(ANY_COMMIT, "commit.CREATED", "commit.QUEUED>STARTING", "commit.STARTING>RUNNING", "commit.RUNNING>SUCCEEDED"),
    *("commit.PHASE", "commit.CHECKPOINT", "commit.report", "ray.submit", "ray.submissions", "ray.capacity", "ray.serve_details"),
    *("answer.CreateJob", "answer.ClaimRun", "answer.Report"),
)
"""What every job comes by, or every round of the reconciler; the rest is for one job in twenty, and but once."""

FOR_LONG = (
    "commit.QUEUED>STARTING:after",
    "ray.submit:after",
    "answer.ClaimRun:before",
    "commit.RUNNING>PAUSING:after",
    "commit.RUNNING>QUEUED:before",
)
"""Where it is killed and stays away for long: before a launch, after one, and in the midst of what runs report."""


class Storm:
    """Kills one coordinator over and over, while a crowd uses it."""

    def __init__(self, mortal: MortalCoordinator, crowd: Crowd, ray: RayState, down: float = 0.0) -> None:
        self._mortal = mortal
        self._ray = ray
        self._crowd = crowd
        self._down = down
        self._random = random.Random(20)
        self._rounds = 1
        self.kills: Counter[str] = Counter()

    def kill_at(self, points: Sequence[str], at_random: int = 0, passes: int = 0) -> None:
        """Kill once at each of the points, whichever is come by first, and so many times at random in between.

        One that is come by often may be passed up to `passes` times before.
        """
        left = {point: self._random.randint(0, passes if point.rpartition(":")[0] in OFTEN else 0) for point in points}
        every = len(points) // max(1, at_random) + 1
        for number in itertools.count(1):
            if not left and not at_random:
                return
            self._mortal.begin(left)
            by_chance = at_random > 0 and (number % every == 0 or not left)
            # What it does until a kill by chance must not slip by: each job takes its way but once.
            point = self._mortal.stopped_at(self._random.uniform(0.0, 2.0)) if by_chance else self._next_stop(left)
            if point:
                del left[point]
            else:
                at_random -= 1
            self._mortal.kill()
            self.kills[point or AT_RANDOM] += 1
            print(f"kill {self.kills.total()}: {point or AT_RANDOM}; {len(left)} points to come", flush=True)
            time.sleep(self._down)
            if "STARTING" in point or "submit" in point:
                self._crowd.wrong += kill_checks.wrong_while_dead(store_of(self._mortal), kill_checks.ray_jobs(self._ray))

    def _next_stop(self, left: Iterable[str]) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            point = self._mortal.stopped_at(0.5)
            if point:
                return point
            if self._crowd.quiet:
                self._rounds += 1
                self._crowd.add([numbered(plan, self._rounds) for plan in PLANS])
        raise AssertionError(f"never came by {sorted(left)}; open: {self._crowd.open}; wrong: {self._crowd.wrong}")

    def calm(self) -> None:
        """Let it live until nothing more happens."""
        self._mortal.begin({})
        deadline = time.monotonic() + PATIENCE
        while not (self._crowd.quiet and kill_checks.all_ended(self.submitted())) and not self._crowd.wrong:
            if time.monotonic() > deadline:
                raise AssertionError(f"still open: {self._crowd.open}; Ray: {self.submitted()}")
            time.sleep(0.3)

    def submitted(self) -> dict[str, RayJob]:
        """What Ray knows of the crowd's jobs."""
        uids = [job.uid for job in self._crowd.jobs]
        return {id_: job for id_, job in kill_checks.ray_jobs(self._ray).items() if any(uid in id_ for uid in uids)}

    def check(self, folder: Path) -> None:
        """All that must hold, and everything that does not, at once."""
        assert not self._crowd.wrong, "\n".join(self._crowd.wrong)
        with self._mortal.client() as client:
            listed = list(client.list_jobs())
        jobs, submitted, store = self._crowd.jobs, self.submitted(), store_of(self._mortal)
        wrong = [
            *kill_checks.wrong_in_answers(jobs, listed),
            *kill_checks.wrong_in_records(store, jobs),
            *kill_checks.wrong_on_the_cluster(folder, jobs, submitted),
            *kill_checks.wrong_while_dead(store, submitted),
            *kill_checks.wrong_in_versions(store, self._crowd.deleted),
        ]
        assert not wrong, "\n".join(wrong)


def store_of(mortal: MortalCoordinator) -> str:
    """URL of a coordinator's records."""
    return mortal.settings.get("store_url") or f"sqlite:///{mortal.home / 'luthier.db'}"


@pytest.fixture(scope="module")
def ray() -> Iterator[RayState]:
    with running(CPUS) as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the agents find their plans and leave their traces."""
    folder = tmp_path / "seen"
    folder.mkdir()
    return folder


@pytest.fixture
def mortal(request: pytest.FixtureRequest, ray: RayState, tmp_path: Path, folder: Path) -> Iterator[MortalCoordinator]:
    settings = {"ray_address": ray.address, "ray_token_path": ray.token_path, "gateway_port": str(free_port())}
    settings["ray_gcs_address"] = ray.gcs
    if getattr(request, "param", "sqlite") == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        settings["store_url"] = server.url(server.database())
    program = tmp_path / "agent"
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    words = [sys.executable, str(Path(tiny_agent.__file__)), str(folder)]
    program.write_text(f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(path)}\nexec {shlex.join(words)}\n")
    program.chmod(0o755)
    mortal = MortalCoordinator(tmp_path / "home", agent_python=str(program), **settings)
    yield mortal
    mortal.close()


@pytest.fixture
def crowd(mortal: MortalCoordinator, folder: Path, tmp_path: Path) -> Crowd:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"row number {number},{'ab'[number % 2]}\n" for number in range(20)))
    mortal.begin({})
    mortal.wait_until_serving()
    with mortal.client() as client:
        client.upload_dataset(rows, "rows")
    mortal.kill()
    in_store(mortal, lambda session: session.add_all(spares("default")))
    return Crowd(mortal.client, folder, AT_ONCE)


def test_every_call_to_ray_is_among_the_points() -> None:
    calls = {name for name, value in vars(RayCluster).items() if callable(value) and not name.startswith("_")}
    assert calls == {*RAY_CALLS, *RAY_CALLS_FOR_ENDPOINTS}


@pytest.mark.parametrize("mortal", ["sqlite", ON_POSTGRESQL], indirect=True)
def test_killed_at_every_point_it_loses_nothing_and_does_nothing_twice(
    mortal: MortalCoordinator, crowd: Crowd, ray: RayState, folder: Path
) -> None:
    storm = Storm(mortal, crowd, ray)
    with crowd.at_work(PLANS):
        storm.kill_at(POINTS, at_random=10)
        storm.calm()
        storm.check(folder)
    assert storm.kills == Counter(POINTS) + Counter({AT_RANDOM: 10})


def test_killed_at_every_commit_of_its_first_start_it_starts_all_the_same(mortal: MortalCoordinator) -> None:
    for side in ("before", "after"):
        for number in itertools.count():
            for file in mortal.home.glob("luthier.db*"):
                file.unlink()
            mortal.begin({f"{ANY_COMMIT}:{side}": number})
            stopped = False
            while not (stopped or mortal.serves()):
                stopped = bool(mortal.stopped_at(0.05))
            mortal.kill()
            if not stopped:
                assert number > 1
                break
            mortal.begin({})
            mortal.wait_until_serving()
            with mortal.client() as client:
                assert not list(client.list_jobs())
            mortal.kill()


def test_killed_while_it_tells_serve_what_to_run_it_tells_it_again_and_nothing_runs_twice(
    mortal: MortalCoordinator, crowd: Crowd, ray: RayState
) -> None:
    kills = []

    def killed_at(point: str) -> None:
        assert mortal.stopped_at(PATIENCE) == point
        mortal.kill()
        kills.append(point)

    mortal.begin({"ray.deploy:before": 0})
    mortal.wait_until_serving()
    with mortal.client() as client:
        client.deploy_endpoint("desk", endpoint_pb2.Endpoint(routes=[endpoint_pb2.Route(model_version="spare@1", weight=1)]))
    killed_at("ray.deploy:before")
    assert kill_checks.serve_apps(ray) == {}
    mortal.begin({"ray.deploy:after": 0})
    killed_at("ray.deploy:after")
    apps = kill_checks.serve_apps(ray, lambda status: status.get("gateway") == "RUNNING")
    assert len(apps) == 2
    # Each fresh coordinator sends the whole once more, which changes nothing of what runs.
    mortal.begin({"ray.deploy:after": 0})
    killed_at("ray.deploy:after")
    assert kill_checks.serve_apps(ray)["gateway"] == apps["gateway"]

    mortal.begin({"ray.deploy:before": 1})
    mortal.wait_until_serving()
    with mortal.client() as client:
        client.delete_endpoint("desk")
    killed_at("ray.deploy:before")
    assert kill_checks.serve_apps(ray)["gateway"] == apps["gateway"]
    mortal.begin({"ray.deploy:after": 0})
    killed_at("ray.deploy:after")
    mortal.begin({})
    mortal.wait_until_serving()
    with mortal.client() as client:
        client.wait_gone("desk", timeout=PATIENCE)
    kill_checks.serve_apps(ray, lambda status: not status)
    assert set(kills) == set(POINTS_FOR_ENDPOINTS)


@pytest.mark.chaos
@pytest.mark.parametrize("mortal", ["sqlite", ON_POSTGRESQL], indirect=True)
def test_killed_two_hundred_times_it_loses_nothing_and_does_nothing_twice(
    mortal: MortalCoordinator, crowd: Crowd, ray: RayState, folder: Path
) -> None:
    storm = Storm(mortal, crowd, ray)
    with crowd.at_work(PLANS):
        while storm.kills.total() < 200:
            storm.kill_at([*POINTS, f"{ANY_COMMIT}:before", f"{ANY_COMMIT}:after"], at_random=25, passes=5)
        storm.calm()
        storm.check(folder)
    assert set(storm.kills) >= {*POINTS, AT_RANDOM}


@pytest.mark.chaos
@pytest.mark.parametrize("mortal", ["sqlite", ON_POSTGRESQL], indirect=True)
@pytest.mark.parametrize("down", [20.0, 60.0])
def test_killed_and_away_for_long_it_finds_its_runs_again(
    mortal: MortalCoordinator, crowd: Crowd, ray: RayState, folder: Path, down: float
) -> None:
    storm = Storm(mortal, crowd, ray, down)
    with crowd.at_work(PLANS):
        storm.kill_at(FOR_LONG)
        storm.calm()
        storm.check(folder)
    assert storm.kills == Counter(FOR_LONG)
