"""What recomputation costs and saves for one model and batch: measured for a person, searched for `remat=auto`."""
