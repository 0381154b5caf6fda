"""What a jaxpr says before anything runs: what a computation costs, what it stores, what it does twice."""
