"""Pictures of any weights: what is drawn is what the model says, and the caption tells how."""

from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from official import golden_state, write_pth
from PIL import Image

import mae_jax
from mae_jax.commands import pictures, visualize
from mae_jax.evals import figures

WEIGHTS = Path(__file__).parents[1] / "weights/cifar10-s"


def photo(path: Path, seed: int = 0, size=(48, 40), mode="RGB") -> Path:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def run(tmp_path, *arguments) -> dict[str, np.ndarray]:
    out = tmp_path / "out"
    assert visualize.main([*map(str, arguments), f"--out={out}"]) == 0
    return {path.stem: np.asarray(Image.open(path)) for path in out.iterdir()}


def test_a_picture_for_each_image_and_one_for_every_flag(tmp_path):
    for seed in range(3):
        photo(tmp_path / f"{seed}.png", seed)
    flags = ["--ratios=0.5,0.75", "--errors", "--pca", f"--neighbours={tmp_path / '1.png'}"]
    (tmp_path / "list.txt").write_text("0.png\n1.png\n")
    paths = [tmp_path / "list.txt", tmp_path / "2.png"]
    drawn = run(tmp_path, WEIGHTS, *paths, "--attention", *flags)
    stems = ["00-0", "01-1", "02-2"]
    attention = [f"{stem}-attention" for stem in stems]
    sheets = ["errors", "neighbours", "pca", "ratios", "sheet"]
    assert sorted(drawn) == sorted([*stems, *attention, *sheets])
    assert len({picture.tobytes() for picture in drawn.values()}) == len(drawn)


def test_what_is_drawn_is_the_prediction_where_patches_are_hidden(tmp_path):
    model, params = mae_jax.load(WEIGHTS)
    *_, values = visualize.parse([str(WEIGHTS), "x", "--out=y"])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mask = pictures.make_masks(values, 2, model.spec.grid, 0.75)
    masks, predicted = pictures.reconstruct(model, params, images, mask, "visible")
    exact = model.predict(params, images, mask).images_BHWC
    assert np.abs(predicted - np.asarray(exact)).max() <= 0.51
    pasted = figures.paste(images, predicted, masks, model.spec.patch_size)
    hidden = masks.reshape(2, 8, 8).repeat(4, 1).repeat(4, 2) > 0
    np.testing.assert_array_equal(pasted[hidden], predicted[hidden])
    np.testing.assert_array_equal(pasted[~hidden], images[~hidden])
    assert hidden.mean() == 0.75


def test_masks_depend_on_the_seed_and_not_on_the_number_of_images():
    def masks(count, *flags):
        *_, values = visualize.parse([str(WEIGHTS), "x", "--out=y", *flags])
        return np.asarray(pictures.make_masks(values, count, (4, 4), 0.75).mask_BL)

    np.testing.assert_array_equal(masks(4), masks(4))
    assert (masks(4) != masks(4, "--seed=1")).any()
    assert masks(2, "--mask=grid").sum() == 24
    assert masks(2, "--mask=block").sum() == 24
    assert (masks(2, "--mask=granular").reshape(2, 2, 2, 2, 2).sum((2, 4)) % 4 == 0).all()


def test_a_drawn_mask_hides_what_is_dark(tmp_path):
    drawing = np.full((80, 80), 255, np.uint8)
    drawing[:40, 40:] = 0
    Image.fromarray(drawing).save(tmp_path / "mask.png")
    hidden = pictures.drawn_mask(str(tmp_path / "mask.png"), (4, 4)).reshape(4, 4)
    assert hidden[:2, 2:].all() and hidden.sum() == 4
    Image.fromarray(drawing * 0).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="hides 16 of 16 patches"):
        pictures.drawn_mask(str(tmp_path / "black.png"), (4, 4))
    Image.fromarray(np.where(drawing, 40000, 16000).astype(np.uint16)).save(tmp_path / "16.png")
    of_16_bits = pictures.drawn_mask(str(tmp_path / "16.png"), (4, 4)).reshape(4, 4)
    np.testing.assert_array_equal(of_16_bits, hidden)
    photo(tmp_path / "a.png")
    assert "sheet" in run(tmp_path, WEIGHTS, tmp_path / "a.png", f"--mask={tmp_path / 'mask.png'}")


def test_the_caption_says_whose_statistics_were_used(tmp_path, monkeypatch):
    drawn = Mock(wraps=figures.reconstructions)
    monkeypatch.setattr(figures, "reconstructions", drawn)
    photo(tmp_path / "a.png")
    for name, words in (
        ("visible", "estimated from the visible patches"),
        ("true", "information that the model never had"),
    ):
        (tmp_path / name).mkdir()
        run(tmp_path / name, WEIGHTS, tmp_path / "a.png", f"--statistics={name}")
        assert words in drawn.call_args.kwargs["caption"]


def layer_norm(x, p) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def test_attention_is_what_the_blocks_computed():
    model, params = mae_jax.load(WEIGHTS)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    tokens, attention = jax.jit(model.blocks)(params, images)
    assert attention.shape == (6, 2, 4, 65)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
    last = layer_norm(tokens[-1], params["encoder"]["norm"])
    np.testing.assert_allclose(last, model.encode(params, images), atol=1e-5)
    # The first block again, by way of its own attention: the cls token's share of values.
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params["encoder"]["stack"]["blocks"])
    (qkv, proj), mlp = (layer["attn"][name] for name in ("qkv", "proj")), layer["mlp"]
    normed = layer_norm(tokens[0], layer["norm1"])
    values = np.einsum("bnd,dsf->bnsf", normed, qkv["kernel"][:, 2]) + qkv["bias"][2]
    mixed = np.einsum("bsn,bnsf->bsf", attention[0], values)
    cls = tokens[0][:, 0] + np.einsum("bsf,sfd->bd", mixed, proj["kernel"]) + proj["bias"]
    hidden = layer_norm(cls, layer["norm2"]) @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
    cls = cls + jax.nn.gelu(hidden, False) @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    np.testing.assert_allclose(cls, tokens[1][:, 0], atol=1e-5)


def test_an_image_is_its_own_nearest_neighbour():
    features = np.random.default_rng(0).normal(size=(5, 8))
    found = pictures.nearest_images(features, 3 * features[2], 3)
    assert found[0] == (2, pytest.approx(1.0)) and len(found) == 3
    assert found[0][1] > found[1][1] > found[2][1]


def test_similar_patches_have_similar_colours():
    features = np.zeros((1, 16, 8))
    features[0, 8:, 3] = 1
    colours = figures.principal_colours(features)[0]
    assert (colours[:8] == colours[0]).all() and (colours[8:] == colours[15]).all()
    assert (colours[0] != colours[15]).any()


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_patches_than_colours_are_drawn(count):
    features = np.eye(2, 8)[None, :count]
    colours = figures.principal_colours(features)
    assert colours.shape == (1, count, 3)
    assert len(np.unique(colours[0], axis=0)) == count


def test_other_than_square_and_other_than_rgb(tmp_path):
    state, meta = golden_state(Path(__file__).parent / "data/mae_tiny.npz")
    side = meta["patch"]
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :1]
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        state[name] = state[name][: side**2]
    weights = write_pth(tmp_path / "grey.pth", state)
    photo(tmp_path / "a.png", mode="L", size=(80, 40))
    heads = [f"--heads={meta['heads']}", f"--decoder_heads={meta['dec_heads']}"]
    size = f"--image_size={side * 2}x{side * 4}"
    picture = run(tmp_path, weights, tmp_path / "a.png", size, *heads)["sheet"]
    assert picture.shape[1] > picture.shape[0]


def test_pdf(tmp_path):
    photo(tmp_path / "a.png")
    arguments = [str(WEIGHTS), str(tmp_path / "a.png"), f"--out={tmp_path / 'out'}"]
    visualize.main([*arguments, "--format=pdf"])
    assert (tmp_path / "out/sheet.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png", "--mask=spiral"], "neither random, block, .* nor a picture"),
        (["a.png", "--mask_ratio=1"], "keeps 0 of 64 patches"),
        (["a.png", "--mask=b.png", "--mask_ratio=0.5"], "leave out --mask_ratio and --ratios"),
        (["a.png", "--mask=b.png", "--ratios=0.5"], "leave out --mask_ratio and --ratios"),
        (["a.png", "--ratios=half"], "--ratios=half: write numbers with commas"),
        (["a.dat"], "a.dat cannot be read"),
        (["nowhere"], "nowhere"),
        ([], "IMAGES and --out=DIR are wanted"),
        (["a.png", "--neighbours=."], "has 2 images: name the one"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, words, tmp_path, monkeypatch):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "a.dat").write_text("no image")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        visualize.main([str(WEIGHTS), *arguments, "--out=out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dat", "a.png", "b.png"]
