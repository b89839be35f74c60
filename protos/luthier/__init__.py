"""The contract of Luthier, its stubs, and a light client."""
