"""Training methods, one a file. `base.py` says what a method is and finds one by its name."""
