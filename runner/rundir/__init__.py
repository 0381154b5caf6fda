"""The directory of a run: its names and lock, how far it is, its attempts, what it was made by."""
