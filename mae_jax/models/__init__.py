"""The networks and their mathematics: jax, flax and einops only."""
