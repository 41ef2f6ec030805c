"""Masked Autoencoders (He et al., 2021) in JAX and Flax, for TPU and GPU meshes."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`mae_jax.load` and `pretrain`, imported when first used: JAX takes seconds to import."""
    if name not in ("load", "pretrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mae_jax import api

    return getattr(api, name)
