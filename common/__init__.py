"""What coordinator, agents and serving must agree on. No torch, no Ray, no database."""
