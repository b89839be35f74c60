"""The only code of the coordinator that talks to Ray."""
