import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.support.fake_services import FakeCoordinator


@dataclass
class Ran:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Luthier = Callable[..., Ran]


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def luthier(fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Luthier:
    """The program, pointed at the fake coordinator."""
    for name in ("LUTHIER_OUTPUT", "LUTHIER_PROJECT", "LUTHIER_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LUTHIER_SERVER", fake.address)
    monkeypatch.setenv("LUTHIER_TOKEN", fake.token)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ran(status, *capfd.readouterr())

    return run


class Gateway(BaseHTTPRequestHandler):
    """Says back what it was asked, as OpenAI's API would."""

    asked: list[tuple[str, dict[str, Any]]] = []
    refusal: tuple[int, str] | None = None
    url = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Gateway.asked.append((self.headers["Authorization"], body))
        if Gateway.refusal:
            status, message = Gateway.refusal
            self.answer(status, "application/json", json.dumps({"error": {"message": message, "type": "invalid_request_error"}}))
        elif body.get("stream"):
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "desk"}
            parts = [chunk | {"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("bill", "ing")]
            self.answer(200, "text/event-stream", "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n")
        else:
            message = {"role": "assistant", "content": "billing"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            content = {"id": "1", "object": "chat.completion", "created": 1, "model": "desk", "choices": [choice]}
            self.answer(200, "application/json", json.dumps(content))

    def answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def gateway() -> Iterator[type[Gateway]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Gateway.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    Gateway.asked, Gateway.refusal = [], None
    yield Gateway
    server.shutdown()
    server.server_close()
