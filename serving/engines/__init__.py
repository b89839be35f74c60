"""Engines: one interface in front of the libraries that run models. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path

from serving.engines.base import Completion, Engine, Request, SamplingParams, Score

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "Score", "load_engine"]


def load_engine(model_dir: Path, base_dir: Path | None = None, device: str = "auto") -> Engine:
    """Load the model in `model_dir` (an adapter goes onto the base in `base_dir`).

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. Raises InvalidArgument where the folder is not a model that can be served.
    """
    from serving.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(model_dir, base_dir, device)
