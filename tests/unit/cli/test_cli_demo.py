"""The demonstration: what it sends, what it reports, and that it always cleans up."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

import cli.commands.demo as command
import cli.demo.run as demo_run
from cli.context import Cli
from cli.demo.tickets import baseline, load_rows, questions
from cli.follow import LiveFollower, job_columns
from cli.stack.state import RayState, StackState, write_state
from luthier.v1.evaluation_pb2 import Classification, Evaluation
from luthier.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, Job, JobEvent, Progress, WatchJobResponse
from luthier.v1.training_pb2 import EngineReport
from tests.support.fake_services import FakeCoordinator

REPORT_KEYS = {
    *("accuracy_before", "accuracy_after", "macro_f1_after", "model_version", "endpoint_url", "answers"),
    *("seconds", "engine", "world_size"),
}


def succeed(fake: FakeCoordinator, job: Job, after: float = 0.875) -> None:
    fake.emit(job, JOB_STATE_RUNNING)
    result = job.result
    result.model_version = "tickets@1"
    result.before.CopyFrom(Evaluation(perplexity=4096, likelihood=Classification(accuracy=0.125)))
    result.after.CopyFrom(
        Evaluation(
            perplexity=1.5, likelihood=Classification(accuracy=0.75), generated=Classification(accuracy=after, macro_f1=0.8125)
        )
    )
    result.engine.CopyFrom(EngineReport(engine_class="DeepSpeedEngine", world_size=2, zero_stage=2))
    fake.emit(job, JOB_STATE_SUCCEEDED)


def fail(fake: FakeCoordinator, job: Job) -> None:
    job.error.message, job.error.source, job.error.exception = "loss is NaN", "rank-1", "FloatingPointError"
    fake.emit(job, JOB_STATE_FAILED)


class Stage:
    """Stands in for the stack: the fake coordinator under the name of a real one."""

    def __init__(self, fake: FakeCoordinator) -> None:
        self.fake = fake
        self.home: Path | None = None
        self.downs = 0

    def up(self, home: Path, *_: object) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        (home / "admin.key").write_text(self.fake.token)
        ray = RayState(address="http://127.0.0.1:1", token_path="")
        write_state(home, StackState(self.fake.address, self.fake.gateway_url, ray))

    def down(self, home: Path, *_: object) -> list[int]:
        self.downs += 1
        (home / "stack.json").unlink(missing_ok=True)
        return [1, 2]


@pytest.fixture
def stage(fake: FakeCoordinator, gateway, monkeypatch: pytest.MonkeyPatch) -> Stage:
    fake.gateway_url = gateway.url
    fake.on_create = succeed
    stage = Stage(fake)
    few = [row for index, row in enumerate(load_rows()) if index % 12 == 0 or row["split"] == "test"]
    monkeypatch.setattr(demo_run, "load_rows", lambda: few)
    monkeypatch.setattr(command.lifecycle, "up", stage.up)
    monkeypatch.setattr(command.lifecycle, "down", stage.down)
    monkeypatch.setenv("LUTHIER_TOKEN", "lut_of_another_stack")
    return stage


def test_the_whole_way_is_reported_and_cleaned_up(luthier, fake: FakeCoordinator, gateway, stage: Stage, tmp_path: Path) -> None:
    ran = luthier("demo", "--report", tmp_path / "report.json", "-o", "json")
    assert ran.status == 0, ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert ran.json == report
    assert set(report) >= REPORT_KEYS
    assert (report["accuracy_before"], report["accuracy_after"], report["macro_f1_after"]) == (0.125, 0.875, 0.8125)
    assert (report["model_version"], report["endpoint_url"], report["engine"], report["world_size"]) == (
        "tickets@1",
        gateway.url,
        "DeepSpeedEngine",
        2,
    )
    assert [(answer["answer"], answer["streamed"]) for answer in report["answers"]] == [("billing", False)] * 2 + [
        ("billing", True)
    ]
    spec = fake.called("CreateJob")[0].request.job.finetune
    assert (spec.base, spec.dataset, spec.method, spec.workers, spec.sharding.zero_stage) == (
        "builtin:tiny",
        "tickets@1",
        "full",
        2,
        2,
    )
    assert (spec.evaluation.before, spec.evaluation.generate, spec.evaluation.label_key) == (True, True, "category")
    assert (stage.downs, stage.home is not None and stage.home.exists()) == (1, False)
    assert {call.metadata["authorization"] for call in fake.calls} == {f"Bearer {fake.token}"}


def test_keep_leaves_the_stack_and_says_where_to_look(luthier, stage: Stage, tmp_path: Path) -> None:
    ran = luthier("demo", "--keep", "--home", tmp_path)
    assert (ran.status, stage.downs, stage.home) == (0, 0, tmp_path.resolve())
    for said in (f"LUTHIER_HOME={tmp_path}", "luthier job show j-1", "luthier endpoint query tickets", "luthier down"):
        assert said in ran.stderr
    assert "accuracy 0.125 before, 0.875 after" in ran.stdout
    assert "TF-IDF" in ran.stdout


def test_a_failed_job_is_explained_and_everything_is_stopped(
    luthier, fake: FakeCoordinator, stage: Stage, tmp_path: Path
) -> None:
    fake.on_create = fail
    ran = luthier("demo", "--keep", "--home", tmp_path / "h")
    assert ran.status == 1
    assert "error: the fine-tune failed: loss is NaN (rank-1: FloatingPointError)" in ran.stderr
    assert f"logs are in {tmp_path / 'h' / 'logs'}" in ran.stderr
    assert stage.downs == 1
    assert (tmp_path / "h").exists()


def test_a_model_that_learned_nothing_fails_the_demo(luthier, fake: FakeCoordinator, stage: Stage, tmp_path: Path) -> None:
    fake.on_create = lambda coordinator, job: succeed(coordinator, job, after=0.125)
    ran = luthier("demo", "--report", tmp_path / "report.json", "--home", tmp_path / "h")
    assert (ran.status, stage.downs) == (1, 1)
    assert "fine-tuning did not help: accuracy 0.125 before, 0.125 after" in ran.stderr
    assert json.loads((tmp_path / "report.json").read_text())["accuracy_after"] == 0.125


def test_a_gateway_that_refuses_fails_the_demo_in_one_line(luthier, gateway, stage: Stage, tmp_path: Path) -> None:
    gateway.refusal = (404, "there is no endpoint tickets")
    ran = luthier("demo", "--home", tmp_path / "h")
    assert (ran.status, stage.downs) == (3, 1)
    assert ran.stderr.splitlines()[-1] == "error: there is no endpoint tickets"


def test_without_the_examples_it_says_where_to_run_it(
    luthier, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cli.demo.tickets.EXAMPLE", tmp_path / "none.py")
    monkeypatch.setattr(demo_run, "load_rows", load_rows)
    ran = luthier("demo", "--home", tmp_path / "h")
    assert (ran.status, stage.downs) == (1, 1)
    assert "run the demo from a checkout" in ran.stderr


def test_the_questions_are_held_out_tickets_of_different_categories() -> None:
    asked = questions(load_rows())
    assert len({row["label"] for row in asked}) == len(asked) == 3
    assert {row["split"] for row in asked} == {"test"}


def test_the_baseline_is_scored_on_the_held_out_rows() -> None:
    words = {"billing": "invoice money paid", "account": "password login code", "delivery": "parcel courier late"}
    rows = [
        {"prompt": f"{text} {number}", "completion": "", "label": label, "split": "train"}
        for number in range(20)
        for label, text in words.items()
    ]
    held_out = [{"prompt": text, "completion": "", "label": label, "split": "test"} for label, text in words.items()]
    assert baseline(rows + held_out).accuracy == 1.0
    mislabelled = [row | {"label": "account" if row["label"] == "billing" else "billing"} for row in held_out]
    assert baseline(rows + mislabelled).accuracy == 0.0


def test_a_person_sees_a_bar_with_steps_loss_and_time_remaining() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=140)
    with Bar(*job_columns(), console=console, auto_refresh=False) as bar:
        shown = LiveFollower(bar)
        shown.take(WatchJobResponse(event=JobEvent(sequence=1, state=JOB_STATE_RUNNING, message="claimed [by] agent")))
        progress = Progress(phase="training", step=30, total_steps=300, loss=1.25, tokens_per_second=4717.3)
        progress.remaining.seconds = 75
        shown.take(WatchJobResponse(progress=progress))
        bar.refresh()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "claimed [by] agent" in text
    for said in ("training", "30/300", "loss 1.250", "4717 tokens/s", "1m 15s left"):
        assert said in text, said


def test_ctrl_c_says_that_the_job_goes_on(fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from cli.follow import follow

    cli = Cli(home=tmp_path, given_server=fake.address)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(cli.client), "watch", interrupted)
    job = Job(name="projects/default/jobs/j-1")
    with pytest.raises(KeyboardInterrupt):
        follow(cli, job)
    assert "luthier job watch j-1" in capfd.readouterr().err
