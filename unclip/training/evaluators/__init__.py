"""Evaluators: `run(state, step)` yields (name, number) or (name, picture) for the loop to log."""
