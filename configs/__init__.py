"""The recipes, each a function `get_config(arg)`; installed as `mae_jax.configs`."""
