"""What agents and the coordinator say to each other."""
