"""Images and label maps stay together: read in pairs, cut, resized and mirrored as one."""

import itertools
import shutil
import struct
import zlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from segments import CLASSES, IGNORE, write_folder, write_pairs

from mae_jax.data import distortion, label_maps, segmentation, sources
from mae_jax.data.label_maps import IGNORED
from mae_jax.data.segmentation import Pair
from mae_jax.errors import UserError

DATA = dict(classes=0, ignore=IGNORE, shift=False, palette="")
READ = dict(
    flip=0.5,
    scales=(0.5, 2.0),
    distort=True,
    workers=0,
    resizer="pillow",
    value_range=(),
    synthetic=False,
)


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "data")


def open_pairs(root, split="train", **changes):
    return segmentation.open_pairs(DATA | changes, f"segfolder:{root}", split)


def save_map(root, name, array, split="train", **kwargs):
    Image.fromarray(array, **kwargs).save(root / split / "labels" / f"{name}.png")


def pair_of(source, index=0):
    return segmentation.read(source, index, 3, np.uint8)


# --- reading ---


def test_a_pair_is_an_image_and_the_classes_that_its_file_holds(root):
    source = open_pairs(root)
    assert len(source) == 12 and source.class_names == list(CLASSES)
    file = np.asarray(Image.open(root / "train/labels/train03.png"))
    assert source[3]["name"] == "train/images/train03.png"
    np.testing.assert_array_equal(
        source[3]["map"], np.where(file == IGNORE, IGNORED, file)
    )  # fmt: skip
    image = np.asarray(Image.open(root / "train/images/train03.png"))
    np.testing.assert_array_equal(pair_of(source, 3).image, image)


def test_slices_are_disjoint_shuffled_and_hold_everything_and_splits_have_other_names(root):
    whole = {record["name"] for record in (open_pairs(root)[i] for i in range(12))}
    parts = [open_pairs(root, split) for split in ("train[:75%]", "train[75%:]")]
    names = [[part[i]["name"] for i in range(len(part))] for part in parts]
    assert [len(x) for x in names] == [9, 3] and {*names[0], *names[1]} == whole
    assert names[0] != sorted(whole)[:9]
    assert not sources.shared(*parts)
    assert sources.shared(open_pairs(root), parts[1]) == 3
    (root / "test").rename(root / "valid")
    assert len(open_pairs(root, "val")) == len(open_pairs(root, "validation")) == 5


def test_folders_of_one_split_are_merged(root):
    (root / "test").rename(root / "val")
    write_pairs(root, "validation", 3)
    assert len(open_pairs(root, "val")) == len(open_pairs(root, "validation")) == 5 + 3
    source = open_pairs(root, "val")
    assert {source[i]["name"].split("/")[0] for i in range(8)} == {"val", "validation"}
    for i in range(8):
        assert pair_of(source, i).map.shape == (24, 32)


def test_the_images_alone_are_a_source_for_pre_training(root):
    source = sources.open_source(f"segfolder:{root}", "train[:75%]")
    pairs = open_pairs(root, "train[:75%]")
    assert [source[i]["name"] for i in range(9)] == [pairs[i]["name"] for i in range(9)]
    assert source.num_classes is None and "map" not in source[0]


def test_shift_makes_0_unlabelled_and_lowers_the_others(root):
    (root / "classes.txt").unlink()
    save_map(root, "train00", np.array([[0, 1], [255, 3]], np.uint8).repeat(12, 0).repeat(16, 1))
    source = open_pairs(root, classes=3, shift=True, ignore=255)
    wanted = [[IGNORED, 0], [IGNORED, 2]]
    np.testing.assert_array_equal(source[0]["map"][::12, ::16], wanted)


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_palette_pictures_and_16_bits_hold_numbers_too(root, mode):
    numbers = np.arange(24 * 32).reshape(24, 32) % 3
    if mode == "P":
        picture = Image.fromarray(numbers.astype(np.uint8), "L")
        picture.putpalette([7, 7, 7, 1, 2, 3, 0, 0, 0])
    else:
        picture = Image.fromarray(numbers.astype(np.uint16))
    picture.save(root / "train/labels/train00.png")
    assert Image.open(root / "train/labels/train00.png").mode == mode
    np.testing.assert_array_equal(open_pairs(root)[0]["map"], numbers)


def png_of_grey(bits, numbers_HW):
    """A PNG of 2 or 4 bits of grey, which Pillow reads and does not write."""
    rows = [sum(int(x) << (8 - bits - bits * i) for i, x in enumerate(part)).to_bytes(1, "big")
            for row in numbers_HW for part in np.split(row, row.size * bits // 8)]  # fmt: skip
    per_row = numbers_HW.shape[1] * bits // 8
    data = b"".join((b"\0" if i % per_row == 0 else b"") + byte for i, byte in enumerate(rows))
    head = struct.pack(">IIBBBBB", *numbers_HW.shape[::-1], bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
        for kind, x in chunks
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_holds_numbers_too(root, bits):
    numbers = np.arange(24 * 32).reshape(24, 32) % 3
    path = root / "train/labels/train00.png"
    path.write_bytes(png_of_grey(bits, numbers))
    assert np.asarray(Image.open(path)).max() == 2 * {2: 85, 4: 17}[bits]
    np.testing.assert_array_equal(open_pairs(root)[0]["map"], numbers)


def test_colours_become_classes_by_a_palette(root, tmp_path):
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 0, 255], [1, 1, 1]], np.uint8)
    number = np.random.default_rng(0).integers(0, 4, (24, 32))
    save_map(root, "train00", colours[number])
    palette = tmp_path / "palette.txt"
    palette.write_text("128 0 0 brick wall\n0 0 255 sea\n1 1 1 brick wall\n0 0 0 ignore\n")
    source = open_pairs(root, palette=str(palette))
    assert source.class_names == ["brick wall", "sea"]
    np.testing.assert_array_equal(source[0]["map"], np.array([IGNORED, 0, 1, 0])[number])
    palette.write_text("128 0 0 wall\n0 0 255 sea\n")
    with pytest.raises(UserError, match=r"train00.*colour \(0, 0, 0\).*with the name ignore"):
        open_pairs(root, palette=str(palette))[0]
    palette.write_text("128 0 wall\n")
    with pytest.raises(UserError, match="'128 0 wall' is no line such as '128 0 0 building'"):
        open_pairs(root, palette=str(palette))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: shutil.rmtree(r / "train/labels"), "train/images without train/labels"),
        (lambda r: (r / "train/labels/train04.png").unlink(), "1 of 12 images.*train04.png"),
        (lambda r: (r / "train/images/train04.png").unlink(), "1 of 12 label maps.*train04.png"),
        (lambda r: shutil.rmtree(r), "there is no folder"),
        (lambda r: [shutil.rmtree(r / x) for x in ("train", "test")], "no folder SPLIT/images"),
        (
            lambda r: shutil.copy(r / "train/images/train04.png", r / "train/images/train04.jpg"),
            "two files train04",
        ),
        (
            lambda r: (r / "train/labels/train04.png").rename(r / "train/labels/train04.jpg"),
            "1 files that are no PNG",
        ),
        (lambda r: (r / "classes.txt").unlink(), "classes=0: how many"),
        (lambda r: (r / "classes.txt").write_text("a\n" * 300), "300 classes: at most 255"),
        (
            lambda r: (r / "classes.txt").write_bytes(b"stra\xdfe\n"),
            "classes.txt is no text in UTF-8 .*: save it as UTF-8",
        ),
    ],
)
def test_folders_that_are_not_pairs_are_refused_in_a_sentence(root, change, message):
    change(root)
    with pytest.raises(UserError, match=message):
        open_pairs(root)


def test_a_byte_order_mark_is_no_part_of_a_name(root, tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (root / "classes.txt").write_text("straße\nb\nc\n", encoding)
        assert open_pairs(root).class_names == ["straße", "b", "c"]
    (tmp_path / "palette.txt").write_text("1 2 3 straße\n", "utf-8-sig")
    assert label_maps.read_palette(tmp_path / "palette.txt") == (("straße",), {(1, 2, 3): 0})


def test_another_number_of_classes_than_names_is_refused(root):
    with pytest.raises(UserError, match="classes=4, and .*classes.txt names 3"):
        open_pairs(root, classes=4)


def test_maps_that_cannot_be_are_refused_in_a_sentence_that_names_them(root):
    source = open_pairs(root)
    grey = np.zeros((24, 32), np.uint8)
    for array, message in (
        (grey + 3, "train00.*has the number 3, and the 3 classes are 0 to 2: .*ignore=3"),
        (grey[:20], "train00.png has 32 x 24 pixels and its label map 32 x 20"),
        (grey[..., None].repeat(3, -1), r"in colours \(RGB\).*config.data.palette=FILE"),
    ):
        save_map(root, "train00", array)
        with pytest.raises(UserError, match=message):
            segmentation.look_at(source, 3, np.uint8)


def test_a_map_that_is_broken_or_all_ignored_makes_a_bad_image(root):
    (root / "train/labels/train00.png").write_bytes(b"no picture")
    save_map(root, "train01", np.full((24, 32), IGNORE, np.uint8))
    source = open_pairs(root)
    segmentation.look_at(source, 3, np.uint8)  # the others can be used
    with pytest.raises(segmentation.BadImage, match="its label map cannot be read"):
        pair_of(source, 0)
    with pytest.raises(segmentation.BadImage, match="no pixel of its label map has a class"):
        pair_of(source, 1)
    with pytest.raises(UserError, match="none of 2 pairs.*no pixel of its label map has a class"):
        only = tuple(getattr(source, x)[:2] for x in ("maps",))
        images = source.images
        for i in range(2):
            save_map(root, f"train0{i}", np.full((24, 32), IGNORE, np.uint8))
        two = type(images)(images.root, images.files[:2], images.labels[:2], None)
        segmentation.look_at(type(source)(two, *only, source.legend), 3, np.uint8)


# --- image and map together ---


def marked(height, width):
    """A pair in which the map can be read off the image: the class of a pixel is its level / 16."""
    coarse = np.random.default_rng(0).integers(0, 8, (-(-height // 8), -(-width // 8)))
    map_HW = coarse.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
    return Pair((map_HW * 16 + 100)[..., None].repeat(3, -1).astype(np.uint8), map_HW)


def assert_in_step(pair, share=0.95):
    """Assert that image and map show the same, but where two classes meet and colours mix."""
    inside = pair.map != IGNORED
    read_off = np.round((pair.image[..., 0].astype(float) - 100) / 16)
    assert (read_off == pair.map)[inside].mean() > share


@pytest.mark.parametrize("size", [(16, 16), (48, 40), (8, 30)])
def test_stretching_keeps_every_class_and_invents_none(size):
    pair = segmentation.stretch(marked(40, 60), size)
    assert pair.map.shape == size and pair.image.shape == (*size, 3)
    assert set(np.unique(pair.map)) <= set(range(8))
    assert_in_step(pair, 0.6)


def test_a_map_is_resized_as_pillow_takes_the_nearest_pixel():
    rng = np.random.default_rng(0)
    map_HW = rng.integers(0, 200, (37, 53)).astype(np.uint8)
    for box, size in [
        ((0, 0, 53, 37), (20, 31)),
        ((5, 7, 30, 20), (64, 48)),
        ((1, 2, 9, 9), (9, 9)),
    ]:
        left, top, width, height = box
        part = Image.fromarray(map_HW[top : top + height, left : left + width])
        wanted = part.resize(size, Image.Resampling.NEAREST)
        np.testing.assert_array_equal(label_maps.resize(map_HW, box, *size), np.asarray(wanted))


def test_random_crops_keep_image_and_map_in_step_at_every_scale():
    pair, padded = marked(64, 96), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        crop = segmentation.random_crop(pair, (48, 48), (0.5, 2.0), rng)
        crop = segmentation.flip(crop, 0.5, rng)
        assert crop.map.shape == (48, 48) and crop.image.shape == (48, 48, 3)
        assert_in_step(crop, 0.7)
        padded.append((crop.map == IGNORED).mean())
    assert min(padded) == 0 and max(padded) > 0.4  # at scale 0.5, 64 pixels become 24 of 48
    assert segmentation.random_crop(pair, (64, 96), (1, 1), rng).map.tolist() == pair.map.tolist()


def test_a_crop_of_one_class_alone_is_drawn_again():
    map_HW = np.zeros((40, 400), np.uint8)
    map_HW[:, 200:] = 1
    pair = Pair(np.zeros((40, 400, 3), np.uint8), map_HW)
    crops = [
        segmentation.random_crop(pair, (40, 40), (1, 1), np.random.default_rng(seed)).map
        for seed in range(100)
    ]
    mixed = [0 < crop.mean() < 1 for crop in crops]
    assert np.mean(mixed) > 0.3  # by a single draw it would be 39 of 361


def test_flipping_mirrors_both():
    pair = marked(16, 32)
    mirrored = segmentation.flip(pair, 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored.map, pair.map[:, ::-1])
    np.testing.assert_array_equal(mirrored.image, pair.image[:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_distortion_changes_levels_and_can_leave_them(channels):
    image = np.random.default_rng(0).integers(60, 190, (8, 8, channels)).astype(np.uint8)
    results = [distortion.photometric(image, np.random.default_rng(i)) for i in range(60)]
    assert all(x.dtype == np.uint8 and x.shape == image.shape for x in results)
    unchanged = [np.array_equal(x, image) for x in results]
    assert 0 < sum(unchanged) < 30
    shifts = [float(x.astype(int).mean() - image.mean()) for x in results]
    assert min(shifts) < -20 and max(shifts) > 20


# --- batches ---


def batches(root, start=0, rows=None, count=3, source=None, **changes):
    iterator = segmentation.train_batches(
        source or open_pairs(root), ConfigDict(READ | changes),
        batch_size=4, image_size=(16, 16), channels=3, seed=3, start_step=start, rows=rows,
    )  # fmt: skip
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_depend_on_seed_and_step_alone(root, workers):
    whole = batches(root, count=4)
    assert whole[0]["map"].dtype == np.uint8 and whole[0]["map"].shape == (4, 16, 16)
    later = batches(root, start=2, rows=np.array([1, 3]), count=2, workers=workers)
    for ours, theirs in zip(later, whole[2:], strict=True):
        for name in ("image", "map", "index", "bad"):
            np.testing.assert_array_equal(ours[name], theirs[name][[1, 3]])


def test_an_unlabelled_image_is_replaced_and_named(root):
    save_map(root, "train01", np.full((24, 32), IGNORE, np.uint8))
    found = batches(root, count=3)
    bad = np.concatenate([batch["bad"] for batch in found])
    index = np.concatenate([batch["index"] for batch in found])
    assert sorted(set(bad)) == [-1, 1] and 1 not in index
    assert all((batch["map"] != IGNORED).any() for batch in found)


def test_evaluation_takes_every_pair_once_and_pads_with_nothing_to_count(root):
    source = open_pairs(root, "test")
    found = list(segmentation.eval_batches(source, batch_size=4, image_size=(24, 32), channels=3))
    assert [batch["valid"].tolist() for batch in found] == [[True] * 4, [True] + [False] * 3]
    for i in range(5):
        batch = found[i // 4]
        np.testing.assert_array_equal(batch["map"][i % 4], source[i]["map"])
    assert (found[1]["map"][1:] == IGNORED).all()


def test_a_wrong_map_that_was_not_looked_at_stops_the_run_by_its_name(root, tmp_path):
    write_pairs(root, "train", 100)
    source = open_pairs(root)
    looked = set(np.linspace(0, 99, segmentation.LOOKED_AT).round().astype(int).tolist())
    hidden = next(i for i in range(100) if i not in looked)
    save_map(root, f"train{hidden:02d}", np.full((24, 32), 7, np.uint8))
    segmentation.look_at(source, 3, np.uint8)
    with pytest.raises(UserError, match=f"train{hidden:02d}.*has the number 7"):
        batches(root, count=25, source=source)
