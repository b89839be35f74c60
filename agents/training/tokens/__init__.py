"""Tokenised splits: made once on each node, kept under the hash of all they depend on, shared by ranks and trials."""
