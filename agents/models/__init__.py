"""Base models: where they come from, and how they get into storage."""
