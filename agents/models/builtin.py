"""`builtin:tiny`: a small Llama with random weights, made on the spot without a download.

Its tokenizer is learned from the docstrings of Python's standard library, so it knows English words; its weights come from a
seed. It exists so that everything can be tried end to end on any machine.
"""

from __future__ import annotations

import ast
import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

NAME = "builtin:tiny"
SEED = 42
PIECES = 4096
MAX_LENGTH = 1024
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (PAD, END, *ROLES)
# Not everywhere installed, or much code and hardly a word of English.
LEFT_OUT = ("distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data", "test", "tkinter", "turtledemo")
# The generation block marks what an assistant says, for training on whole chats.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ' is not known; use system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] ~ '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] ~ '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tiny(out: Path, seed: int = SEED) -> Path:
    """Write the model to the folder `out` and return it. The same Python and seed give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(len(tokenizer)))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def tiny_config(pieces: int) -> LlamaConfig:
    """Return the shape of the model: two and a half million parameters, so that two CPU cores train it in minutes."""
    return LlamaConfig(
        vocab_size=pieces,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(END),
        bos_token_id=None,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from the standard library's docstrings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docstrings(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def docstrings() -> Iterator[str]:
    """Yield the standard library's docstrings in a fixed order. Modules are parsed, never imported."""
    for path in sources():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            log.debug("%s is left out: %s", path, error)
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text


def sources() -> Iterator[Path]:
    """Yield the standard library's source files without its tests, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        module, package = root / f"{name}.py", root / name
        if module.is_file():
            yield module
        elif package.is_dir() and name not in LEFT_OUT:
            yield from sorted(path for path in package.rglob("*.py") if not {"test", "tests"} & set(path.relative_to(root).parts))
