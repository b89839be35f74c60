"""Fused kernels for the layers of a model on a GPU: Liger's (Hsu et al., 2024), for norms, rotary positions and the MLP.

Each does in one pass over memory what the layers do in several, and keeps less for the backward pass. The loss is fused already.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

_PACKAGE = "liger_kernel"


def fuse_layers(model: Any, use_gpu: bool) -> str:
    """Let a model use the fused kernels where it can. Returns what is done, and why not where nothing is."""
    if obstacle := obstacle_to_fusing(model.config.model_type, use_gpu):
        return f"no fused layers: {obstacle}"
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return "with Liger's fused layers"


def obstacle_to_fusing(model_type: str, use_gpu: bool) -> str:
    """Why the layers of such a model cannot be fused here; empty where they can."""
    if not use_gpu:
        return "they need a GPU"
    if find_spec(_PACKAGE) is None:
        return "liger-kernel is not installed (pip install 'luthier[gpu]')"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return "" if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger has none for {model_type}"
