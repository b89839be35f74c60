"""Peak memory of one worker of a fine-tune, by arithmetic alone.

Model states follow ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
section 3 and figure 1), activations Korthikanti et al. ("Reducing Activation Recomputation in Large Transformer Models", 2022,
equation 1) without the term for attention scores, which no attention in use here keeps. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

MIB = 2**20
BUCKET = 50_000_000
"""Elements of DeepSpeed's buckets (agents/training/deepspeed_config.py)."""

PROCESS = {False: 900 * MIB, True: 1600 * MIB}
"""What a worker's process takes before it has a model: on a CPU its libraries, on a GPU context and workspaces."""

ACTIVATIONS = 34
"""Bytes of 16-bit activations per token, hidden unit and layer."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs to know of a model."""

    parameters: int
    hidden: int
    layers: int
    intermediate: int
    key_value: int

    @classmethod
    def of(cls, config: dict[str, Any], weight_bytes: int) -> Model | None:
        """Read a config.json as transformers writes it; None for one that does not say what is needed."""
        inner = config.get("text_config")
        text: dict[str, Any] = inner if isinstance(inner, dict) else config
        width = {"float32": 4, "float16": 2, "bfloat16": 2}.get(str(text.get("dtype") or text.get("torch_dtype")), 0)
        hidden, layers = text.get("hidden_size") or text.get("n_embd"), text.get("num_hidden_layers") or text.get("n_layer")
        if not (width and isinstance(hidden, int) and isinstance(layers, int) and weight_bytes > 0):
            return None
        heads = text.get("num_attention_heads") or text.get("n_head") or 1
        key_value = hidden // heads * (text.get("num_key_value_heads") or heads)
        return cls(weight_bytes // width, hidden, layers, text.get("intermediate_size") or 4 * hidden, key_value)

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA of all linear layers but the head (Hu et al., 2021): rank times inputs and outputs of each."""
        attention = 2 * self.hidden + 2 * (self.hidden + self.key_value) + 2 * self.hidden
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


@dataclass(frozen=True)
class Setup:
    """What of a fine-tune decides about its memory."""

    workers: int
    zero_stage: int
    batch_size: int
    gradient_accumulation: int
    length: int
    bf16: bool
    gpu: bool
    lora_rank: int = 0
    """0 where the whole model is trained."""

    reference: bool = False
    """Whether a second, frozen copy of the model is held."""

    sequences: int = 1
    """Sequences that each row of a micro-batch comes to: pairs have two."""

    generates: bool = False
    """Whether answers are generated in training, with the keys and values of a whole micro-batch in memory."""

    four_bits: bool = False
    """Whether the base is kept in 4 bits."""


def parts(model: Model, setup: Setup) -> dict[str, int]:
    """The parts of the peak."""
    width = 2 if setup.bf16 else 4
    trained = model.adapter(setup.lora_rank) if setup.lora_rank else model.parameters
    # NF4 with its constants, themselves in 8 bits, takes 4.127 bits a weight (Dettmers et al., 2023, section 3).
    base = round(4.127 / 8 * model.parameters) if setup.four_bits else width * model.parameters
    adapter = width * trained if setup.lora_rank else 0
    # Adam's two moments, and from stage 1 or with bf16 on a 32-bit copy of what they update.
    state = 12 if setup.bf16 or setup.zero_stage else 8
    share = [1.0 / setup.workers if setup.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    tokens = setup.batch_size * setup.sequences * setup.length
    found = {
        "parameters": round((base + adapter) * share[2]),
        "gradients": round(width * trained * share[1]),
        "optimizer": round(state * trained * share[0]),
        "activations": ACTIVATIONS * width // 2 * tokens * model.hidden * model.layers,
        "buffers": 2 * width * min(BUCKET, trained) if setup.zero_stage else 0,
        "process": PROCESS[setup.gpu],
    }
    if setup.reference:
        found["reference"] = round(width * model.parameters * share[2])
    if setup.generates:
        found["generation"] = 2 * width * tokens * model.key_value * model.layers
    return found


def advice(model: Model, setup: Setup, available: int, adapters: bool) -> list[str]:
    """Single changes with which it would fit, the gentlest first."""
    found = []
    batch = setup.batch_size
    while batch > 1:
        batch //= 2
        accumulation = setup.gradient_accumulation * -(-setup.batch_size // batch)
        if _fits(model, replace(setup, batch_size=batch), available):
            smaller = f"hyperparameters.batch_size={batch}"
            found.append(f"{smaller} hyperparameters.gradient_accumulation={accumulation}")
            break
    if setup.zero_stage < 3 and setup.workers > 1 and _fits(model, replace(setup, zero_stage=3), available):
        found.append("sharding.zero_stage=3")
    if adapters and not setup.lora_rank and _fits(model, replace(setup, lora_rank=16), available):
        found.append("method=lora")
    workers = setup.workers
    while workers < 64:
        workers *= 2
        if _fits(model, replace(setup, workers=workers), available):
            found.append(f"workers={workers}")
            break
    return found


def _fits(model: Model, setup: Setup, available: int) -> bool:
    return sum(parts(model, setup).values()) <= available
