"""Base models from the Hugging Face hub, or another server that speaks its protocol (`HF_ENDPOINT`). Never any code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from agents.models.files import choose_files
from common.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT = 30.0


def endpoint() -> str:
    """Return the hub's address."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def resolve_revision(repo: str, revision: str = "") -> tuple[str, list[str]]:
    """Return the commit that a revision (a branch, tag or commit; the default branch if empty) stands for, and its model files.

    Raises NotFound, PermissionDenied, Unavailable, and InvalidArgument where the model is of a kind that is not taken.
    """
    with _told(repo, revision):
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=revision or None, timeout=TIMEOUT)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if not info.sha:
        raise Unavailable(f"the hub at {endpoint()} told no commit for {repo}", "HUB_UNAVAILABLE")
    return info.sha, choose_files(names, f"{repo} on the hub")


def download(repo: str, commit: str, names: list[str], folder: Path) -> None:
    """Download files of one commit into a folder. What an interrupted download left there is used."""
    with _told(repo, commit):
        # The small texts first: a model that asks for its own code is refused before its weights have travelled.
        texts = [name for name in names if not name.endswith(".safetensors")]
        for wanted in (texts, names):
            snapshot_download(
                repo, revision=commit, allow_patterns=[_literal(name) for name in wanted], local_dir=folder, endpoint=endpoint()
            )
            _refuse_code(repo, folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Unavailable(f"the hub at {endpoint()} did not deliver {missing[0]} of {repo}; try again", "HUB_UNAVAILABLE")
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _refuse_code(repo: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
    if isinstance(config, dict) and "auto_map" in config:
        raise InvalidArgument(
            f"{repo} asks for its own code to be run (auto_map in config.json); such models are not taken", "REMOTE_CODE"
        )


@contextmanager
def _told(repo: str, revision: str) -> Iterator[None]:
    """Turn the hub's errors into plain ones."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionDenied(
            f"{repo} is gated on the hub; accept its terms there and give the job a secret as HF_TOKEN", "HUB_GATED"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision!r} on the hub at {endpoint()}", "MODEL_NOT_FOUND") from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no model {repo} on the hub at {endpoint()}, or it is private; check the name, or give the "
            "job a secret as HF_TOKEN",
            "MODEL_NOT_FOUND",
        ) from error
    except HFValidationError as error:
        raise InvalidArgument(f"{repo!r} is not the name of a model on the hub: {error}", "BAD_MODEL_NAME") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise Unavailable(
            f"the hub at {endpoint()} did not answer for {repo} ({line}); check the network, or use a local path as the base",
            "HUB_UNAVAILABLE",
        ) from error
    except ValueError as error:
        raise Unavailable(
            f"the hub at {endpoint()} gave an answer for {repo} that cannot be read: {error}", "HUB_UNAVAILABLE"
        ) from error
