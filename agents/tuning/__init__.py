"""Search over hyperparameters: Ray Tune over ordinary fine-tunes."""
