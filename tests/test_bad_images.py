"""Unreadable images are replaced, counted, named once, and stop a run if they are many."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from test_pipeline import BATCH, SIZE, Noise, config, indices, train

from mae_jax.data import bad_images
from mae_jax.data.bad_images import BadImageLog
from mae_jax.data.decode import ORIENTATION
from mae_jax.data.sources import Unreadable, open_source
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.tasks.examples import TrainImages


def test_an_unreadable_image_is_replaced_by_another_and_reported():
    source = Noise(21, bad=(4, 5, 20))
    clean, batches = train(Noise(21), 20), train(source, 20)
    for whole, mended in zip(clean, batches, strict=True):
        hurt = np.isin(whole["index"], source.bad)
        np.testing.assert_array_equal(mended["bad"], np.where(hurt, whole["index"], -1))
        assert not np.isin(mended["index"], source.bad).any()
        np.testing.assert_array_equal(mended["label"], 10 * mended["index"])
        for key in ("image", "index"):
            np.testing.assert_array_equal(mended[key][~hurt], whole[key][~hurt])
    assert {int(i) for batch in batches for i in batch["bad"]} == {-1, 4, 5, 20}


def test_a_long_run_of_unreadable_images_stops_nothing():
    bad = tuple(range(100, 500))
    batches = train(Noise(1000, bad), 20)
    assert not np.isin(indices(batches), bad).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_readable_image_is_refused(workers):
    message = r"100 images .* cannot be read, .* \d\.png: not an image"
    with pytest.raises(Unreadable, match=message) as raised:
        train(Noise(9, bad=tuple(range(9))), 1, config(workers=workers))
    assert "Traceback" not in str(raised.value)


def test_each_unreadable_image_is_counted_and_named_once():
    log = BadImageLog(Noise(1000, bad=(3, 7, 9)), 0.01)
    assert (log.add(np.array([-1, -1])), log.count) == ([], 0)
    first, second = log.add(np.array([7, -1, 3, 7]))
    assert "3.png: not an image" in first
    assert "7.png: not an image" in second
    assert log.add(np.array([3, 7])) == []
    assert log.count == 2
    assert len(log.add(np.array([3, 9]))) == 1
    assert log.count == 3


def test_the_count_begins_again_with_every_start_and_says_so():
    source = Noise(21, bad=(4, 5, 20))
    spec = ModelSpec(SIZE, SIZE, 3, ViTSpec(width=4, depth=1, heads=1, mlp_width=4))
    images = TrainImages(source, config(max_bad_fraction=1.0), spec, BATCH, seed=0)

    def counts(first: int, last: int) -> list[int]:
        stream = images.batches(first, np.arange(BATCH))
        return [x["data/bad_images"] for _, x, _ in itertools.islice(stream, last - first)]

    met = [{i for i in batch["bad"] if i >= 0} for batch in train(source, 20)]
    for first in (0, 10):
        wanted = [len(set().union(*met[first : step + 1])) for step in range(first, 20)]
        assert counts(first, 20) == wanted
    assert counts(0, 20)[-1] == 3 and counts(10, 11)[0] < 3
    assert "since this start" in " ".join(TrainImages.batches.__doc__.split())


def test_too_many_unreadable_images_stop_the_run_and_are_listed_with_reasons():
    log = BadImageLog(Noise(100, bad=(3, 7, 90)), 0.02)
    assert len(log.add(np.array([3, 7]))) == 2  # as many as are allowed
    with pytest.raises(ValueError) as error:
        log.add(np.array([90]))
    text = str(error.value)
    assert "3 of 100 images (3.00%) cannot be read" in text
    assert "max_bad_fraction=0.02" in text
    assert all(f"\n  {index}.png: not an image" in text for index in (3, 7, 90))
    assert text.endswith("--config.data.max_bad_fraction=0.03")


def test_a_small_source_is_searched_for_all_that_would_have_to_be_mended():
    log = BadImageLog(Noise(20, bad=(3, 7, 19)), 0.01)
    with pytest.raises(ValueError, match=r"(?s)3 of 20 images \(15.00%\).*3.png.*7.png.*19.png"):
        log.add(np.array([7]))


def test_a_large_source_tells_what_it_has_met_so_far(monkeypatch):
    monkeypatch.setattr(bad_images, "SEARCHED", 200)
    source = Noise(201, bad=tuple(range(100)))
    log = BadImageLog(source, 0.1)
    with pytest.raises(ValueError, match=r"60 of 201 images so far") as error:
        log.add(np.arange(60))
    assert "49.png: not an image" in str(error.value)
    assert "50.png" not in str(error.value)
    assert "... and 10 more" in str(error.value)
    assert max(source.reads) < 60


def test_an_image_that_can_be_read_again_is_still_counted():
    log = BadImageLog(Noise(1000), 0.01)
    (line,) = log.add(np.array([5]))
    assert "5.png: was unreadable for a moment" in line
    assert log.count == 1


def test_the_reason_of_a_source_is_the_one_that_is_told():
    class Broken(Noise):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": b"", "unreadable": "it is gone"}

    (line,) = BadImageLog(Broken(1000), 0.01).add(np.array([5]))
    assert line.endswith("5.png: it is gone")


@pytest.fixture
def odd_folder(tmp_path):
    """A folder as people have them: 13 files that show a picture and 6 that do not."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))

    def file(picture: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide = rng.integers(0, 65536, (40, 50), np.uint16)
    files = {
        "animated.gif": file(colour, "GIF", save_all=True, append_images=[colour.rotate(180)]),
        "cmyk.jpg": file(colour.convert("CMYK"), "JPEG"),
        "grey.jpg": file(colour.convert("L"), "JPEG"),
        "palette.png": file(colour.quantize(16), "PNG", transparency=0),
        "pixel.png": file(colour.resize((1, 1)), "PNG"),
        "photo": file(colour, "JPEG"),
        "png under another name.jpg": file(colour, "PNG"),
        "sixteen.png": file(Image.fromarray(wide), "PNG"),
        "sideways.jpg": file(colour, "JPEG", exif=exif),
        "see-through.png": file(colour.convert("RGBA"), "PNG"),
        "strip.bmp": file(colour.resize((2000, 1)), "BMP"),
        "sub/deep/photo.webp": file(colour, "WEBP"),
        b"caf\xe9.jpg".decode("utf-8", "surrogateescape"): file(colour, "JPEG"),
        "bad/diary.jpg": b"Dear diary,\n",
        "bad/empty.png": b"",
        "bad/half.jpg": file(colour, "JPEG")[:900],
        "bad/half.png": file(colour, "PNG")[:900],
        "notes.txt": b"no image, and not meant to be",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bad/bomb.png")
    (tmp_path / "bad/link.jpg").symlink_to(tmp_path / "gone.jpg")
    return tmp_path


def test_a_folder_of_odd_files_is_trained_on_and_only_the_hopeless_are_replaced(odd_folder):
    source = open_source(f"folder:{odd_folder}", "train")
    assert len(source) == 19
    log = BadImageLog(source, max_bad_fraction=0.4)
    lines, seen = [], set()
    for batch in train(source, 20, image_size=(16, 16)):
        lines += log.add(batch["bad"])
        seen |= set(batch["index"].tolist())
    assert len(seen) == 13
    reasons = {
        "bad/bomb.png": "more than 178,956,970 pixels",
        "bad/diary.jpg": "not an image",
        "bad/empty.png": "empty",
        "bad/half.jpg": "truncated",
        "bad/half.png": "truncated",
        "bad/link.jpg": "No such file or directory",
    }
    assert log.count == len(lines) == len(reasons)
    for name, reason in reasons.items():
        assert any(f"{name}: " in line and reason in line for line in lines)
