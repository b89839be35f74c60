"""Data sets: from a user's file to immutable, content-hashed rows."""
