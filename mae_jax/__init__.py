"""Masked Autoencoders (He et al., 2021) in JAX and Flax, for TPU and GPU meshes."""

__version__ = "0.1.0"
