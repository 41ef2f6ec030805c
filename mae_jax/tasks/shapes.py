"""Check the shapes that a fork's mask, target or decoder returns, without running it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models import mae, masking
from mae_jax.models.spec import ModelSpec


def check_scores(score_patches: Callable, name: str, spec: ModelSpec) -> None:
    """Check that a mask function returns a score for each patch, without running it.

    Raises:
      UserError: it takes other arguments, its scores have another shape, or the task draws no
        masks for channel groups.
    """
    if spec.channel_groups:
        raise UserError("config.model.channel_groups: give config.task='channel_groups' too")
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


def check_predictions(network: mae.MAE) -> None:
    """Check that a decoder of a fork predicts a target for each patch, without running it.

    Raises:
      UserError: it takes other arguments, or its predictions have another shape.
    """
    spec = network.spec
    decoder: Any = network.make_decoder
    if decoder is mae.Decoder:
        return
    name = f"{decoder.__module__}.{decoder.__name__}"
    num_kept = masking.num_kept(spec.num_patches, spec.mask_ratio)
    mask = masking.keep_lowest(jnp.zeros((2, spec.num_patches)), num_kept)
    patches_BLP = jnp.zeros((2, spec.num_patches, spec.patch_dim))
    arguments = inspect.signature(decoder.__call__).parameters.values()
    order = [*arguments][2:3]  # after self and the latent
    if spec.tokens_in_encoder and order and order[0].default is inspect.Parameter.empty:
        raise UserError(
            f"decoder {name!r} puts patches in order; masking.tokens_in_encoder=True leaves them"
            f" there: leave that out, or let {order[0].name}=None be the default"
        )

    def predict(patches_BLP: Array) -> Array:
        return network.init_with_output(jax.random.key(0), patches_BLP, mask)[0]

    refusal = f"decoder {name!r} is no module of (spec, compute) that takes (latent, restore)"
    try:
        shape = shape_of(predict, refusal, patches_BLP)
    except TypeError as error:
        raise UserError(f"{refusal} ({error})") from error
    wanted = (2, spec.num_patches, spec.target_dim)
    if shape != wanted:
        raise UserError(
            f"decoder {name!r} predicts shape {shape} for 2 images of {spec.num_patches} patches:"
            f" it must be (batch, patches, {spec.target_dim}), a target for each"
        )


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
