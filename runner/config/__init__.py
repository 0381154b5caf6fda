"""The configuration of a run: validated, compared with that of another run, and the code of a user that it names."""
