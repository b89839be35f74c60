"""Reward `reward_model`: the score that a model trained by the method `reward` gives to a prompt with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agents.training.data import answered
from agents.training.rewards.base import Answer
from common.errors import InvalidArgument
from common.model_files import check_model_folder
from common.rows import Message, Row

BATCH = 16
DEFAULT_LENGTH = 2048


class RewardModel:
    """A scorer in this process."""

    needs_reference = False

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        check_model_folder(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype="auto"
        )
        if model.config.num_labels != 1:
            raise InvalidArgument(f"the model gives {model.config.num_labels} figures instead of one score", "NO_REWARD_MODEL")
        self._model = model.to(device).eval()
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The score of each answer, higher for a better one. Any real number."""
        ids = [answered(self._tokenizer, _row(answer))[0][-self._longest :] for answer in answers]
        scores: list[float] = []
        for start in range(0, len(ids), BATCH):
            batch = self._tokenizer.pad({"input_ids": ids[start : start + BATCH]}, return_tensors="pt").to(self._model.device)
            with torch.no_grad():
                scores += self._model(**batch).logits[:, 0].float().tolist()
        return scores

    def close(self) -> None:
        """Let go of the model."""
        del self._model


def _row(answer: Answer) -> Row:
    if not answer.messages:
        return Row(prompt=answer.prompt, completion=answer.text)
    turns = [Message(message["role"], message["content"]) for message in answer.messages]
    return Row(messages=(*turns, Message("assistant", answer.text)))
