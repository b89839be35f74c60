"""A row as the chat that a model sees, and the hash that says two sides render it alike."""

from __future__ import annotations

import hashlib

from common.errors import FailedPrecondition
from common.rows import Row


def messages_of(row: Row) -> list[dict[str, str]]:
    """Return the whole chat of a row, the target last.

    The last message is by the assistant and is what is learned or expected; all before it is the prompt.
    """
    if row.messages is not None:
        return [{"role": message.role, "content": message.content} for message in row.messages]
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]


def default_template(template: object) -> str:
    """Return the template that a chat is rendered by, of a tokenizer's one or several; empty where there is none."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def template_sha256(template: str) -> str:
    """Return the SHA-256 of a chat template in hex. Serving has to use the template that training used."""
    return hashlib.sha256(template.encode()).hexdigest()


def check_template(recorded: str, found: str) -> None:
    """Raise FailedPrecondition where a model is about to be served with another template than the one on record (hashes in hex).

    A model with none on record is not checked.
    """
    if recorded and recorded not in (found, template_sha256("")):
        raise FailedPrecondition(
            f"the model was registered with the chat template {recorded[:12]}, but its tokenizer loads "
            f"{f'the template {found[:12]}' if found else 'none'}: its prompts would not be those that it was trained on; "
            "register the model again with the template that it is to be served with",
            "CHAT_TEMPLATE_CHANGED",
        )
