"""A row as the chat that a model sees, and the hash that says two sides render it alike."""

from __future__ import annotations

import hashlib

from common.rows import Row


def messages_of(row: Row) -> list[dict[str, str]]:
    """Return the whole chat of a row, the target last.

    The last message is by the assistant and is what is learned or expected; all before it is the prompt.
    """
    if row.messages is not None:
        return [{"role": message.role, "content": message.content} for message in row.messages]
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]


def template_sha256(template: str) -> str:
    """Return the SHA-256 of a chat template in hex. Serving has to use the template that training used."""
    return hashlib.sha256(template.encode()).hexdigest()
