"""The model agrees with the official implementation, number by number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import AS_USERS
from official import GOLDEN, META, STATE, assert_close, mae_spec, params_of

from mae_jax.models import mae, masking, targets
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.patchify import patchify
from mae_jax.models.posemb import sincos_2d

SPEC = mae_spec()


def build(**compute):
    return mae.MAE(SPEC, ComputeConfig(**compute))


PARAMS = params_of(STATE, SPEC)
IMAGES = jnp.asarray(GOLDEN["images"])
PATCHES = patchify(IMAGES, SPEC.patch_size)
MASK = masking.keep_lowest(
    jnp.asarray(GOLDEN["noise"]), masking.num_kept(SPEC.num_patches, META["mask_ratio"])
)


def loss_fn(params, target, model):
    pred = model.apply({"params": params}, PATCHES, MASK)
    return mae.masked_mse(pred, target(IMAGES, SPEC.patch_size), MASK.mask_BL), pred


def test_mask_and_ids_restore_are_the_official_ones():
    np.testing.assert_array_equal(MASK.restore_BL, GOLDEN["ids_restore"])
    np.testing.assert_array_equal(MASK.mask_BL, GOLDEN["pixels/mask"])


def test_position_tables_are_the_official_ones():
    np.testing.assert_allclose(sincos_2d(64, SPEC.grid), GOLDEN["param/pos_embed"][0], atol=1e-7)
    np.testing.assert_allclose(
        sincos_2d(32, SPEC.grid), GOLDEN["param/decoder_pos_embed"][0], atol=1e-7
    )


def test_latent_agrees():
    encode = jax.jit(partial(build().apply, method="encode"), compiler_options=AS_USERS)
    assert_close(encode({"params": PARAMS}, PATCHES, MASK), GOLDEN["latent"])


def test_fresh_parameters_have_the_official_names_and_shapes():
    fresh = jax.eval_shape(build().init, jax.random.key(0), PATCHES, MASK)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    "case, compute",
    [
        ("pixels", {}),
        ("pixels", {"scan_unroll": 2}),
        ("norm_pix", {}),
        ("norm_pix", {"remat": True}),
        ("norm_pix", {"split_heads": True, "plain_biases": True}),  # as on GPUs
    ],
)
def test_prediction_loss_and_every_gradient_agree(case, compute):
    model = build(**compute)
    target = {"pixels": targets.pixels, "norm_pix": targets.norm_pixels}[case]
    gradients = jax.value_and_grad(loss_fn, has_aux=True)
    gradients = jax.jit(gradients, static_argnums=(1, 2), compiler_options=AS_USERS)
    (loss, pred), grads = gradients(PARAMS, target, model)
    assert_close(pred, GOLDEN[f"{case}/pred"])
    assert_close(loss, GOLDEN[f"{case}/loss"])
    prefix = f"{case}/grad/"
    official = {name: GOLDEN.get(prefix + name, x) for name, x in STATE.items()}
    theirs = dict(jax.tree_util.tree_leaves_with_path(params_of(official, SPEC)))
    ours = jax.tree_util.tree_leaves_with_path(grads)
    assert len(ours) == len(theirs)
    for path, grad in ours:
        name = jax.tree_util.keystr(path)
        if grad.ndim >= 2 and "stack" in name:  # official tensors are single layers
            for layer, (a, b) in enumerate(zip(grad, theirs[path], strict=True)):
                assert_close(a, b, f"{name}[{layer}]")
        else:
            assert_close(grad, theirs[path], name)


def test_bfloat16_compute_stays_near():
    loss = jax.jit(loss_fn, static_argnums=(1, 2), compiler_options=AS_USERS)
    exact, _ = loss(PARAMS, targets.norm_pixels, build())
    half, _ = loss(PARAMS, targets.norm_pixels, build(dtype=jnp.bfloat16))
    assert exact != half
    assert abs(exact - half) < 0.01 * exact
