"""Masks with structure hide exactly as many patches, and have the property they are named for."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import tiny_config

from mae_jax import tasks
from mae_jax.errors import UserError
from mae_jax.models import masking, masks

GRID, RATIO = (8, 12), 0.75
KEPT = masking.num_kept(96, RATIO)


def hidden(score_BL, kept=KEPT, grid=GRID):
    """Return which patches a mask hides, [B, rows, cols]."""
    mask_BL = masking.keep_lowest(score_BL, kept).mask_BL
    return np.asarray(mask_BL).reshape(-1, *grid) > 0


@pytest.mark.parametrize("name", ["granular", "green", "inverse_block"])
def test_masks_hide_exactly_as_many_patches_and_differ_between_images(name):
    found = hidden(getattr(masks, name)(jax.random.key(0), 64, GRID, RATIO))
    assert (found.sum((1, 2)) == 96 - KEPT).all()
    assert len(np.unique(found.reshape(64, -1), axis=0)) > 50


@pytest.mark.parametrize("cell", [2, 4])
def test_a_granular_mask_is_constant_in_each_cell(cell):
    kept = 96 - 5 * cell**2  # five cells are hidden
    found = hidden(masks.granular(jax.random.key(0), 50, GRID, RATIO, cell=cell), kept)
    cells = found.reshape(50, 8 // cell, cell, 12 // cell, cell)
    assert (cells.all((2, 4)).sum((1, 2)) == 5).all()
    assert (cells.any((2, 4)).sum((1, 2)) == 5).all()


def test_kept_patches_that_are_no_whole_cells_split_one_cell():
    found = hidden(masks.granular(jax.random.key(0), 50, (14, 14), 0.75), 49, (14, 14))
    cells = found.reshape(50, 7, 2, 7, 2).sum((2, 4))
    assert ((cells == 0).sum((1, 2)) == 12).all()
    assert ((cells == 3).sum((1, 2)) == 1).all()


def test_a_granular_mask_of_single_patches_is_the_random_one():
    ours = masks.granular(jax.random.key(3), 5, GRID, RATIO, cell=1)
    np.testing.assert_array_equal(ours, masking.random(jax.random.key(3), 5, GRID, RATIO))


def spectrum(score_BL, side=16):
    """Return the mean power of 1,000 masks in four rings of rising frequency."""
    found = hidden(score_BL, side**2 // 4, (side, side)).astype(float)
    power = (np.abs(np.fft.fft2(found - found.mean((1, 2), keepdims=True))) ** 2).mean(0)
    frequency = np.fft.fftfreq(side)
    radius = np.hypot(frequency[:, None], frequency[None])
    rings = [(0.03, 0.1), (0.12, 0.22), (0.25, 0.35), (0.38, 0.5)]
    return np.array([power[(radius >= low) & (radius < high)].mean() for low, high in rings])


def test_the_spectrum_of_green_masks_peaks_in_the_middle():
    rng, grid = jax.random.key(0), (16, 16)
    green = spectrum(masks.green(rng, 1000, grid, 0.75))
    assert green.argmax() == 1
    assert green[1] > 1.3 * max(green[0], green[3])
    white = spectrum(masking.random(rng, 1000, grid, 0.75))
    assert white.max() < 1.1 * white.min()
    red = spectrum(masks._blur(jax.random.normal(rng, (1000, 28, 28)), grid, 2.0).reshape(1000, -1))
    assert (np.diff(red) < 0).all()


def connected(visible, torus):
    """Return whether all visible patches can be reached from one of them over common sides."""
    reached = np.zeros_like(visible)
    reached[tuple(np.argwhere(visible)[0])] = True
    for _ in range(visible.size):
        grown = reached.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                moved = np.roll(reached, step, axis)
                if not torus:
                    edge = [slice(None)] * 2
                    edge[axis] = 0 if step == 1 else -1
                    moved[tuple(edge)] = False
                grown |= moved
        if (grown & visible == reached).all():
            break
        reached = grown & visible
    return (reached == visible).all()


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.9])
def test_what_an_inverse_block_leaves_visible_is_one_block(ratio):
    kept = masking.num_kept(96, ratio)
    draw = partial(masks.inverse_block, jax.random.key(0), 100, GRID, ratio)
    inside = [~mask for mask in hidden(draw(roll=False), kept)]
    rolled = [~mask for mask in hidden(draw(roll=True), kept)]
    assert all(connected(mask, torus=False) for mask in inside)
    assert all(connected(mask, torus=True) for mask in rolled)
    assert not all(connected(mask, torus=False) for mask in rolled)
    heights = {mask.any(1).sum() for mask in inside}
    assert len(heights) > 1


def test_every_patch_is_visible_equally_often_under_a_rolled_block():
    found = hidden(masks.inverse_block(jax.random.key(0), 4000, GRID, RATIO))
    assert np.abs(found.mean(0) - RATIO).max() < 0.03


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        (dict(name="granular", cell=3), "cell=3 does not divide the grid of 4 x 4.*1, 2, 4"),
        (dict(name="granular", cells=2), "config.masking.cells: 'granular' has no option.*cell"),
        (dict(name="random", cell=2), "'random' has no option 'cell' and no other"),
        (
            dict(name="green", sigma_fine=3.0),
            "sigma_fine=3.0 must be.*below masking.sigma_coarse=2",
        ),
        (dict(name="granul"), "'granul' is unknown; nearest: granular"),
        (dict(name="spiral"), "there are: block, granular, green, grid, inverse_block.*random"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(masked, message):
    config = tiny_config()
    config.masking.update(masked)
    with pytest.raises(UserError, match=message):
        tasks.build(config)


def batches(repeat, rows, batch_size=16):
    config = tiny_config(batch_size=batch_size)
    if repeat:
        config.data.repeat = repeat
    found = tasks.build(config).examples.batches(3, np.asarray(rows))
    try:
        return next(found)[0]
    finally:
        found.close()


def test_one_mask_per_image_is_what_it_was():
    ours, theirs = batches(1, range(16)), batches(None, range(16))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_several_masks_per_image_read_fewer_images_the_same_on_any_host():
    whole = batches(4, range(16))
    assert (whole["index"].reshape(4, 4) == whole["index"][::4, None]).all()
    assert len(np.unique(whole["index"])) == 4
    once = batches(None, range(4), batch_size=4)  # step 3 of batches of 4 images
    np.testing.assert_array_equal(whole["image"][::4], once["image"])
    part = batches(4, range(6, 16, 3))
    np.testing.assert_array_equal(part["image"], whole["image"][6:16:3])

    config = tiny_config()
    config.data.repeat = 4
    task = tasks.build(config)
    score_BL = task.prepare(whole, lambda _: jax.random.key(0))["score"]
    assert len(np.unique(hidden(score_BL, 4, (4, 4)).reshape(16, -1), axis=0)) > 8


def test_a_batch_that_the_masks_of_an_image_do_not_divide_is_refused():
    config = tiny_config()
    config.data.repeat = 3
    with pytest.raises(UserError, match="batch_size=16 is not divisible by config.data.repeat=3"):
        tasks.build(config)
