"""How the weights move: optimizers, learning-rate schedules, and what each parameter is to them."""
