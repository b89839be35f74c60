"""Secrets of keys and runs."""

from __future__ import annotations

import hashlib
import hmac
import secrets

KEY_PREFIX = "lut_"
"""Marks Luthier's keys, so that secret scanners can find a leaked one."""


def new_key() -> str:
    """A fresh API key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def sha256(secret: str) -> str:
    """Hash under which a secret of high entropy is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def claim_token(stack_secret: str, job_uid: str, run: int) -> str:
    """The one-time token with which an agent claims a run.

    It is derived, not drawn: a coordinator that died between recording the launch and submitting it to Ray can submit again with
    the same token, whichever of the two submissions Ray then keeps. It is spent by the first claim.
    """
    return hmac.new(stack_secret.encode(), f"claim/{job_uid}/{run}".encode(), hashlib.sha256).hexdigest()


def gateway_token(stack_secret: str) -> str:
    """The token with which the coordinator asks the gateway for its counts; the gateway knows its hash alone."""
    return hmac.new(stack_secret.encode(), b"gateway", hashlib.sha256).hexdigest()
