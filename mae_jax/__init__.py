"""Masked Autoencoders (He et al., 2021) in JAX and Flax, for TPU and GPU meshes."""

import os

__version__ = "0.1.0"

# For its experimental features, gcsfs would ask of every bucket what kind it is, and warn at every
# file where it may not ask. It reads this variable when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def __getattr__(name: str):
    """Return `load`, `pretrain` or `embed`, imported when first used: JAX takes seconds."""
    if name not in ("load", "pretrain", "embed"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mae_jax import api

    return getattr(api, name)
