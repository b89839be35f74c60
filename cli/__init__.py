"""The program `luthier`."""
