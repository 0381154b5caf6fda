"""The second place of a run, in a bucket: what lies there, who holds it, and how it goes up and comes back. No jax."""
