"""Other people's services install the wheel of protos/ and nothing else of Luthier."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from luthier.v1.job_pb2 import JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, Job
from tests.support.fake_services import FakeCoordinator

PROTOS = Path(__file__).resolve().parents[3] / "protos"

SERVICE = """
import sys
from importlib.metadata import distributions
from luthier.client import Client, InvalidArgument, NotFound
from luthier.v1.job_pb2 import Job
from luthier.v1.training_pb2 import FinetuneSpec

server, token, data = sys.argv[1:]
with Client(server, token) as client:
    version = client.upload_dataset(data, "rows")
    job = client.create_job(Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="rows@1", method="full")))
    print([item.event.sequence for item in client.watch(job.name) if item.HasField("event")])
    ended = client.wait(job.name)
    print(ended.result.model_version, ended.result.metrics["accuracy"])
    try:
        client.get_job("none")
    except NotFound as error:
        print(error.reason)
print(sorted(d.name.lower() for d in distributions()))
"""


def live(fake: FakeCoordinator, job: Job) -> None:
    fake.emit(job, JOB_STATE_RUNNING)
    job.result.model_version = "rows@1"
    job.result.metrics["accuracy"] = 0.875
    fake.emit(job, JOB_STATE_SUCCEEDED)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_lower_bounds_are_those_that_the_generated_code_checks() -> None:
    needs = tomllib.loads((PROTOS / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(need.split(">=") for need in needs)
    for stub in PROTOS.glob("luthier/**/*_pb2.py"):
        (protobuf,) = re.findall(r"# Protobuf Python Version: ([\d.]+)", stub.read_text())
        assert numbers(bounds["protobuf"]) == numbers(protobuf), stub
    for stub in PROTOS.glob("luthier/**/*_pb2_grpc.py"):
        (grpcio,) = re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub.read_text())
        assert numbers(bounds["grpcio"]) == numbers(grpcio), stub


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "protos"
    shutil.copytree(PROTOS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.chaos  # tests/e2e/test_light_client.py does it against a real stack
def test_a_service_with_only_the_wheel_submits_watches_and_reads_the_result(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    (tmp_path / "service.py").write_text(SERVICE)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    with FakeCoordinator(on_create=live) as fake:
        said = run(python, "service.py", fake.address, fake.token, "rows.csv", cwd=tmp_path).splitlines()
    assert said[:3] == ["[1, 2, 3]", "rows@1 0.875", "NOT_FOUND"]
    installed = {name.replace("_", "-") for name in re.findall(r"'([\w.-]+)'", said[3])} - {"pip", "setuptools"}
    wanted = {"luthier-client", "grpcio", "grpcio-status", "protobuf", "googleapis-common-protos"}
    assert installed - {"typing-extensions"} == wanted  # typing-extensions is grpcio's
