"""What a job would need, told before anything is spent."""
