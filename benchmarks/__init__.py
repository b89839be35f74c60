"""Side-by-side measurements against named peers. Never part of the test run."""
