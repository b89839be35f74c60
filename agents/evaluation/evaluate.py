"""Scoring a model on held-out rows with the engine that serves it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agents.evaluation.classification import classify
from agents.evaluation.labels import LabelReader, find_reader
from common.chat import messages_of
from common.errors import InvalidArgument, LuthierError
from common.rows import Row
from luthier.v1 import evaluation_pb2
from serving.engines import Engine, SamplingParams, Score, load_engine

_Thing = TypeVar("_Thing")

CHUNK = 64  # rows between two words of progress
EXAMPLES = 5
EXAMPLE_CHARACTERS = 2000
# A model that answers in the form it was taught needs no more tokens than the longest reference; the rest is slack.
SLACK_TOKENS = 8
MOST_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """How far an evaluation is, and, where there is one, something that a person should know."""

    done: int
    total: int
    warning: str = ""


@dataclass
class _Item:
    """A row on its way: how the engine is asked, what is expected, and what came of it."""

    row: Row
    prompt: str
    completion: str
    score: Score | None = None
    truth: str | None = None
    likeliest: str | None = None
    answer: str = ""


def evaluate(
    model_dir: Path,
    base_dir: Path | None,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    label_key: str = "",
    generate: bool = True,
    progress: Callable[[Step], None] | None = None,
) -> evaluation_pb2.Evaluation:
    """Load a model (an adapter goes onto the base in `base_dir`) and score it on `rows`. See `score_rows`."""
    steps = score_rows(load_engine(model_dir, base_dir), rows, labels, label_key=label_key, generate=generate)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: evaluation_pb2.Evaluation = end.value
            return result
        if progress is not None:
            progress(step)


def score_rows(
    engine: Engine, rows: Sequence[Row], labels: Sequence[str], *, label_key: str = "", generate: bool = True
) -> Generator[Step, None, evaluation_pb2.Evaluation]:
    """Score `engine` on `rows`, yielding how far it is, and return the scores.

    *Loss* is the mean over all target tokens: those of the completion and its end of turn, rendered as in training. Rows that
    do not fit into the model are left out and told in a warning.

    *Likelihood* (rows with labels): each known label is put into the row's completion, and the one with the highest total
    log-likelihood wins. The total is the sum over the tokens, not their mean: it is the probability of that very text, which
    the length-normalised variant is not. Where the label stands in a JSON object, only the tokens up to the end of its value
    count, so the label key should come first; what the reference says before it is given to the model.

    *Generated* (rows with labels, if `generate`): greedy generation; the answer must be a label, or a JSON object that has
    one under the label's key. Everything else is counted as unparsed, and wrong.
    """
    began = time.monotonic()
    if not rows:
        raise InvalidArgument("there are no rows to score: the split is empty", "BAD_DATA")
    items = [_item(engine, row) for row in rows]
    reader = find_reader([item.completion for item in items], [row.label for row in rows], labels, label_key)
    # Until the first pass has told which rows fit, assume that all do.
    passes = 1 + (reader is not None) + bool(generate)
    done, total = 0, len(items) * passes

    fitting: list[_Item] = []
    for chunk in _chunks(items):
        fitting += _score(engine, chunk)
        done += len(chunk)
        yield Step(done, total)
    if len(fitting) < len(items):
        total = len(items) + len(fitting) * (passes - 1)
        yield Step(done, total, _left_out(items, engine.max_length))
    tokens = sum(item.score.tokens for item in fitting if item.score)
    loss = -sum(item.score.logprob for item in fitting if item.score) / tokens
    result = evaluation_pb2.Evaluation(rows=len(fitting), loss=loss, perplexity=math.exp(min(loss, 700.0)), target_tokens=tokens)

    labelled: list[_Item] = []
    if reader is not None:
        for item in fitting:
            item.truth = reader.read(item.completion)
        labelled = [item for item in fitting if item.truth is not None]
        for chunk in _chunks(labelled):
            _pick_likeliest(engine, chunk, reader)
            done += len(chunk)
            yield Step(done, total)
    if reader is not None and labelled:
        truth = [item.truth or "" for item in labelled]
        result.likelihood.CopyFrom(classify(truth, [item.likeliest for item in labelled], reader.labels))

    if generate:
        shown = _spread(labelled or fitting, EXAMPLES)
        asked = labelled or shown
        longest = max(item.score.tokens for item in fitting if item.score)
        params = SamplingParams(max_tokens=min(longest + SLACK_TOKENS, MOST_TOKENS), temperature=0.0)
        for chunk in _chunks(asked):
            for item, completion in zip(chunk, engine.generate([item.prompt for item in chunk], params), strict=True):
                item.answer = completion.text
            done += len(chunk)
            yield Step(min(done, total), total)
        if reader is not None and labelled:
            truth = [item.truth or "" for item in labelled]
            result.generated.CopyFrom(classify(truth, [reader.read(item.answer) for item in labelled], reader.labels))
        result.examples.extend(_example(item) for item in shown)
    result.seconds = time.monotonic() - began
    yield Step(total, total)
    return result


def sample(rows: Sequence[Row], most: int) -> list[Row]:
    """Return at most `most` rows (all where 0), evenly spaced, so that a sorted split is still represented."""
    return list(rows) if most <= 0 or most >= len(rows) else _spread(rows, most)


def headline(evaluation: evaluation_pb2.Evaluation, prefix: str = "") -> dict[str, float]:
    """Return the figures of an evaluation that stand in a result's metrics, each name led by `prefix`.

    `accuracy` and its like are of the generated answers where there are any, else of the label likelihood, which is also there
    under `likelihood_…`.
    """
    figures = {"eval_loss": evaluation.loss, "perplexity": evaluation.perplexity}
    for name, scores in (("", evaluation.likelihood), ("likelihood_", evaluation.likelihood), ("", evaluation.generated)):
        if scores.labels:
            figures |= {
                f"{name}accuracy": scores.accuracy,
                f"{name}macro_precision": scores.macro_precision,
                f"{name}macro_recall": scores.macro_recall,
                f"{name}macro_f1": scores.macro_f1,
            }
    return {prefix + name: value for name, value in figures.items()}


def _item(engine: Engine, row: Row) -> _Item:
    chat = messages_of(row)
    if not engine.chat_template_sha256:  # a base without a chat template reads the prompt as it stands
        return _Item(row, "".join(message["content"] for message in chat[:-1]), chat[-1]["content"])
    try:
        prompt = engine.render(chat[:-1])
    except LuthierError as error:
        raise InvalidArgument(f"line {row.line} of the data set: {error.message}", "BAD_DATA") from error
    return _Item(row, prompt, chat[-1]["content"])


def _score(engine: Engine, items: Sequence[_Item]) -> list[_Item]:
    """Score the completions of `items` and return the items that fit into the model."""
    try:
        scores = engine.score([(item.prompt, item.completion) for item in items])
    except InvalidArgument as error:
        if len(items) == 1 and error.reason != "PROMPT_TOO_LONG":
            raise InvalidArgument(f"line {items[0].row.line} of the data set: {error.message}", "BAD_DATA") from error
        if len(items) == 1:
            return []
        middle = len(items) // 2
        return _score(engine, items[:middle]) + _score(engine, items[middle:])
    for item, score in zip(items, scores, strict=True):
        item.score = score
    return [item for item in items if item.score and item.score.tokens]


def _pick_likeliest(engine: Engine, items: Sequence[_Item], reader: LabelReader) -> None:
    choices = [(item.prompt, [(made.text, made.end) for made in reader.candidates(item.completion)]) for item in items]
    for item, scores in zip(items, engine.score_choices(choices), strict=True):
        likeliest = max(range(len(scores)), key=lambda index: scores[index].logprob)
        item.likeliest = reader.labels[likeliest]


def _left_out(items: Sequence[_Item], max_length: int) -> str:
    without = [item.row.line for item in items if not (item.score and item.score.tokens)]
    if len(without) == len(items):
        raise InvalidArgument(
            f"none of the {len(items)} rows fits into the model's {max_length:,} tokens; shorten the rows or use a longer base",
            "BAD_DATA",
        )
    lines = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
    return (
        f"{len(without)} of {len(items)} rows do not fit into the model's {max_length:,} tokens and were left out: line {lines}"
    )


def _example(item: _Item) -> evaluation_pb2.EvaluationExample:
    asked = messages_of(item.row)[-2:-1]
    return evaluation_pb2.EvaluationExample(
        prompt=(asked[0]["content"] if asked else item.prompt)[:EXAMPLE_CHARACTERS],
        expected=item.completion[:EXAMPLE_CHARACTERS],
        generated=item.answer[:EXAMPLE_CHARACTERS],
    )


def _spread(things: Sequence[_Thing], most: int) -> list[_Thing]:
    count = min(most, len(things))
    return [things[index * len(things) // count] for index in range(count)]


def _chunks(items: Sequence[_Item]) -> list[Sequence[_Item]]:
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
