"""Images of many bands arrive on the device with the numbers of their files."""

import contextlib
import io

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import DECODER, MODEL, run

from mae_jax import pretrained
from mae_jax.commands import convert, embed, prepare, visualize
from mae_jax.configs import pretrain
from mae_jax.data import bands, crops, transforms
from mae_jax.data.bands import BadImage
from mae_jax.data.decode import decode
from mae_jax.data.folder import open_folder
from mae_jax.errors import UserError
from mae_jax.evals import figures
from mae_jax.models.patchify import normalize, to_levels
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks import pretrain as task

DTYPES = ("uint8", "uint16", "int16", "float32")


def values(channels: int, dtype: str = "uint16", size: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random((size, size, channels), np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, (size, size, channels)).astype(dtype)


def tiff(array: np.ndarray, planar: bool = False, **options) -> bytes:
    file = io.BytesIO()
    stored = np.moveaxis(array, -1, 0) if planar else array
    options = {"photometric": "minisblack", **options}
    if array.shape[-1] > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    tifffile.imwrite(file, stored if array.shape[-1] > 1 else array[..., 0], **options)
    return file.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiff_gives_the_numbers_of_its_file(dtype, channels):
    array = values(channels, dtype)
    big_endian, packed = dict(byteorder=">", bigtiff=True), dict(compression="zlib", tile=(16, 16))
    for planar in (False, True):
        for options in ({}, dict(bigtiff=True), big_endian, packed):
            got = decode(tiff(array, planar, **options), channels, dtype=np.float32)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, array, err_msg=f"{planar} {options}")


@pytest.mark.parametrize("dtype, read_as", [("uint16", np.float32), ("uint8", np.uint8)])
@pytest.mark.parametrize("channels", [2, 4, 12])
def test_pages_of_a_tiff_are_bands(channels, dtype, read_as):
    array, file = values(channels, dtype), io.BytesIO()
    pages = np.moveaxis(array, -1, 0)
    tifffile.imwrite(file, pages, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(decode(file.getvalue(), channels, dtype=read_as), array)


@pytest.mark.parametrize("dtype", [*DTYPES, ">u2", ">f4", "float16", "float64", "bool"])
def test_npy_gives_the_numbers_of_its_file(dtype):
    array = (values(3) % 2).astype(dtype) if dtype == "bool" else values(3, "uint8").astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        got = decode(npy(stored), 3, dtype=np.float32)
        np.testing.assert_array_equal(got, array.astype(np.float32))
    flat = decode(npy(array[..., 0]), 1, dtype=np.float32)
    np.testing.assert_array_equal(flat[..., 0], array[..., 0].astype(np.float32))


class Harmful:
    def __reduce__(self):
        return (print, ("a program in a file was run",))


def test_damaged_files_are_bad_images_and_nothing_else():
    rng = np.random.default_rng(0)
    for data in (tiff(values(12)), tiff(values(3), compression="zlib"), npy(values(3))):
        for _ in range(100):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, min(len(damaged), 400), 3):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                decode(bytes(damaged), 12, dtype=np.float32)


@pytest.mark.parametrize(
    "data, reason",
    [
        (npy(np.array([[Harmful()]], object), allow_pickle=True), "pickled objects"),
        (npy(np.zeros((4, 4), "c8")), "complex64 of shape"),
        (npy(np.zeros((2, 4, 4, 3), "u2")), "is no image"),
        (npy(np.zeros((4, 4, 3), "u2"))[:-1], "cannot be decoded"),
        (npy(np.zeros((4, 4, 3), "u2")).replace(b"(4, 4, 3)", b"(9**9,3)"), "cannot be decoded"),
        (npy(np.full((4, 4, 3), np.nan, "f4")), "48 values are not finite"),
        (npy(np.zeros((4, 4, 2), "u2")), r"2 channels where 3 are wanted.*model.channels=2"),
        (tiff(values(12)), r"12 channels where 3 are wanted.*config.model.channels=12"),
        (tiff(values(3))[:-100], "cannot be decoded"),
        (b"II*\0" + bytes(100), "cannot be decoded"),
        (b"\xff\xd8 a photograph", "not a TIFF or .npy"),
    ],
    ids=range(11),
)
def test_what_is_no_image_of_bands_is_refused_with_the_reason(data, reason, capsys):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3, dtype=np.float32)
    assert "a program" not in capsys.readouterr().out


def test_a_bomb_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(bands, "MAX_VALUES", 100)
    for data in (npy(values(12)), tiff(values(12), compression="zlib")):
        with pytest.raises(BadImage, match="more than 100 numbers"):
            decode(data, 12, dtype=np.float32)


def test_without_a_value_range_bands_of_8_bits_are_read_and_others_named():
    array = values(12, "uint8")
    for data in (tiff(array), tiff(array, planar=True), npy(array)):
        got = decode(data, 12)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, array)
    for array in (values(12), values(2), values(3, "float32"), values(3, "int16")):
        for data in (tiff(array), npy(array)):
            with pytest.raises(BadImage, match="value_range"):
                decode(data, array.shape[-1])


@pytest.mark.parametrize("planar", [False, True])
def test_without_a_value_range_rgb_of_16_bits_keeps_its_upper_8(planar):
    array = values(3)
    data = tiff(array, planar, photometric="rgb")
    np.testing.assert_array_equal(decode(data, 3), array >> 8)
    eight = values(3, "uint8")
    data = tiff(eight, planar, photometric="rgb")
    np.testing.assert_array_equal(decode(data, 3), eight)


@pytest.mark.parametrize("crop", [crops.random_resized, crops.center, crops.fixed, crops.full])
@pytest.mark.parametrize("flip", [0, 1])
def test_crops_and_flips_of_bands_are_those_of_each_band_by_pillow(crop, flip):
    image = values(5, "float32", 40) * 1e4
    box = dict(scale=(0.2, 1.0), ratio=(0.75, 4 / 3), resizer="pillow")
    box = box if crop is crops.random_resized else {}

    def augmented(picture):
        rng = np.random.default_rng(3)
        return transforms.random_flip(crop(picture, (16, 24), rng, **box), flip, rng)

    got = augmented(image)
    assert (got.dtype, got.shape) == (np.float32, (16, 24, 5))
    for band in range(5):
        np.testing.assert_array_equal(got[..., band], augmented(image[..., [band]])[..., 0])
    # Against the 8-bit path: the same filter at the same place, which rounds and clips.
    y, x = np.mgrid[:40, :40]
    smooth = np.stack([40 + 3 * x, 60 + 2 * y, 30 + x + 3 * y], -1).astype(np.uint8)
    eight, exact = augmented(smooth), augmented(smooth.astype(np.float32))
    assert np.abs(eight - exact).max() <= 1
    assert (exact != np.round(exact)).any()
    if crop is crops.full:
        alone = Image.fromarray(image[..., 2]).resize((24, 24), Image.Resampling.BICUBIC)
        alone = np.asarray(alone)[4:20]
        np.testing.assert_array_equal(got[..., 2], alone[:, ::-1] if flip else alone)


def test_the_fast_resizer_of_bands_is_nearly_pillow():
    pytest.importorskip("cykooz_resizer")
    image, box = values(5, "float32", 40), (3, 4, 30, 20)
    ours = transforms.resize_pillow(image, box, 16, 16)
    np.testing.assert_allclose(transforms.resize_fast(image, box, 16, 16), ours, atol=1e-4)


# --- a folder of bands ---


def config(folder, channels, **data):
    config = pretrain.get_config("batch_size=8,image_size=32")
    config.model.update(MODEL | DECODER | {"channels": channels})
    config.train_for, config.optim.warmup, config.log_every = "2 steps", "1 steps", "1 steps"
    config.data.update(source=f"folder:{folder}", crop="full", flip=0.0, workers=0)
    config.data.update(mean=(0.5,) * channels, std=(0.25,) * channels, **data)
    config.evals.reconstruct.update(split="train", images=4, batch_size=8, every="2 steps")
    return config


def written(folder, arrays, extension="tif"):
    for i, array in enumerate(arrays):
        data = npy(array) if extension == "npy" else tiff(array, planar=bool(i % 2))
        (folder / f"{i}.{extension}").write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype, step", [("uint16", 1), ("float32", 2.0**-24)])
def test_numbers_that_differ_in_their_low_bits_differ_on_the_device(tmp_path, dtype, step, workers):
    """An odd and an even number of 16 bits, and neighbouring float32, in the same 8 bits."""
    base = np.full((32, 32, 12), 40_000 if dtype == "uint16" else 0.9, dtype)
    other = base + np.asarray(step, dtype)
    written(tmp_path, [base, other], "npy" if dtype == "float32" else "tif")
    cfg = config(tmp_path, 12, value_range=(0, 65535) if dtype == "uint16" else (0, 1))
    cfg.update(batch_size=2)
    cfg.data.workers = workers
    images = task.Task.from_config(cfg).examples
    assert images.inputs["image"].dtype == np.float32
    (batch, _, _) = next(images.batches(0, np.arange(2)))
    arrived = jax.device_get(jax.device_put(batch["image"][np.argsort(batch["index"])]))
    np.testing.assert_array_equal(arrived[0], base.astype(np.float32))
    np.testing.assert_array_equal(arrived[1], other.astype(np.float32))
    assert (arrived[0] != arrived[1]).all()
    normal = np.asarray(normalize(batch["image"], images.spec))
    assert np.unique(normal).size == 2


def test_the_value_range_becomes_0_and_1_and_255_levels():
    spec = ModelSpec.from_config(config("", 2, value_range=(100, 300)).to_dict())
    image = np.array([100, 200, 300, 400], np.float32).reshape(1, 2, 1, 2)
    scaled = np.array([0, 0.5, 1, 1.5]).reshape(1, 2, 1, 2)
    np.testing.assert_allclose(normalize(image, spec), (scaled - 0.5) / 0.25)
    np.testing.assert_allclose(to_levels(image, spec.value_range), scaled * 255)


def test_images_of_8_bits_go_the_way_that_they_went(tmp_path):
    for i in range(8):
        Image.fromarray(values(3, "uint8", seed=i)).save(tmp_path / f"{i}.tiff")
    images = task.Task.from_config(config(tmp_path, 3)).examples
    assert images.inputs["image"].dtype == np.uint8
    (batch, _, _) = next(images.batches(0, np.arange(4)))
    assert batch["image"].dtype == np.uint8
    expected = np.stack([values(3, "uint8", seed=i) for i in batch["index"]])
    np.testing.assert_array_equal(batch["image"], expected)
    got, old = jax.make_jaxpr(lambda x: normalize(x, images.spec))(expected), expected / 255
    assert "sub" in str(got) and str(got).count("sub") == 1  # of the mean alone
    np.testing.assert_allclose(normalize(expected, images.spec), (old - 0.5) / 0.25, atol=1e-6)


def test_other_bands_than_the_config_says_are_named_before_anything_is_written(tmp_path):
    folder, workdir = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    written(folder, [values(12, seed=i) for i in range(8)])
    for channels, value_range, sentence in (
        (3, (0, 65535), r"0.tif: 12 channels where 3 are wanted.*config.model.channels=12"),
        (12, (), r"0.tif: uint16 from .* in 12 channels.*config.data.value_range"),
        (12, (5, 5), r"config.data.value_range=\(5, 5\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(config(folder, channels, value_range=value_range), workdir)
    assert not workdir.exists()


def test_a_folder_of_12_bands_is_trained_on_and_shown(tmp_path):
    folder, workdir = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    written(folder, [values(12, seed=i) for i in range(8)])
    cfg = config(folder, 12, value_range=(-100, 65535))
    cfg.data.update(crop="random_resized", flip=0.5)
    cfg.evals.reconstruct.bands = (4, 3, 2)
    run(cfg, workdir, (1, 1, 1))
    assert list((workdir / "images").glob("reconstruction_*.png"))

    out = tmp_path / "pictures"
    flags = ["--bands=4,3,2", "--attention", "--pca", f"--neighbours={folder}/0.tif"]
    visualize.main([str(workdir), str(folder), f"--out={out}", *flags])
    assert {"sheet.png", "pca.png", "neighbours.png"} <= {x.name for x in out.iterdir()}
    embed.main([str(workdir), str(folder), f"--out={tmp_path}/x.npy", "--workers=0"])
    model, params = pretrained.load(workdir)
    pictures = [values(12, seed=i).astype(np.float32) for i in range(8)]
    images = np.stack([crops.center(picture, (32, 32)) for picture in pictures])
    expected = model.encode(params, images)[:, 0]
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-4, atol=1e-4)

    convert.main([str(workdir), f"{tmp_path}/hf", "--to=hf"])
    again = pretrained.load(tmp_path / "hf")[0]
    np.testing.assert_allclose(again.normalize(images), model.normalize(images), atol=1e-5)

    cfg.evals.reconstruct.bands = (13,)
    with pytest.raises(UserError, match="bands 1 to 12"):
        run(cfg, tmp_path / "other", (1, 1, 1))


def test_three_chosen_bands_are_shown_scaled():
    levels = np.arange(24.0).reshape(1, 2, 2, 6) * 20 - 10
    shown = figures.bands_of(levels, figures.choose_bands((6, 1, 2), 6))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, np.clip(levels[..., [5, 0, 1]], 0, 255))
    assert figures.choose_bands((), 12) == (1, 2, 3)
    assert figures.choose_bands((), 2) == (1,)


def test_npy_counts_as_an_image_only_where_there_are_no_others(tmp_path):
    written(tmp_path, [values(2), values(2)], "npy")
    assert open_folder(str(tmp_path), "train").files == ["0.npy", "1.npy"]
    written(tmp_path, [values(2)])
    assert open_folder(str(tmp_path), "train").files == ["0.tif"]


def test_prepare_prints_mean_and_deviation_of_each_band_and_the_command(tmp_path, capsys):
    arrays = [values(12, seed=i) for i in range(5)]
    written(tmp_path, arrays)
    assert prepare.main(["folder", f"--source={tmp_path}", "--value_range=0,65535"]) == 0
    printed = capsys.readouterr().out
    scaled = np.stack(arrays) / 65535
    for key, numbers in (("mean", scaled.mean((0, 1, 2))), ("std", scaled.std((0, 1, 2)))):
        text = printed.split(f"--config.data.{key}='(")[1].split(")")[0]
        np.testing.assert_allclose([float(x) for x in text.split(",")], numbers, atol=1e-4)
    assert "--config.model.channels=12" in printed
    assert "--config.data.value_range='(0, 65535)'" in printed
    with pytest.raises(UserError, match=r"12 channels: such images are not packed.*--value_range"):
        prepare.main(["folder", f"--source={tmp_path}", "--name=x", f"--data_dir={tmp_path}/d"])
    assert not (tmp_path / "d").exists()


def test_prepare_names_a_folder_of_which_no_image_can_be_measured(tmp_path):
    np.save(tmp_path / "0.npy", np.full((8, 8, 2), np.nan, np.float32))
    with pytest.raises(UserError, match=r"none of 1 images can be read \(0.npy: "):
        prepare.main(["folder", f"--source={tmp_path}", "--value_range=0,1"])
