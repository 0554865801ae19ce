"""State, step, optimizer, checkpoints, and what people see of a run."""
