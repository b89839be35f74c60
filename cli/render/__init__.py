"""Messages of the contract as tables for people."""
