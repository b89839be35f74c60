"""The way from tickets to answers, through the stubs and the OpenAI client that any service would use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cli.context import Cli
from cli.demo.tickets import EXAMPLES, Baseline, Row, baseline, load_rows, questions, write_jsonl
from cli.failures import Failure
from cli.follow import follow, succeeded
from cli.gateway import explained, openai_client
from cli.jobfile import read_job
from cli.render.text import number, plain_table, span
from luthier.client import short_name
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.endpoint_pb2 import Endpoint, ReplicaResources, Route
from luthier.v1.job_pb2 import Job, JobResult

NAME = "tickets"
JOB_FILE = EXAMPLES / "finetune.yaml"
READY_SECONDS = 240.0
ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Answer:
    """A question to the live endpoint and what came back."""

    question: str
    expected: str
    answer: str
    streamed: bool
    pieces: int


@dataclass(frozen=True)
class Outcome:
    """Everything that the demonstration found out."""

    job: Job
    baseline: Baseline
    endpoint: Endpoint
    answers: list[Answer]
    dataset: DatasetVersion
    seconds: float

    def report(self) -> dict[str, Any]:
        """The outcome as JSON has it."""
        result: JobResult = self.job.result
        before, after, engine = result.before, result.after, result.engine
        return {
            "accuracy_before": before.likelihood.accuracy,
            "accuracy_before_generated": before.generated.accuracy,
            "accuracy_after": after.generated.accuracy,
            "accuracy_after_likelihood": after.likelihood.accuracy,
            "macro_precision_after": after.generated.macro_precision,
            "macro_recall_after": after.generated.macro_recall,
            "macro_f1_before": before.likelihood.macro_f1,
            "macro_f1_after": after.generated.macro_f1,
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "baseline": asdict(self.baseline),
            "dataset_version": short_name(self.dataset.name),
            "dataset_rows": self.dataset.row_count,
            "job": short_name(self.job.name),
            "model_version": result.model_version,
            "endpoint_url": self.endpoint.url,
            "answers": [asdict(answer) for answer in self.answers],
            "engine": engine.engine_class,
            "optimizer": engine.optimizer_class,
            "zero_stage": engine.zero_stage,
            "world_size": engine.world_size,
            "seconds": round(self.seconds, 1),
        }


def run(cli: Cli, home: Path, say: Callable[[str], None]) -> Outcome:
    """Import, fine-tune, evaluate, deploy and ask, on the stack that `cli` speaks to."""
    started = time.monotonic()
    rows = load_rows()
    say(f"2/6  importing {len(rows)} support tickets in {len({row['label'] for row in rows})} categories")
    file = home / "tickets.jsonl"
    write_jsonl(rows, file)
    dataset = cli.client.upload_dataset(file, NAME)
    counts = ", ".join(f"{split.row_count} {split.name}" for split in dataset.splits)
    say(f"     {short_name(dataset.name)}: {counts}; the held-out tickets use sentences that training never shows")

    say("3/6  TF-IDF with logistic regression on the same rows, for comparison")
    classical = baseline(rows)

    wish = read_job(str(JOB_FILE))
    wish.finetune.dataset = short_name(dataset.name)
    how = f"{wish.finetune.workers} workers on DeepSpeed ZeRO-{wish.finetune.sharding.zero_stage}"
    say(f"4/6  fine-tuning {wish.finetune.base} with {how}, scored before and after ({JOB_FILE.name})")
    job = follow(cli, cli.client.create_job(wish), outlives_us=False)
    if not succeeded(job):
        raise Failure(f"the fine-tune failed: {_root_cause(job)}")
    cli.out.table(scores_table(job, classical))

    say(f"5/6  deploying {job.result.model_version}")
    desired = Endpoint(routes=[Route(model_version=job.result.model_version)], resources=ReplicaResources(cpus=0.5))
    cli.client.deploy_endpoint(NAME, desired)
    with cli.out.busy("     starting a replica behind the gateway"):
        endpoint = cli.client.wait_ready(NAME, READY_SECONDS)
    say(f"     {endpoint.url}")

    say("6/6  asking the endpoint with the openai client")
    with explained(endpoint.url):
        answers = ask_all(cli, endpoint, questions(rows))
    return Outcome(job, classical, endpoint, answers, dataset, time.monotonic() - started)


def _root_cause(job: Job) -> str:
    error = job.error
    who = f" ({error.source}: {error.exception})" if error.exception else ""
    return f"{error.message or 'the job was cancelled'}{who}"


def ask_all(cli: Cli, endpoint: Endpoint, tickets: list[Row]) -> list[Answer]:
    """Ask each question over HTTP, the last one streamed. Raises Failure where an answer is empty."""
    client = openai_client(endpoint.url, cli.token)
    answers = []
    for index, ticket in enumerate(tickets):
        streamed = index == len(tickets) - 1
        cli.out.say(f"     > {ticket['prompt']}")
        pieces = []
        messages: Any = [{"role": "user", "content": ticket["prompt"]}]
        if streamed:
            for chunk in client.chat.completions.create(
                model=NAME, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0, stream=True
            ):
                pieces += [chunk.choices[0].delta.content or ""] if chunk.choices else []
        else:
            answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0)
            pieces.append(answer.choices[0].message.content or "")
        text = "".join(pieces)
        if not text.strip():
            raise Failure(f"the endpoint gave an empty answer to {ticket['prompt']!r}")
        mark = "right" if _category(text) == ticket["label"] else f"wrong, it is {ticket['label']}"
        cli.out.say(f"     < {text}   ({mark}{', streamed' if streamed else ''})")
        answers.append(Answer(ticket["prompt"], ticket["completion"], text, streamed, len([p for p in pieces if p])))
    return answers


def _category(text: str) -> str:
    try:
        return str(json.loads(text)["category"])
    except (ValueError, KeyError, TypeError):
        return ""


def scores_table(job: Job, classical: Baseline) -> Table:
    """Before, after and the baseline, side by side."""
    before, after = job.result.before, job.result.after
    table = plain_table(
        "on held-out tickets", "before, by likelihood", "after, by likelihood", "after, generated", "TF-IDF + logistic regression"
    )
    columns = (before.likelihood, after.likelihood, after.generated, classical)
    for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1"):
        table.add_row(name.replace("_", " "), *(f"{getattr(column, name):.3f}" for column in columns))
    table.add_row("perplexity", number(before.perplexity), number(after.perplexity), "", "")
    if before.HasField("generated"):
        table.caption = (
            f"before training, generated answers name the right category in {before.generated.accuracy:.1%} of the rows"
        )
    return table


def check(outcome: Outcome) -> None:
    """Raise Failure where the fine-tune taught the model nothing."""
    report = outcome.report()
    if report["accuracy_after"] <= report["accuracy_before"]:
        raise Failure(
            f"fine-tuning did not help: accuracy {report['accuracy_before']:.3f} before, {report['accuracy_after']:.3f} after"
        )


def where_next(home: Path, outcome: Outcome) -> str:
    """What to look at in a stack that goes on running."""
    job = short_name(outcome.job.name)
    return "\n".join(
        (
            f"the stack goes on running ({span(outcome.seconds)} since it started); look around:",
            f"  export LUTHIER_HOME={home}",
            f"  luthier job show {job} --confusion",
            f"  luthier model lineage {outcome.job.result.model_version}",
            f'  luthier endpoint query {NAME} "I was charged twice for the order 4471." --stream',
            f'  curl {outcome.endpoint.url}/models -H "Authorization: Bearer $(cat {home / "admin.key"})"',
            "  luthier down",
        )
    )
