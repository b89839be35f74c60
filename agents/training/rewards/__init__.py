"""Rewards: what an answer is worth, one way a file. `base.py` says what a reward is and makes one from a job's settings."""
