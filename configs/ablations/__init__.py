"""Sweeps for `mae-jax sweep`: rows of changes of one recipe, a file for each table."""
