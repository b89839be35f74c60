"""Tokens a second, and time to the first of them: our gateway and replica against `transformers serve`, at several concurrencies.

One Llama of four million parameters with random weights, which never ends an answer by itself; streams of 64 greedy tokens over
HTTP, closed loop: each client asks again when it has its answer. The peers are `transformers serve` as it is and with
--continuous-batching, each stopped by SIGSTOP while others are measured; rounds are interleaved. Tokens are counted by the
tokenizer, in the same way for all. The engine itself, without HTTP, stands beside them, with eight adapters mixed and in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import Spread, keep, machine
from luthier.v1 import endpoint_pb2
from tests.support.coordinator_process import free_port
from tests.support.stack import Stack

COMMAND = "python -m benchmarks.serving_engine"
CONCURRENCY = (1, 4, 16, 64)
TOKENS = 64
WORDS = [f"{first} {second}" for first in ("old", "quick", "brown") for second in ("fox", "dog", "page", "tool", "door", "key")]


@dataclass
class Server:
    """Something that answers /v1/chat/completions."""

    name: str
    url: str
    model: str
    headers: dict[str, str]
    pids: tuple[int, ...] = ()

    def wake(self, awake: bool) -> None:
        """Let its processes run, or stop them."""
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT if awake else signal.SIGSTOP)


def build(folder: Path) -> Path:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agents.models.builtin import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Some other logit is always above these.
        for token in tokenizer.all_special_ids:
            model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt(number: int) -> str:
    """A prompt of some 40 tokens, another one each time."""
    return " ".join(WORDS[(number + place) % len(WORDS)] for place in range(12)) + f" {number}"


async def ask(client: httpx.AsyncClient, server: Server, number: int) -> tuple[str, float, float]:
    """Text of an answer, seconds to its first text and to its end."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    begun, first, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", f"{server.url}/chat/completions", json=body, headers=server.headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{server.name}: {response.status_code} {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                piece = choices[0]["delta"].get("content") if choices else None
                if piece:
                    first = first or time.perf_counter() - begun
                    text += piece
    return text, first, time.perf_counter() - begun


async def load(server: Server, concurrency: int, seconds: float, start: int) -> list[tuple[str, float, float]]:
    """Keep so many clients busy for a time; what each answer was like."""
    answers: list[tuple[str, float, float]] = []
    deadline = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def work(worker: int) -> None:
            number = start + worker * 1000
            while time.perf_counter() < deadline:
                answers.append(await ask(client, server, number))
                number += 1

        await asyncio.gather(*(work(worker) for worker in range(concurrency)))
    return answers


def figures(answers: list[tuple[str, float, float]], seconds: float, count: Any) -> dict[str, float]:
    """Rates and times of a round."""
    tokens = sum(len(count(text)) for text, _, _ in answers)
    firsts = sorted(first for _, first, _ in answers)
    return {
        "tokens_per_second": tokens / seconds,
        "answers": len(answers),
        "tokens_an_answer": tokens / len(answers),
        **{f"first_p{p}_ms": 1000 * firsts[min(len(firsts) - 1, len(firsts) * p // 100)] for p in (50, 95, 99)},
    }


@contextlib.contextmanager
def peers(model: Path, folder: Path) -> Iterator[list[Server]]:
    """`transformers serve` in both modes."""
    started: list[tuple[Server, subprocess.Popen[bytes]]] = []
    program = Path(sys.executable).with_name("transformers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    try:
        for name, flags in (("transformers serve", []), ("transformers serve, continuous", ["--continuous-batching"])):
            port = free_port()
            log = (folder / f"{len(started)}.log").open("wb")
            command = [str(program), "serve", str(model), "--device", "cpu", "--port", str(port), *flags]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            server = Server(name, f"http://localhost:{port}/v1", str(model), {}, (process.pid,))
            started.append((server, process))
            until_it_answers(server, process, folder / f"{len(started) - 1}.log")
            server.wake(False)
        yield [server for server, _ in started]
    finally:
        for server, process in started:
            server.wake(True)
            process.terminate()
            process.wait(30)


def until_it_answers(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the first answer."""
    deadline = time.monotonic() + 180
    while True:
        try:
            asyncio.run(load(server, 1, 0.01, 0))
            return
        except (httpx.HTTPError, RuntimeError) as error:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{server.name} does not answer: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(1)


def in_process(model: Path, folder: Path) -> dict[str, Any]:
    """The engine without HTTP: sixteen at a time, and eight adapters in one batch and in turn."""
    import torch

    from serving.engines import Request, SamplingParams, load_engine
    from tests.integration.serving.test_adapters import build_adapter

    torch.set_num_threads(2)
    engine = load_engine(model)
    lanes = engine.lanes()
    names = [f"adapter-{number}" for number in range(8)]
    for number, name in enumerate(names):
        shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        lanes.add_adapter(name, build_adapter(model, folder / name, shape, number))()
    params = SamplingParams(max_tokens=TOKENS)

    def rate(groups: list[list[str]]) -> float:
        done: list[Any] = []
        begun = time.perf_counter()
        for group in groups:
            for number, name in enumerate(group):
                lanes.join(Request(prompt(number), params, adapter=name), done.append)
            while lanes.busy:
                lanes.step()
        return sum(each.completion_tokens for each in done) / (time.perf_counter() - begun)

    samples: dict[str, list[float]] = {"sixteen": [], "mixed": [], "in_turn": []}
    for number in range(7):
        samples["sixteen"].append(rate([[""] * 16]))
        samples["mixed"].append(rate([names]))
        samples["in_turn"].append(rate([[name] for name in names]))
        if not number:  # the first is a warm-up
            samples = {name: [] for name in samples}
    ratios = [mixed / turn for mixed, turn in zip(samples["mixed"], samples["in_turn"], strict=True)]
    told = {f"{name}_tokens_per_second": vars(Spread.of(sample)) for name, sample in samples.items()}
    return {**told, "ratio_mixed_to_in_turn": vars(Spread.of(ratios))}


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="ls-") as name:
        folder = Path(name)
        model = build(folder / "model")
        engine = in_process(model, folder)
        print(json.dumps({key: round(value["median"], 2) for key, value in engine.items()}), flush=True)
        stack = Stack(Path(tempfile.mkdtemp(prefix="lt-")))
        try:
            stack.up()
            with stack.client() as client, peers(model, folder) as others:
                client.upload_model(model, "bench")
                wanted = endpoint_pb2.Endpoint(routes=[endpoint_pb2.Route(model_version="bench@1")])
                wanted.resources.cpus = 2
                wanted.autoscaling.target_ongoing_requests = 64
                client.deploy_endpoint("bench", wanted)
                client.wait_ready("bench", 180)
                headers = {"authorization": f"Bearer {stack.token}", "x-luthier-cache": "off"}
                found = measure([Server("luthier", stack.gateway_url, "bench", headers), *others], model, options)
        finally:
            stack.down()
    result = {"what": f"streams of {TOKENS} greedy tokens, closed loop, 4M-parameter Llama, two cores", **vars(options)}
    path = keep("serving_engine", COMMAND, {**result, "machine": before, "engine": engine, "by_concurrency": found})
    print(path)


def measure(servers: list[Server], model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All servers at all concurrencies, in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for concurrency in CONCURRENCY:
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for number in range(options.rounds + 1):
            for server in servers:
                server.wake(True)
                begun = time.perf_counter()
                answers = asyncio.run(load(server, concurrency, options.seconds if number else 1.0, 10_000 * number))
                taken = time.perf_counter() - begun
                server.wake(False)
                if number:  # the first is a warm-up
                    rounds[server.name].append(figures(answers, taken, tokenizer.tokenize))
        row: dict[str, Any] = {"concurrency": concurrency}
        for name, sample in rounds.items():
            row[name] = {key: statistics.median(each[key] for each in sample) for key in sample[0]}
            row[name]["tokens_per_second_spread"] = vars(Spread.of([each["tokens_per_second"] for each in sample]))
        best = [
            max(sample[n]["tokens_per_second"] for name, sample in rounds.items() if name != "luthier")
            for n in range(options.rounds)
        ]
        ours = [each["tokens_per_second"] for each in rounds["luthier"]]
        row["ratio_luthier_to_the_best"] = vars(Spread.of([our / peer for our, peer in zip(ours, best, strict=True)]))
        print(concurrency, {name: round(row[name]["tokens_per_second"]) for name in rounds}, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
