"""Reward `similarity`: the F1 of the words that an answer and the row's share (as SQuAD counts it, Rajpurkar et al., 2016)."""

from __future__ import annotations

from collections import Counter

from agents.training.rewards.base import Plain


def similarity() -> Plain:
    """Make the reward."""
    return Plain(lambda answer: word_f1(answer.text, answer.reference))


def word_f1(text: str, reference: str) -> float:
    """F1 of the words, 0 to 1; case and what surrounds words does not count."""
    found, expected = _words(text), _words(reference)
    shared = (found & expected).total()
    return 2 * shared / (found.total() + expected.total()) if shared else 0.0


def _words(text: str) -> Counter[str]:
    words = (word.strip(".,;:!?\"'()[]{}") for word in text.casefold().split())
    return Counter(word for word in words if word)
