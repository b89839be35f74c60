"""Desired state of deployments, and making it true."""
