import pytest


@pytest.fixture(autouse=True)
def _node_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path / "node"))
