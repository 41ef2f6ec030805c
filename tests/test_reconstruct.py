"""Errors of reconstructions are right on any mesh, and nothing hidden leaks into them."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import mesh_of

from mae_jax.data.eval_pipeline import eval_batches
from mae_jax.data.sources import open_source
from mae_jax.evals import figures, pixels
from mae_jax.evals.reconstruct import Evaluator
from mae_jax.metrics import summary
from mae_jax.models import masking, targets
from mae_jax.models.patchify import normalize, patchify, unpatchify

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PATCH, GRID = (4, 4), (4, 4)


def natural(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Smooth random images, uint8: noise summed over scales, as natural images have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, channels))
    for scale in (1, 2, 4, 8):
        noise = rng.normal(size=(-(-height // scale), -(-width // scale), channels))
        total += scale * noise.repeat(scale, 0).repeat(scale, 1)[:height, :width]
    return np.clip(127 + 12 * total, 0, 255).astype(np.uint8)


def patches_of(image: np.ndarray) -> np.ndarray:
    return np.asarray(patchify(image[None].astype(float), PATCH)[0])


def mask_keeping(*visible: int) -> np.ndarray:
    mask = np.ones(GRID[0] * GRID[1], np.float32)
    mask[list(visible)] = 0
    return mask


# --- trivial predictors ---


def test_both_predictors_are_exact_on_an_image_of_one_colour():
    levels = patches_of(np.full((16, 16, 3), [10, 200, 77], np.uint8))
    mask = mask_keeping(0, 3, 9, 14)
    np.testing.assert_allclose(pixels.mean_colour(levels, mask, 3), levels, atol=1e-9)
    np.testing.assert_allclose(pixels.interpolation(levels, mask, PATCH, GRID), levels, atol=1e-9)


def test_mean_colour_by_hand():
    image = np.zeros((16, 16, 2), np.uint8)
    image[:4, :4] = [10, 100]  # patch 0
    image[:4, 4:8] = [30, 50]  # patch 1
    guess = pixels.mean_colour(patches_of(image), mask_keeping(0, 1), 2)
    np.testing.assert_array_equal(guess, np.tile([20.0, 75.0], (16, 16)))


def test_interpolation_follows_a_ramp_between_the_centres_and_is_flat_beyond_them():
    row, col = np.mgrid[:16, :16]
    image = np.stack([10 * row, 5 * col + 2 * row], -1).astype(np.uint8)
    corners = mask_keeping(0, 3, 12, 15)  # centres at 1.5 and 13.5
    guess = pixels.interpolation(patches_of(image), corners, PATCH, GRID)
    guess = guess.reshape(4, 4, 4, 4, 2).swapaxes(1, 2).reshape(16, 16, 2)
    np.testing.assert_allclose(guess[2:14, 2:14], image[2:14, 2:14], atol=1e-9)
    # In the corner the mean colour of its patch: 10 * 1.5, 5 * 1.5 + 2 * 1.5.
    np.testing.assert_allclose(guess[0, 0], [15, 10.5])
    # Above the topmost centres the nearest: the left one up to column 7, then the right one.
    np.testing.assert_allclose(guess[0, 7], [15, 10.5])
    np.testing.assert_allclose(guess[0, 8], [15, 5 * 13.5 + 2 * 1.5])


@pytest.mark.parametrize("visible", [(5,), (0, 15), (0, 5, 10, 15)], ids=["1", "2", "in a line"])
def test_interpolation_takes_the_nearest_where_no_triangle_exists(visible):
    image = natural(16, 16, 3, 0)
    levels = patches_of(image)
    guess = pixels.interpolation(levels, mask_keeping(*visible), PATCH, GRID)
    colours = levels[list(visible)].reshape(len(visible), 16, 3).mean(1)
    # The top left pixel is nearest to the first visible patch, the bottom right one to the last.
    np.testing.assert_allclose(guess[0, :3], colours[0])
    np.testing.assert_allclose(guess[-1, -3:], colours[-1])
    assert np.isfinite(guess).all()


# --- un-normalisation ---


def normalised(seeds: range) -> tuple[jax.Array, jax.Array]:
    """Levels and normalised patches of images 16 x 16."""
    images = np.stack([natural(16, 16, 3, seed) for seed in seeds])
    levels_BLP = patchify(jnp.asarray(images, jnp.float32), PATCH)
    return levels_BLP, pixels.from_levels(levels_BLP, MEAN, STD)


def test_normalisation_of_levels_is_the_recipe_and_is_undone():
    levels_BLP, patches_BLP = normalised(range(2))
    image = np.full((4, 4, 3), [51, 102, 255], np.uint8)
    by_hand = [(51 / 255 - 0.5) / 0.2, (102 / 255 - 0.4) / 0.25, (1 - 0.3) / 0.3]
    got = pixels.from_levels(patchify(image[None].astype(np.float32), PATCH), MEAN, STD)
    np.testing.assert_allclose(got[0, 0, :3], by_hand, atol=1e-6)
    np.testing.assert_allclose(pixels.unnormalize(patches_BLP, MEAN, STD), levels_BLP, atol=1e-3)


def test_with_true_statistics_the_targets_give_back_the_pixels():
    levels_BLP, patches_BLP = normalised(range(3))
    mask_BL = jnp.tile(mask_keeping(0, 5, 6, 11), (3, 1))
    target_BLP = targets.norm_pixels(unpatchify(patches_BLP, PATCH, GRID), PATCH)
    how = dict(grid=GRID, target="norm_pixels", mean=MEAN, std=STD, source="true")
    again = pixels.predicted_levels(target_BLP, levels_BLP, mask_BL, **how)
    np.testing.assert_allclose(again, levels_BLP, atol=1e-2)


def test_visible_statistics_by_hand():
    """One row of three patches: the hidden one in the middle of two, at distance 1 each."""
    patches_BLP = jnp.array([[[0.0, 2.0], [50.0, 90.0], [10.0, 16.0]]])
    mask_BL = jnp.array([[0.0, 1.0, 0.0]])
    mean_BL1, std_BL1 = pixels.patch_statistics(patches_BLP, mask_BL, (1, 3))
    # Deviations with P - 1 = 1: sqrt(2) and sqrt(18).
    np.testing.assert_allclose(mean_BL1[0, :, 0], [1, 7, 13], rtol=1e-5)
    np.testing.assert_allclose(std_BL1[0, :, 0] / np.sqrt(2), [1, 2, 3], rtol=1e-5)
    # With the first patch hidden too, both take theirs from the only one visible.
    mean_BL1, _ = pixels.patch_statistics(patches_BLP, jnp.array([[1.0, 1.0, 0.0]]), (1, 3))
    np.testing.assert_allclose(mean_BL1[0, :, 0], [13, 13, 13], rtol=1e-5)


def test_visible_statistics_hold_nothing_of_hidden_patches_and_true_ones_do():
    _, patches_BLP = normalised(range(1))
    mask_BL = jnp.asarray(mask_keeping(0, 5, 6, 11))[None]

    def gradient(source: str) -> jax.Array:
        def total(patches_BLP):
            mean_BL1, std_BL1 = pixels.patch_statistics(patches_BLP, mask_BL, GRID, source)
            return (mean_BL1 + std_BL1).sum()

        return jax.grad(total)(patches_BLP)[0][mask_BL[0] > 0]

    assert np.all(gradient("visible") == 0)
    assert np.any(gradient("true") != 0)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="'guess'.*'visible' and 'true'"):
        pixels.patch_statistics(jnp.zeros((1, 16, 3)), jnp.zeros((1, 16)), GRID, "guess")


# --- the evaluator ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for i in range(11):
        Image.fromarray(natural(16, 16, 3, i)).save(path / f"{i:02d}.png")
    return path


def config_of(folder: Path, target: str = "norm_pixels", **evaluation) -> ConfigDict:
    cfg = dict(source="", split="train", images=100, batch_size=4) | evaluation
    return ConfigDict(
        dict(
            mask_ratio=0.75,
            masking=dict(name="random"),
            target=dict(name=target),
            model=dict(image_size=(16, 16), patch_size=PATCH, channels=3),
            data=dict(source=f"folder:{folder}", split="train", data_dir="", mean=MEAN, std=STD),
            evals=dict(reconstruct=cfg),
        )
    )


def brightness(images_BHWC, patch_size):
    """A fork's target of another width than the patch: T = 1."""
    return patchify(images_BHWC, patch_size).mean(-1, keepdims=True)


def blurred(make_target):
    """A predictor with known errors: every patch is predicted as `params` times its target."""

    def predict(params, extra, batch):
        image_BHWC = (batch["image"].astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        target_BLT = make_target(image_BHWC, PATCH)
        mask = masking.keep_lowest(batch["score"], masking.num_kept(16, 0.75))
        outputs = {"pred_BLT": params * target_BLT, "target_BLT": target_BLT}
        return outputs | {"mask_BL": mask.mask_BL, "latent_BND": None}

    return {"reconstruction": predict}


def test_the_loss_is_that_of_the_task_if_it_gives_one(folder):
    config, make = config_of(folder), blurred(targets.norm_pixels)["reconstruction"]

    def reconstruct(params, extra, batch):
        out = make(params, extra, batch)
        return out | {"loss_BL": jnp.full_like(out["mask_BL"], 7.0)}

    evaluator = Evaluator(
        config.evals.reconstruct, config, {"reconstruction": reconstruct}, mesh_of(1, 1, 1)
    )
    report = evaluator.run(SimpleNamespace(step=3, params=jnp.float32(0.5), extra={}))
    assert report.scalars["eval/loss"] == pytest.approx(7.0)


def test_levels_outside_the_value_range_are_no_error_of_an_exact_prediction(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", natural(16, 16, 3, i).astype(np.float32))
    config = config_of(tmp_path, "pixels", prefix="eval_outside")
    config.data.value_range = (50, 150)
    spec = SimpleNamespace(mean=MEAN, std=STD, value_range=(50, 150))

    def reconstruct(params, extra, batch):
        target_BLT = patchify(normalize(batch["image"], spec), PATCH)
        mask = masking.keep_lowest(batch["score"], masking.num_kept(16, 0.75))
        return {"pred_BLT": target_BLT, "target_BLT": target_BLT, "mask_BL": mask.mask_BL}

    evaluator = Evaluator(
        config.evals.reconstruct, config, {"reconstruction": reconstruct}, mesh_of(1, 1, 1)
    )
    report = evaluator.run(SimpleNamespace(step=3, params={}, extra={}))
    assert report.scalars["eval_outside/rmse"] == pytest.approx(0, abs=1e-3)
    assert report.images.keys() == {"reconstruction_eval_outside"}


def evaluate(config: ConfigDict, shape=(1, 1, 1), params: float = 0.5):
    """Return the scalars and the images of a report."""
    predict = blurred(getattr(targets, config.target.name, brightness))
    evaluator = Evaluator(config.evals.reconstruct, config, predict, mesh_of(*shape))
    report = evaluator.run(SimpleNamespace(step=3, params=jnp.float32(params), extra={}))
    return dict(report.scalars), report.images


def test_scalars_are_those_computed_image_by_image(folder):
    config = config_of(folder, "pixels")
    scalars, _ = evaluate(config)
    source = open_source(config.data.source, "train")
    (batch,) = eval_batches(source, batch_size=11, image_size=(16, 16), channels=3)
    loss, squares = [], {"": [], "_mean_colour": [], "_interpolation": []}
    for i, image in enumerate(batch["image"]):
        levels = patches_of(image)
        key = jax.random.fold_in(jax.random.key(0), i)
        score = np.asarray(masking.random(key, 1, GRID, 0.75)[0])
        hidden = np.argsort(np.argsort(score)) >= 4
        scale, shift = np.tile(255 * np.array(STD), 16), np.tile(255 * np.array(MEAN), 16)
        target = (levels - shift) / scale
        guesses = {
            "": np.clip(0.5 * target * scale + shift, 0, 255),
            "_mean_colour": pixels.mean_colour(levels, hidden, 3),
            "_interpolation": pixels.interpolation(levels, hidden, PATCH, GRID),
        }
        loss.append(np.square(0.5 * target)[hidden])
        for name, guess in guesses.items():
            squares[name].append(np.square(guess - levels)[hidden])
    assert scalars.pop("eval/images") == 11
    assert scalars.pop("eval/trained_on") == 1
    assert scalars.pop("eval/loss") == pytest.approx(np.mean(loss), rel=1e-5)
    assert scalars == {
        f"eval/rmse{name}": pytest.approx(np.sqrt(np.mean(x)), rel=1e-5)
        for name, x in squares.items()
    }


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_batch_size_and_mesh_change_nothing(folder, shape, batch_size):
    expected, expected_pictures = evaluate(config_of(folder, batch_size=11))
    scalars, pictures = evaluate(config_of(folder, batch_size=batch_size), shape)
    assert scalars == pytest.approx(expected, rel=1e-5)
    if batch_size >= 8:  # the figure shows images of the first batch
        np.testing.assert_array_equal(
            pictures["reconstruction"], expected_pictures["reconstruction"]
        )


def test_masks_are_the_same_at_every_evaluation_and_differ_between_images(folder):
    config = config_of(folder)
    seen = []

    def predict(params, extra, batch):
        jax.debug.callback(lambda score: seen.append(np.asarray(score)), batch["score"])
        return blurred(targets.norm_pixels)["reconstruction"](params, extra, batch)

    cfg = config.evals.reconstruct
    evaluator = Evaluator(cfg, config, {"reconstruction": predict}, mesh_of(1, 1, 1))
    runs = []
    for params in (0.5, 0.9):
        seen.clear()
        evaluator.run(SimpleNamespace(step=0, params=jnp.float32(params), extra={}))
        jax.effects_barrier()
        runs.append({row.tobytes() for score in seen for row in score})
    assert runs[0] == runs[1]
    assert len(runs[0]) >= 11


def test_fewer_images_can_be_asked_for(folder):
    assert evaluate(config_of(folder, images=5))[0]["eval/images"] == 5
    with pytest.raises(ValueError, match="images=0: it must be at least 1"):
        evaluate(config_of(folder, images=0))


def test_no_program_is_compiled_for_single_images(folder, caplog):
    def programs(images):
        caplog.clear()
        with jax.log_compiles():
            evaluate(config_of(folder, images=images, batch_size=4))
        return sum("Finished XLA compilation" in message for message in caplog.messages)

    programs(4)  # what is compiled once for all evaluations
    assert 0 < programs(4) == programs(8)


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ("train[:5]", " held-out images"),
        ("train", " training images"),
        ("train[:8]", " images, some of them training images"),
    ],
)
def test_training_images_are_called_so(trained, words, folder, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(
        figures, "reconstructions", lambda *images, patch_size, caption: captions.append(caption)
    )
    config = config_of(folder, split="train[5:]")
    config.data.split = trained
    scalars, _ = evaluate(config)
    assert f"({words.strip()})" in captions[0]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3} | scalars) + "\n")
    text = "\n".join(summary.lines(str(tmp_path), own_images=False))
    assert f"on {scalars['eval/images']:.0f}{words} (root mean square" in text


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    for i in range(4):
        Image.fromarray(natural(16, 16, 3, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    scalars, pictures = evaluate(config_of(tmp_path))
    assert scalars["eval/images"] == 4 and pictures.keys() == {"reconstruction"}


def test_where_the_first_images_cannot_be_read_there_is_no_picture_but_the_errors(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    Image.fromarray(natural(16, 16, 3, 0)).save(tmp_path / "9.png")
    scalars, pictures = evaluate(config_of(tmp_path))
    assert scalars["eval/images"] == 1 and scalars["eval/rmse"] > 0 and pictures == {}


def test_nothing_but_unreadable_images_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(b"not an image")
    Image.fromarray(natural(16, 16, 3, 0)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="no image can be read.*0.png"):
        evaluate(config_of(tmp_path, images=1))


def test_a_perfect_model_is_perfect_in_pixels_but_not_through_estimated_statistics(folder):
    exact, _ = evaluate(config_of(folder, "pixels"), params=1.0)
    assert exact["eval/loss"] == 0
    assert exact["eval/rmse"] < 1e-3
    estimated, _ = evaluate(config_of(folder, "norm_pixels"), params=1.0)
    assert estimated["eval/loss"] == 0
    assert estimated["eval/rmse"] > 5


def test_a_target_that_is_not_of_pixels_gets_its_loss_alone(folder):
    scalars, pictures = evaluate(config_of(folder, "my_fork.targets.brightness"))
    assert scalars["eval/loss"] > 0
    assert scalars.keys() == {"eval/loss", "eval/images", "eval/trained_on"}
    assert pictures == {}


# --- the figure ---


def only_place(page, tile):
    """Return the row and column of the only place at which a page shows a tile."""
    windows = np.lib.stride_tricks.sliding_window_view(page, tile.shape)[:, :, 0]
    corners = np.argwhere(np.all(windows[..., 0, 0, :] == tile[0, 0], -1))
    (place,) = [(y, x) for y, x in corners.tolist() if np.array_equal(windows[y, x], tile)]
    return place


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (224, 224)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_figure_shows_four_tiles_of_each_image(size, channels):
    height, width = size
    images = np.stack([natural(height, width, channels, seed) for seed in range(2)])
    predictions = 255 - images
    mask = np.ones((2, height // 4 * (width // 4)))
    mask[0, 0] = mask[1, -1] = 0
    page = figures.reconstructions(
        images, mask, predictions, patch_size=(4, 4), caption="a caption"
    )
    assert page.dtype == np.uint8
    rgb = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    pasted = predictions.copy()
    pasted[0, :4, :4] = images[0, :4, :4]
    pasted[1, -4:, -4:] = images[1, -4:, -4:]
    masked = np.broadcast_to(figures.HIDDEN, (2, *size, 3)).copy()
    masked[0, :4, :4] = images[0, :4, :4, rgb].transpose(1, 2, 0)
    masked[1, -4:, -4:] = images[1, -4:, -4:, rgb].transpose(1, 2, 0)
    factor = max(1, -(-figures.TILE // max(size)))
    places = [
        only_place(page, tile.repeat(factor, 0).repeat(factor, 1))
        for tiles in (images[..., rgb], masked, predictions[..., rgb], pasted[..., rgb])
        for tile in tiles
    ]
    columns = [x for _, x in places]
    assert columns == sorted(columns)
    assert len(set(columns)) == 4
    assert len({y for y, _ in places}) == 2
