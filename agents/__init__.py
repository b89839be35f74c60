"""What runs on the Ray cluster to carry a job out, and reports back to the coordinator."""
