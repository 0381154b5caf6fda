"""What to recompute in the backward pass."""
