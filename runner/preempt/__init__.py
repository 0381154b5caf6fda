"""Requests to stop: signals, a file, a time limit and notices of machines set one flag, which the loop asks."""
