"""When to save, which to keep, how the bytes get to disk and back, and the order of these."""
