"""The networks and their mathematics. Imports jax, flax, einops and `errors` only."""
