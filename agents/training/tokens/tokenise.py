"""Tokenising a split, in this process or in several."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from agents.training.data import Example, pieces, tokenise
from common.rows import Row, count_split, iter_split

# A process takes some seconds to import transformers and to load the tokenizer.
PARALLEL_ROWS = 20_000
CHUNK = 512
_AHEAD = 4

Tokenise = Callable[[Row], list[Example]]
_tokenise: Tokenise


def tokenised(
    path: Path,
    base_dir: Path,
    tokenizer: Any,
    max_length: int,
    *,
    loss_on_all: bool,
    max_rows: int = 0,
    processes: int = 1,
    raw: bool = False,
) -> Iterator[tuple[Row, Example]]:
    """Yield the rows of a split's file in order, each with its tokens; all of them, or the first `max_rows`.

    A `raw` row is a text without a prompt, and comes once for each of its pieces.

    With several processes and many rows each process has a tokenizer of its own, loaded from `base_dir`.
    """
    settings = {"max_length": max_length} if raw else {"max_length": max_length, "loss_on_all": loss_on_all}
    make = _maker(tokenizer, settings)
    count = min(whole := count_split(path), max_rows or whole)
    rows = islice(iter_split(path), count)
    if processes < 2 or count < PARALLEL_ROWS:
        yield from ((row, example) for row in rows for example in make(row))
        return
    # Spawned: a forked child of a process with threads may hang.
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _prepare, (base_dir, tokenizer.chat_template, settings))
        stack.callback(pool.shutdown, cancel_futures=True)
        chunks = iter(_chunks(rows))
        waiting = [(chunk, pool.submit(_tokenise_chunk, chunk)) for chunk in islice(chunks, _AHEAD * processes)]
        while waiting:
            chunk, examples = waiting.pop(0)
            yield from ((row, example) for row, made in zip(chunk, examples.result(), strict=True) for example in made)
            waiting += [(chunk, pool.submit(_tokenise_chunk, chunk)) for chunk in islice(chunks, 1)]


def _chunks(rows: Iterator[Row]) -> Iterator[tuple[Row, ...]]:
    while chunk := tuple(islice(rows, CHUNK)):
        yield chunk


def _prepare(base_dir: Path, chat_template: Any, settings: dict[str, Any]) -> None:
    """Make a process of the pool ready, and have it end with its parent, however that ends."""
    global _tokenise
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False, local_files_only=True)
    tokenizer.chat_template = chat_template
    _tokenise = _maker(tokenizer, settings)


def _maker(tokenizer: Any, settings: dict[str, Any]) -> Tokenise:
    if "loss_on_all" not in settings:
        return partial(pieces, tokenizer, **settings)
    return lambda row: [tokenise(tokenizer, row, **settings)]


def _tokenise_chunk(rows: tuple[Row, ...]) -> list[list[Example]]:
    return [_tokenise(row) for row in rows]
