"""Serving: the gateway that clients talk to, and the engines behind it."""
