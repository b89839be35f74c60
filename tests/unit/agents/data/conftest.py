import json

import pytest

from agents.data.ingest import Request, ingest


@pytest.fixture(autouse=True)
def _node_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))


@pytest.fixture
def datasets(tmp_path):
    """The folder that versions are published to."""
    return tmp_path / "storage" / "datasets"


@pytest.fixture
def take(tmp_path, datasets):
    """Ingest content under a file name: `take("a.csv", b"...", columns={...})`."""

    def run(filename, content, **options):
        staged = tmp_path / "staged"
        staged.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ingest(Request(staged, filename, datasets.as_uri(), **options))

    return run


@pytest.fixture
def jsonl():
    """Rows as JSONL."""
    return lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
