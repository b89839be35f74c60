"""What has to be known of the built-in training methods before anything runs: the rows and the settings that each takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import Message

from common.errors import InvalidArgument, Violation
from luthier.v1 import dataset_pb2, training_pb2

ANSWERED = (dataset_pb2.ROW_SHAPE_CHAT, dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION, dataset_pb2.ROW_SHAPE_TEXT_LABEL)
PAIRS = (dataset_pb2.ROW_SHAPE_PREFERENCE,)
PROMPTS = (dataset_pb2.ROW_SHAPE_PROMPT, *ANSWERED)
JUDGED = (dataset_pb2.ROW_SHAPE_CHAT, dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION)
RAW = (dataset_pb2.ROW_SHAPE_TEXT,)
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down")
KTO_LOSSES = ("kto", "apo_zero_unpaired")
REWARD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
MAX_REWARDS = 16
MAX_SOURCE = 65_536
_SHAPE_WORDS: dict[int, str] = {
    dataset_pb2.ROW_SHAPE_CHAT: "chats",
    dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION: "prompts with completions",
    dataset_pb2.ROW_SHAPE_TEXT_LABEL: "texts with labels",
    dataset_pb2.ROW_SHAPE_PREFERENCE: "prompts with a chosen and a rejected answer",
    dataset_pb2.ROW_SHAPE_PROMPT: "prompts",
    dataset_pb2.ROW_SHAPE_TEXT: "texts",
}


@dataclass(frozen=True)
class Facts:
    """One method. `adapter`: never, always, or where the job gives settings of one."""

    shapes: tuple[int, ...]
    adapter: Literal["never", "always", "asked"] = "asked"
    settings: Literal["", "preference", "reinforcement"] = ""
    # Rows are scored by the engine that serves, as completions of their prompts, before and after.
    scored_as_answers: bool = False


METHODS: dict[str, Facts] = {
    "full": Facts(ANSWERED, "never", scored_as_answers=True),
    "lora": Facts(ANSWERED, "always", scored_as_answers=True),
    "rslora": Facts(ANSWERED, "always", scored_as_answers=True),
    "dora": Facts(ANSWERED, "always", scored_as_answers=True),
    "qlora": Facts(ANSWERED, "always", scored_as_answers=True),
    "pretrain": Facts(RAW),
    "dpo": Facts(PAIRS, settings="preference"),
    "kto": Facts(JUDGED, settings="preference"),
    "reward": Facts(PAIRS, "never"),
    "grpo": Facts(PROMPTS, settings="reinforcement"),
    "rloo": Facts(PROMPTS, settings="reinforcement"),
}


def trains_adapter(spec: training_pb2.FinetuneSpec) -> bool:
    """Whether a fine-tune trains an adapter rather than all weights; False for methods that are not built in."""
    facts = METHODS.get(spec.method)
    return facts is not None and (facts.adapter == "always" or (facts.adapter == "asked" and spec.HasField("lora")))


def holds_reference(spec: training_pb2.FinetuneSpec) -> bool:
    """Whether a second, frozen copy of the model is held: what is learned is compared with it, and no adapter can be left out."""
    if spec.method not in METHODS or trains_adapter(spec):
        return False
    settings = METHODS[spec.method].settings
    return settings == "preference" or (settings == "reinforcement" and divergence_weight(spec) > 0)


def divergence_weight(spec: training_pb2.FinetuneSpec) -> float:
    """The weight of the divergence from the start in reinforcement."""
    given = spec.reinforcement
    return given.beta if given.HasField("beta") else 0.05 if spec.method == "rloo" else 0.0


def check_rows(method: str, shape: int, labels: Sequence[str], field: str) -> None:
    """Raise InvalidArgument where a method cannot learn from rows of a shape, with these labels. `field` is to blame."""
    facts = METHODS.get(method)
    if facts is None or not shape:
        return
    if shape not in facts.shapes:
        wanted, has = _words(facts.shapes), _SHAPE_WORDS.get(shape, "something else")
        raise InvalidArgument.of([Violation(field, f"method {method} learns from {wanted}, and the data set holds {has}")])
    if method == "kto" and sorted(labels) != ["false", "true"]:
        has = ", ".join(repr(label[:40]) for label in list(labels)[:5]) or "none"
        why = (
            f"method kto needs rows of both labels, true (desired) and false (not desired), and the data set's labels are: {has}"
        )
        raise InvalidArgument.of([Violation(field, why)])


def violations(spec: training_pb2.FinetuneSpec, path: str) -> list[Violation]:
    """What is wrong with the settings of adapters, preferences and rewards. `path` ends with a dot, or is empty."""
    method = spec.method or "full"
    facts = METHODS.get(method)
    if facts is None:
        return []
    bad: list[Violation] = []
    if method == "qlora" and spec.sharding.zero_stage == 3:
        bad.append(Violation(f"{path}sharding.zero_stage", "4-bit weights cannot be spread over workers; use 0, 1 or 2"))
    if method == "kto" and spec.hyperparameters.HasField("batch_size") and spec.hyperparameters.batch_size < 2:
        why = "has to be at least 2 for method kto, which estimates a divergence from the other rows of a micro-batch"
        bad.append(Violation(f"{path}hyperparameters.batch_size", why))
    for name in ("preference", "reinforcement"):
        if spec.HasField(name) and facts.settings != name:
            takers = ", ".join(each for each, other in METHODS.items() if other.settings == name)
            bad.append(Violation(f"{path}{name}", f"given, but method {method!r} takes none; these do: {takers}"))
    if facts.settings == "preference":
        bad += _preference(spec, f"{path}preference")
    elif facts.settings == "reinforcement":
        bad += _reinforcement(spec, path)
    return bad


def reward_name(reward: training_pb2.Reward) -> str:
    """The name of a reward in figures and messages."""
    return reward.name or reward.WhichOneof("kind") or ""


def _preference(spec: training_pb2.FinetuneSpec, path: str) -> list[Violation]:
    given, losses = spec.preference, DPO_LOSSES if spec.method == "dpo" else KTO_LOSSES
    bad = _numbers(
        given,
        path,
        beta=("above 0", lambda n: n > 0),
        label_smoothing=("from 0 to below 0.5", lambda n: 0 <= n < 0.5),
        desirable_weight=("above 0", lambda n: n > 0),
        undesirable_weight=("above 0", lambda n: n > 0),
    )
    if given.loss and given.loss not in losses:
        bad.append(Violation(f"{path}.loss", f"{given.loss[:40]!r} is none of {', '.join(losses)}"))
    if given.HasField("label_smoothing") and (spec.method != "dpo" or given.loss not in ("", "sigmoid", "robust")):
        bad.append(Violation(f"{path}.label_smoothing", "is for method dpo with the loss sigmoid or robust"))
    for name in ("desirable_weight", "undesirable_weight"):
        if given.HasField(name) and spec.method != "kto":
            bad.append(Violation(f"{path}.{name}", "is for method kto"))
    return bad


def _reinforcement(spec: training_pb2.FinetuneSpec, path: str) -> list[Violation]:
    given, where = spec.reinforcement, f"{path}reinforcement"
    bad = _numbers(
        given,
        where,
        num_generations=("from 2 to 1024", lambda n: 2 <= n <= 1024),
        max_completion_length=("from 1 to 65536", lambda n: 1 <= n <= 65_536),
        temperature=("above 0", lambda n: n > 0),
        top_p=("above 0 and at most 1", lambda n: 0 < n <= 1),
        beta=("0 or more", lambda n: n >= 0),
    )
    hyper = spec.hyperparameters
    answers = given.num_generations if given.HasField("num_generations") else 8
    batch = (hyper.batch_size if hyper.HasField("batch_size") else 8) * max(spec.workers, 1)
    batch *= hyper.gradient_accumulation if hyper.HasField("gradient_accumulation") else 1
    if not bad and batch > 0 and batch % answers:
        why = f"{answers} answers to a prompt do not divide the {batch} of a step (batch_size * gradient_accumulation * workers)"
        bad.append(Violation(f"{where}.num_generations", why))
    length = hyper.max_length if hyper.HasField("max_length") else 512
    answer = given.max_completion_length if given.HasField("max_completion_length") else 256
    if not bad and answer >= length:
        why = f"{answer} leaves no room for a prompt in hyperparameters.max_length={length}"
        bad.append(Violation(f"{where}.max_completion_length", why))
    if spec.HasField("min_workers") and spec.min_workers != max(spec.workers, 1):
        bad.append(
            Violation(f"{path}min_workers", f"method {spec.method} cannot be elastic: a step's answers follow from workers")
        )
    if not given.rewards:
        bad.append(Violation(f"{where}.rewards", "missing: say what an answer is worth, for example exact_match: {}"))
    elif len(given.rewards) > MAX_REWARDS:
        bad.append(Violation(f"{where}.rewards", f"{len(given.rewards)} are more than {MAX_REWARDS}"))
    names = [reward_name(reward) for reward in given.rewards]
    for number, reward in enumerate(given.rewards):
        at = f"{where}.rewards[{number}]"
        bad += _reward(reward, at)
        if names[number] in names[:number]:
            bad.append(Violation(f"{at}.name", f"{names[number][:40]!r} is the name of an earlier reward; give each its own"))
    return bad


def _reward(reward: training_pb2.Reward, at: str) -> list[Violation]:
    kind = reward.WhichOneof("kind")
    if kind is None:
        kinds = ", ".join(field.name for field in reward.DESCRIPTOR.oneofs_by_name["kind"].fields)
        return [Violation(at, f"says not how to judge: give one of {kinds}")]
    bad = _numbers(reward, at, weight=("other than 0", lambda n: n != 0))
    if reward.name and not REWARD_NAME.fullmatch(reward.name):
        bad.append(
            Violation(f"{at}.name", f"{reward.name[:40]!r} is not 1 to 32 lower-case letters, digits and _, a letter first")
        )
    settings, where = getattr(reward, kind), f"{at}.{kind}"
    if kind == "regex":
        bad += _pattern(settings.pattern, f"{where}.pattern")
    elif kind == "json_schema":
        bad += _schema(settings.schema, f"{where}.schema")
    elif kind == "numeric":
        for name in ("absolute_tolerance", "relative_tolerance"):
            value = getattr(settings, name)
            if not (math.isfinite(value) and value >= 0):
                bad.append(Violation(f"{where}.{name}", f"{value} is not a number of 0 or more"))
    elif kind == "reward_model" and not settings.model:
        bad.append(Violation(f"{where}.model", "missing: a version of a model that the method reward trained (name@3)"))
    elif kind == "function":
        bad += _function(settings, where)
    return bad


def _function(settings: training_pb2.FunctionReward, where: str) -> list[Violation]:
    bad = _numbers(
        settings,
        where,
        timeout_seconds=("above 0 and at most 600", lambda n: 0 < n <= 600),
        memory_mib=("from 64 to 65536", lambda n: 64 <= n <= 65_536),
    )
    if len(settings.source) > MAX_SOURCE:
        return [*bad, Violation(f"{where}.source", f"longer than {MAX_SOURCE:,} characters")]
    if not re.search(r"^(async )?def reward\(|^reward\s*=", settings.source, re.MULTILINE):
        bad.append(Violation(f"{where}.source", "does not define `def reward(prompt, completion, answer): ...`"))
    return bad


def _pattern(pattern: str, where: str) -> list[Violation]:
    import re2

    if not pattern:
        return [Violation(where, "missing")]
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern.replace("{answer}", "answer"), options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        return [Violation(where, f"is no pattern of RE2, which knows no look-around and no back references: {why[:200]}")]
    return []


def _schema(schema: str, where: str) -> list[Violation]:
    try:
        parsed = json.loads(schema) if schema else None
    except (ValueError, RecursionError) as error:
        return [Violation(where, f"is not JSON: {str(error)[:200]}")]
    return [] if isinstance(parsed, dict) else [Violation(where, "has to be a JSON object")]


def _numbers(message: Message, path: str, **rules: tuple[str, Any]) -> list[Violation]:
    """Numbers of `message` that are given and are not finite, or break their rule."""
    bad = []
    for name, (rule, good) in rules.items():
        value = getattr(message, name)
        if message.HasField(name) and not (math.isfinite(value) and good(value)):
            bad.append(Violation(f"{path}.{name}", f"{value} is not a number {rule}"))
    return bad


def _words(shapes: Sequence[int]) -> str:
    words = [_SHAPE_WORDS[shape] for shape in shapes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
