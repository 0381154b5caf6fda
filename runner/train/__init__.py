"""The step, the loop around it, and what they are built from."""
