"""Which job may start now: pure functions, no I/O."""
