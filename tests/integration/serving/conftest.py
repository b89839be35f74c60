"""A micro Llama with random weights, and a Ray of our own to serve it; both made on the spot."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from coordinator.cluster.serve_config import AppStatus, read_status

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def build_micro_llama(folder: Path, seed: int = 0, positions: int = 256, endless: bool = False) -> Path:
    """Write a full model folder; hidden size 32, two layers, byte-level BPE of 400 pieces. An endless one never ends greedily."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["the printer on the second floor does not print", "my invoice is wrong, please refund it", "größer café 東京"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=positions,
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.4,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if endless:
        with torch.no_grad():
            model.lm_head.weight[fast.eos_token_id] = 0  # some other logit is always above 0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def micro_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_micro_llama(tmp_path_factory.mktemp("micro-llama"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is in the middle of an answer for half a minute."""
    return build_micro_llama(tmp_path_factory.mktemp("slow-llama"), seed=1, positions=8192, endless=True)


class PrivateRay:
    """A Ray head of our own: its own folder, its own ports, and nobody else's processes are touched."""

    def __init__(self, folder: Path) -> None:
        self.gateway_port, port, self.dashboard_port, *others = free_ports(8)
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port", "metrics-export-port")
        # Sockets have short paths: pytest's folders are too deep for them.
        self._temp = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self._temp}"),
            *(f"--port={port}", f"--dashboard-port={self.dashboard_port}", "--object-store-memory=100000000"),
            *(f"--{name}={number}" for name, number in zip(names, others, strict=False)),
            *("--min-worker-port=0", "--max-worker-port=0"),
        ]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LUTHIER_"))}
        env |= {"RAY_AUTH_MODE": "disabled", "LUTHIER_NODE_HOME": str(folder / "node"), "RAY_ADDRESS": f"127.0.0.1:{port}"}
        self._log = (folder / "ray.log").open("wb")
        self._process = subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log, start_new_session=True)

    def serve(self, config: dict[str, Any]) -> None:
        """Put a configuration, once the dashboard is there."""
        deadline = time.monotonic() + 120
        while True:
            try:
                response = httpx.put(self._serve_url, json=config, timeout=30)
                assert response.status_code == 200, response.text
                return
            except httpx.TransportError:
                assert self._process.poll() is None, Path(self._log.name).read_text()[-2000:]
                assert time.monotonic() < deadline, "Ray's dashboard did not come up"
                time.sleep(0.3)

    def details(self) -> dict[str, Any]:
        """Return Serve's status document."""
        found: dict[str, Any] = httpx.get(self._serve_url, timeout=30).json()
        return found

    def wait_ready(self, *apps: str, seconds: float = 240) -> dict[str, AppStatus]:
        """Wait until all of `apps` run."""
        deadline = time.monotonic() + seconds
        while True:
            status = read_status(self.details())
            if all(name in status and status[name].state == "RUNNING" and status[name].ready for name in apps):
                return status
            assert not any(app.failed for app in status.values()), status
            assert time.monotonic() < deadline, status
            time.sleep(0.3)

    @property
    def _serve_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}/api/serve/applications/"

    def stop(self) -> None:
        """End it and its children at once: nothing here is worth a graceful end."""
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self._process.wait(10)
        self._log.close()
        shutil.rmtree(self._temp, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def private_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRay]:
    ray = PrivateRay(tmp_path_factory.mktemp("ray"))
    yield ray
    ray.stop()
