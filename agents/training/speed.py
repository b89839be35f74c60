"""How much of a GPU a run uses: floating-point operations a token costs, what the device could do, and memory at its peak.

Model FLOPs utilisation after PaLM (Chowdhery et al., 2022, appendix B): 6 operations per parameter and token, and 12·L·H·Q·T for
attention that is counted as if every token saw all T of its row. Two things differ, and both make the figure smaller. An input
embedding that is no output layer too is a look-up and counts nothing; a frozen weight has no gradient of its own, so it counts 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Dense bf16 operations a second by the vendor's data sheets, by a part of the device's name; the first that fits.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: str) -> float:
    """Dense bf16 operations a second of a GPU by its name; 0 where they are not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device), 0.0)


def attended_length(lengths: Sequence[int]) -> float:
    """The T of rows of several lengths: over all tokens, the mean length of the row that a token stands in."""
    return sum(length * length for length in lengths) / max(sum(lengths), 1)


def flops_per_token(model: Any, length: float) -> float:
    """Operations that training costs for each token of rows of `length` tokens, forward and backward, nothing counted twice."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    head_size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    looked_up = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    if output is not None and output.weight is looked_up:
        looked_up = None
    weights = 0
    for parameter in model.parameters():
        if parameter is not looked_up:
            weights += (6 if parameter.requires_grad else 4) * numel(parameter)
    return weights + 12 * config.num_hidden_layers * heads * head_size * length


def numel(parameter: Any) -> int:
    """Numbers in the whole parameter, wherever its parts lie."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else int(parameter.numel())


class GpuFigures:
    """Figures of this rank's GPU, for the records of a step."""

    def __init__(self, flops: float, world_size: int) -> None:
        import torch

        self._cuda = torch.cuda
        self._flops = flops
        self._peak = peak_flops(torch.cuda.get_device_name()) * world_size
        torch.cuda.reset_peak_memory_stats()

    def at(self, tokens_per_second: float) -> dict[str, float]:
        """Most bytes allocated and reserved so far on rank 0, and the model FLOPs utilisation where the GPU's peak is known."""
        figures = {
            "gpu_memory_allocated_bytes": float(self._cuda.max_memory_allocated()),
            "gpu_memory_reserved_bytes": float(self._cuda.max_memory_reserved()),
        }
        if self._peak and self._flops:
            figures["mfu"] = tokens_per_second * self._flops / self._peak
        return figures
