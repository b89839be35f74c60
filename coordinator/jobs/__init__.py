"""What a job is: its states, how it changes, how it is created, run and ended."""
