"""One run from beginning to end, in this process."""
