"""Flags and files become the Job that they stand for, and jobs are shown as they are."""

from pathlib import Path

import pytest

from luthier.v1 import sweep_pb2, training_pb2
from luthier.v1.estimate_pb2 import FIT_DOES_NOT_FIT
from luthier.v1.evaluation_pb2 import Classification, ConfusionRow, Evaluation
from luthier.v1.job_pb2 import (
    JOB_STATE_FAILED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    Job,
    JobError,
    JobEvent,
    LogLine,
    Placement,
    Progress,
    WatchJobsResponse,
)
from luthier.v1.sweep_pb2 import Trial
from luthier.v1.training_pb2 import EngineReport, FinetuneSpec, RankReport
from tests.support.fake_services import FakeCoordinator

TRAIN = ["train", "--base", "builtin:tiny", "--dataset", "tickets@2"]


def sent(fake: FakeCoordinator) -> Job:
    return fake.called("CreateJob")[-1].request.job


def test_train_with_nothing_more_leaves_the_defaults_to_the_coordinator(luthier, fake: FakeCoordinator) -> None:
    ran = luthier(*TRAIN, "-o", "json")
    assert ran.status == 0
    assert ran.json["name"] == "projects/default/jobs/j-1"
    assert sent(fake) == Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="tickets@2", method="full", workers=1))


def test_train_flags_become_the_spec(luthier, fake: FakeCoordinator) -> None:
    flags = (
        "--method lora --output-model m --workers 2 --cpus-per-worker 0.5 --zero 3 --lr 2e-4 --epochs 1.5 --max-steps 7 "
        "--batch-size 4 --gradient-accumulation 2 --max-length 64 --warmup-ratio 0.1 --weight-decay 0.01 --scheduler cosine "
        "--seed 0 --rank 8 --alpha 16 --dropout 0.1 --target-modules q_proj,v_proj --precision bf16 --loss-on all "
        "--checkpoint-every 5 --keep-checkpoints 1 "
        "--eval-before --eval-split validation --eval-rows 10 --label-key category --generate "
        "--gpu-type H100 --gpu-type H200 --node-label zone=!eu "
        "--name nightly --label team=search --label env=test --priority -3 --time-limit 1h30m --request-id r-1"
    )
    luthier(*TRAIN, *flags.split(), "--set", "hyperparameters.max_grad_norm=0.5", "--set", "labels.team=desk")
    job, spec = sent(fake), sent(fake).finetune
    assert (job.display_name, dict(job.labels), job.priority) == ("nightly", {"team": "desk", "env": "test"}, -3)
    assert job.time_limit.seconds == 5400
    assert job.placement == Placement(gpu_types=["H100", "H200"], node_labels={"zone": "!eu"})
    assert fake.called("CreateJob")[-1].request.request_id == "r-1"
    assert (spec.method, spec.output_model, spec.workers, spec.worker_resources.cpus) == ("lora", "m", 2, 0.5)
    assert spec.sharding.zero_stage == 3
    hyper = spec.hyperparameters
    assert (hyper.learning_rate, hyper.epochs, hyper.max_steps, hyper.batch_size) == (2e-4, 1.5, 7, 4)
    assert (hyper.gradient_accumulation, hyper.max_length, hyper.warmup_ratio) == (2, 64, 0.1)
    assert (hyper.weight_decay, hyper.scheduler, hyper.max_grad_norm) == (0.01, "cosine", 0.5)
    assert hyper.HasField("seed")  # a seed of 0 is a seed
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout, list(spec.lora.target_modules)) == (
        8,
        16,
        0.1,
        ["q_proj", "v_proj"],
    )
    assert (spec.precision, spec.loss_on) == (training_pb2.PRECISION_BF16, training_pb2.LOSS_ON_ALL)
    assert (spec.checkpoints.every_steps, spec.checkpoints.keep) == (5, 1)
    evaluation = spec.evaluation
    assert (evaluation.before, evaluation.split, evaluation.max_rows) == (True, "validation", 10)
    assert (evaluation.label_key, evaluation.generate, evaluation.disabled) == ("category", True, False)


def test_sweep_flags_become_the_search_space(luthier, fake: FakeCoordinator) -> None:
    luthier(
        "sweep",
        *TRAIN[1:],
        *("--space", "learning_rate=log_uniform:1e-5:1e-3", "--space", "batch_size=choice:4,8"),
        *("--space", "rank=integer:4:32", "--space", "hyperparameters.warmup_ratio=uniform:0:0.1"),
        *(
            "--algorithm",
            "asha",
            "--trials",
            "4",
            "--max-concurrent",
            "2",
            "--metric",
            "accuracy",
            "--minimize",
            "--grace",
            "0.5",
        ),
        *("--set", "hyperparameters.epochs=2"),
    )
    spec = sent(fake).sweep
    assert spec.finetune.base == "builtin:tiny"
    assert spec.finetune.hyperparameters.epochs == 2
    space = spec.space
    assert (space["hyperparameters.learning_rate"].log_uniform.min, space["hyperparameters.learning_rate"].log_uniform.max) == (
        1e-5,
        1e-3,
    )
    assert list(space["hyperparameters.batch_size"].choice.values) == ["4", "8"]
    assert (space["lora.rank"].integer.min, space["lora.rank"].integer.max) == (4, 32)
    assert space["hyperparameters.warmup_ratio"].uniform.max == 0.1
    assert (spec.algorithm, spec.trials, spec.max_concurrent_trials) == (sweep_pb2.SWEEP_ALGORITHM_ASHA, 4, 2)
    assert (spec.metric, spec.HasField("maximize"), spec.maximize, spec.grace) == ("accuracy", True, False, 0.5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--space", "lr=normal:0:1"], "log_uniform:MIN:MAX"),
        (["--space", "lr=uniform:a:b"], "not a number"),
        (["--space", "lr"], "name=value"),
        (["--space", "lr=uniform:1"], "uniform:MIN:MAX"),
        (["--space", "lr=choice:1", "--space", "lr=choice:2"], "given twice"),
        (["--space", "lr=choice:1", "--set", "nope.x=1"], "--set: job.sweep.finetune.nope: there is no such field"),
        (["--space", "lr=choice:1", "--set", "workers=many"], "job.sweep.finetune.workers: 'many' is not a whole number"),
        (["--space", "lr=choice:1", "--time-limit", "soon"], "--time-limit: 'soon' is not a length of time"),
        (["--space", "lr=choice:1", "--max-concurrent", "99999999999"], "does not fit"),
    ],
)
def test_bad_flags_are_named_and_nothing_is_sent(luthier, fake: FakeCoordinator, flags: list[str], said: str) -> None:
    ran = luthier("sweep", *TRAIN[1:], *flags)
    assert ran.status == 2
    assert said in ran.stderr
    assert not fake.calls


def test_evaluate_flags_become_the_spec(luthier, fake: FakeCoordinator) -> None:
    luthier(
        "evaluate",
        *["--model", "m@3", "--dataset", "d@1", "--split", "test", "--max-rows", "5", "--label-key", "k", "--skip-generation"],
    )
    spec = sent(fake).evaluate
    assert (spec.model, spec.dataset, spec.split, spec.max_rows, spec.label_key, spec.skip_generation) == (
        "m@3",
        "d@1",
        "test",
        5,
        "k",
        True,
    )


def test_a_base_that_is_a_folder_here_is_uploaded_once(luthier, fake: FakeCoordinator, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "My Base_1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        ran = luthier("train", "--base", "./My Base_1", "--dataset", "d", "-o", "json")
        assert "uploaded ./My Base_1 as model my-base-1@1" in ran.stderr
        assert sent(fake).finetune.base == "my-base-1@1"
    assert len(fake.models["my-base-1"]) == 1
    ran = luthier("train", "--base", "./nothing", "--dataset", "d")
    assert ran.status == 2
    assert "no folder ./nothing" in ran.stderr


def test_validate_only_starts_nothing(luthier, fake: FakeCoordinator) -> None:
    ran = luthier(*TRAIN, "--validate-only", "--watch")
    assert ran.status == 0
    assert "nothing was started" in ran.stderr
    assert not fake.jobs


@pytest.mark.parametrize(("state", "status"), [(JOB_STATE_SUCCEEDED, 0), (JOB_STATE_FAILED, 1)])
def test_watch_follows_and_prints_the_job_as_it_ended(luthier, fake: FakeCoordinator, state: int, status: int) -> None:
    def live(coordinator: FakeCoordinator, job: Job) -> None:
        coordinator.emit(job, JOB_STATE_RUNNING, "claimed")
        coordinator.progress(job, Progress(phase="training", step=5, total_steps=10, loss=1.5))
        coordinator.emit(job, state, "that was it")  # type: ignore[arg-type]

    fake.on_create = live
    ran = luthier(*TRAIN, "--watch", "-o", "json")
    assert ran.status == status
    assert ran.json["state"] == ("JOB_STATE_SUCCEEDED" if status == 0 else "JOB_STATE_FAILED")
    for said in ("claimed", "training  5/10  loss 1.500", "that was it"):
        assert said in ran.stderr


JOB_FILE = """
# a fine-tune
display_name: nightly
time_limit: 60s
labels: {day: 2026-11-23}
finetune:
  base: builtin:tiny
  dataset: tickets
  method: full
  hyperparameters: {learning_rate: 1e-3, batch_size: 8}
  sharding:
    zero_stage: 2
"""


@pytest.mark.parametrize("name", ["job.yaml", "-"])
def test_a_job_file_is_the_message(luthier, fake: FakeCoordinator, tmp_path: Path, monkeypatch, name: str) -> None:
    import io

    (tmp_path / "job.yaml").write_text(JOB_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(JOB_FILE))
    assert luthier("job", "submit", "-f", name, "--request-id", "r").status == 0
    job = sent(fake)
    assert (job.display_name, job.time_limit.seconds, job.labels["day"]) == ("nightly", 60, "2026-11-23")
    assert (job.finetune.hyperparameters.learning_rate, job.finetune.sharding.zero_stage) == (1e-3, 2)


def test_what_show_prints_as_json_can_be_submitted_again(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    luthier(*TRAIN, "--zero", "1")
    first = sent(fake).finetune
    (tmp_path / "again.json").write_text(luthier("job", "show", "j-1", "-o", "json").stdout)
    assert luthier("job", "submit", "-f", tmp_path / "again.json").status == 0
    assert sent(fake).finetune == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune:\n  base: x\n  lr: 1\n", "line 3: job.finetune.lr: there is no such field; job.finetune has base, dataset"),
        ("finetune:\n  workers: two\n", "line 2: job.finetune.workers: 'two' is not a whole number"),
        (
            "finetune:\n  hyperparameters:\n    learning_rate: fast\n",
            "line 3: job.finetune.hyperparameters.learning_rate: 'fast' is not a number",
        ),
        ("finetune:\n  precision: FP64\n", "line 2: job.finetune.precision: 'FP64' is not one of PRECISION_FP32"),
        ("finetune:\n  base: [a\n", "line 3"),
        ("finetune:\n\tbase: a\n", "line 2"),
        ("finetune: 3\n", "line 1: job.finetune: is a group of fields, not 3"),
        ("finetune: {base: a}\nsweep: {trials: 2}\n", "line 2: job.sweep: job has finetune already"),
        ("finetune: {base: a}\nfinetune: {base: b}\n", "line 2: 'finetune' is given twice"),
        (
            "finetune: {base: a}\ntime_limit: 5 minutes\n",
            "line 2: job.time_limit: '5 minutes' is not a length of time in seconds like 1800s",
        ),
        ("display_name: x\n", "says nothing to do; give one of finetune, sweep, evaluate, import_model"),
        ("- a\n", "a job file is a mapping"),
        ("", "is empty"),
        ("finetune: {base: a}\n---\nfinetune: {base: b}\n", "expected a single document"),
    ],
)
def test_a_bad_job_file_is_2_and_names_line_and_field(
    luthier, fake: FakeCoordinator, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    ran = luthier("job", "submit", "-f", tmp_path / "job.yaml")
    assert ran.status == 2
    assert f"error: {tmp_path / 'job.yaml'}" in ran.stderr
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not fake.calls


def test_broken_json_and_missing_files_are_named(luthier, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"finetune": {\n"base": }}')
    assert f"{tmp_path / 'job.json'}, line 2: Expecting value" in luthier("job", "submit", "-f", tmp_path / "job.json").stderr
    ran = luthier("job", "submit", "-f", tmp_path / "none.yaml")
    assert (ran.status, "No such file" in ran.stderr) == (2, True)


def full_job(fake: FakeCoordinator) -> Job:
    scores = Classification(
        accuracy=0.25, labels=["billing", "refund"], confusion=[ConfusionRow(counts=[3, 1, 0]), ConfusionRow(counts=[2, 4, 7])]
    )
    job = Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="tickets@1", method="full"))
    job.result.before.CopyFrom(Evaluation(rows=17, perplexity=4096.5, likelihood=scores))
    job.result.after.CopyFrom(Evaluation(rows=17, perplexity=1.25, likelihood=scores, generated=Classification(accuracy=0.875)))
    job.result.model_version = "tickets@1"
    job.result.engine.CopyFrom(
        EngineReport(
            engine_class="deepspeed.runtime.engine.DeepSpeedEngine",
            zero_stage=2,
            world_size=2,
            backend="gloo",
            ranks=[
                RankReport(rank=rank, node=f"n{rank}", device="cpu", parameter_bytes=2**20, optimizer_bytes=2**21)
                for rank in (0, 1)
            ],
        )
    )
    job.result.trials.append(
        Trial(
            id="trial-00003",
            state=sweep_pb2.TRIAL_STATE_PRUNED,
            parameters={"hyperparameters.learning_rate": "0.002"},
            metrics={"eval_loss": 0.5},
        )
    )
    job.error.CopyFrom(
        JobError(code="TRAINING_ERROR", message="loss is NaN", source="rank-1", exception="ValueError", traceback="File x.py")
    )
    return fake.add_job(job)


def test_show_tells_everything_at_a_glance(luthier, fake: FakeCoordinator) -> None:
    full_job(fake)
    shown = luthier("job", "show", "j-1").stdout
    for text in (
        *("tickets@1", "builtin:tiny", "4096", "1.25", "0.875", "0.25", "DeepSpeedEngine", "gloo", "n1", "1.0 MiB", "2.0 MiB"),
        *("trial-00003", "PRUNED", "learning_rate=0.002", "0.5", "TRAINING_ERROR", "loss is NaN", "rank-1", "ValueError"),
    ):
        assert text in shown, text
    assert "File x.py" not in shown
    assert "File x.py" in luthier("job", "show", "j-1", "--traceback").stdout
    assert "true \\ predicted" not in shown
    confusion = luthier("job", "show", "j-1", "--confusion").stdout
    assert "true \\ predicted" in confusion
    (row,) = {line.strip() for line in confusion.splitlines() if line.startswith("refund")}
    assert row.split() == ["refund", "2", "4", "7"]


def test_list_shows_one_job_a_line_and_respects_the_limit(luthier, fake: FakeCoordinator) -> None:
    for number in range(5):
        fake.add_job(Job(display_name=f"job number {number}"))
    lines = luthier("job", "list", "--limit", "3").stdout.splitlines()
    assert len(lines) == 4
    assert "j-5  job number 4" in lines[1]


def test_logs_are_lines_of_text_or_json(luthier, fake: FakeCoordinator) -> None:
    job = fake.add_job(Job())
    fake.logs[job.name] = [
        LogLine(sequence=1, source="driver", level="info", message="a [b] c"),
        LogLine(sequence=2, source="rank-0"),
    ]
    ran = luthier("job", "logs", "j-1", "--source", "driver")
    assert ran.stdout.split(maxsplit=2) == ["driver", "info", "a [b] c\n"]
    assert luthier("job", "logs", "j-1", "-o", "json").stdout.count("\n") == 2


def test_cancel_says_how_the_job_is_now(luthier, fake: FakeCoordinator) -> None:
    fake.add_job(Job())
    assert luthier("job", "cancel", "j-1", "-o", "json").json["state"] == "JOB_STATE_CANCELLED"
    assert luthier("job", "cancel", "j-7").status == 3


def test_what_is_wanted_of_a_log_is_asked_of_the_coordinator(luthier, fake: FakeCoordinator) -> None:
    job = fake.add_job(Job())
    fake.logs[job.name] = [LogLine(sequence=30, source="luthier", level="WARNING", message="30 older lines are no longer kept")]
    ran = luthier("job", "logs", "j-1", "--level", "warning", "--grep", "loss (nan|inf)", "--run", "2")
    assert ran.status == 0
    asked = fake.called("TailLogs")[-1].request
    assert (asked.level, asked.pattern, asked.run, asked.follow) == ("warning", "loss (nan|inf)", 2, False)
    assert luthier("job", "logs", "j-1", "--run", "-1").status == 2


def test_all_jobs_are_followed_where_none_is_named(luthier, fake: FakeCoordinator) -> None:
    fake.project_events = [
        WatchJobsResponse(bookmark=4, sequence=4),
        *(
            WatchJobsResponse(
                event=JobEvent(sequence=1, state=JOB_STATE_RUNNING, message=f"event {number}"),
                job=f"projects/default/jobs/j-{number}",
                sequence=number,
            )
            for number in (5, 6)
        ),
    ]
    ran = luthier("job", "watch")
    assert ran.status == 2  # the fake refuses to go on after its last event, where a coordinator would wait
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["j-5", "j-6"]
    assert lines[0].endswith("event 5")
    assert fake.called("WatchJobs")[0].request.after_sequence == -1
    luthier("job", "watch", "--after-sequence", "4")
    assert fake.called("WatchJobs")[-1].request.after_sequence == 4


def test_what_a_job_would_need_is_told_before_anything_is_spent(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("finetune: {base: 'builtin:tiny', dataset: tickets}\n")
    memory = fake.estimate.memory
    memory.fit, memory.bytes, memory.available_bytes = FIT_DOES_NOT_FIT, 80 * 2**30, 64 * 2**30
    memory.parts["optimizer"] = 60 * 2**30
    memory.advice.append("sharding.zero_stage=3")
    fake.estimate.duration.steps, fake.estimate.duration.runs = 300, 4
    fake.estimate.duration.expected.seconds, fake.estimate.duration.low.seconds, fake.estimate.duration.high.seconds = (
        620,
        480,
        775,
    )
    fake.estimate.queue.position, fake.estimate.queue.waiting_for = 2, "its turn"
    said = luthier("job", "estimate", "-f", file).stdout
    for words in (
        "does not fit: 80.0 GiB, a worker can have 64.0 GiB",
        "optimizer 60.0 GiB",
        "sharding.zero_stage=3",
        "10m 20s (8m to 12m 55s), 300 steps",
        "number 2, waits for its turn",
    ):
        assert words in said
    assert luthier("job", "estimate", "-f", file, "-o", "json").json["estimate"]["queue"]["position"] == 2
    ran = luthier(*TRAIN, "--validate-only")
    assert "number 2, waits for its turn" in ran.stdout + ran.stderr
    assert fake.called("CreateJob")[-1].request.validate_only


def test_rewards_and_preferences_are_flags(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def reward(prompt, completion, answer):\n    return 1.0\n")
    worth = ["exact_match", "numeric=0.5", "regex=^a=b$", "reward_model=judge@2", f"function={source}"]
    flags = ["--method", "grpo", "--adapter", "--beta", "0.01", "--num-generations", "4", "--max-completion-length", "32"]
    assert luthier(*TRAIN, *flags, *(part for each in worth for part in ("--reward", each))).status == 0
    spec = sent(fake).finetune
    assert spec.HasField("lora")
    assert not spec.HasField("preference")
    asked = spec.reinforcement
    assert (asked.beta, asked.num_generations, asked.max_completion_length) == (0.01, 4, 32)
    assert [reward.WhichOneof("kind") for reward in asked.rewards] == [each.partition("=")[0] for each in worth]
    assert asked.rewards[1].numeric.absolute_tolerance == 0.5
    assert asked.rewards[2].regex.pattern == "^a=b$"
    assert asked.rewards[4].function.source == source.read_text()
    luthier(*TRAIN, "--method", "dpo", "--beta", "0.2", "--preference-loss", "ipo")
    assert sent(fake).finetune.preference == training_pb2.PreferenceConfig(beta=0.2, loss="ipo")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("magic", "there is no reward 'magic'"),
        ("regex", "regex needs a value, regex=PATTERN"),
        ("similarity=2", "similarity takes no value"),
        ("numeric=much", "could not convert"),
        ("function=/nowhere.py", "No such file"),
    ],
)
def test_a_reward_that_cannot_be_read_is_told(luthier, reward: str, says: str) -> None:
    ran = luthier(*TRAIN, "--method", "grpo", "--reward", reward)
    assert ran.status == 2
    assert says in ran.stderr
