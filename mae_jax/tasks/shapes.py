"""Check the shapes that a mask or target function returns, a fork's too, without running it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.errors import UserError
from mae_jax.models.spec import ModelSpec


def check_scores(score_patches: Callable, name: str, spec: ModelSpec) -> None:
    """Check that a mask function returns a score for each patch, without running it.

    Raises:
      UserError: it takes other arguments, or its scores have another shape.
    """
    shape = shape_of(
        score_patches,
        f"masking {name!r} is no function (rng, batch, grid, ratio) -> scores",
        jax.random.key(0),
        batch=2,
        grid=spec.grid,
        ratio=spec.mask_ratio,
    )
    if shape != (2, spec.num_patches):
        raise UserError(
            f"masking {name!r} returned scores of shape {shape} for 2 images of"
            f" {spec.num_patches} patches: it must return (batch, patches)"
        )


def width_of_target(make_target: Callable, name: str, spec: ModelSpec) -> int:
    """Return T, the width of a target for each patch, without running its function.

    Raises:
      UserError: it takes other arguments, or does not return one row for each patch.
    """
    shape = shape_of(
        make_target,
        f"target {name!r} is no function (images_BHWC, patch_size) -> target_BLT",
        jnp.zeros((2, *spec.image_size, spec.channels)),
        spec.patch_size,
    )
    if len(shape) != 3 or shape[:2] != (2, spec.num_patches):
        raise UserError(
            f"target {name!r} returned shape {shape} for 2 images of {spec.num_patches} patches:"
            " it must return (batch, patches, any width)"
        )
    return shape[2]


def shape_of(function: Callable, refusal: str, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    """Return the shape of the array that a call would return, without running it.

    Raises:
      UserError: the function takes other arguments, or does not return one array.
    """
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{refusal} ({error})") from None
    array = jax.eval_shape(partial(function, *args, **kwargs))
    if not hasattr(array, "shape"):
        raise UserError(f"{refusal} (it returned {array})")
    return array.shape
