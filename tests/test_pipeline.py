"""Batches are a function of (seed, step); unreadable images are replaced, counted and named."""

import collections
import dataclasses
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data import pipeline, transforms
from mae_jax.data.sources import open_source

ROOT = Path(__file__).parents[1]
BATCH, SIZE = 8, (6, 6)


def config(**changed) -> ConfigDict:
    data = dict(
        crop="random_resized", crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        workers=0, threads=2, prefetch=2, max_bad_fraction=0.01,
    )  # fmt: skip
    return ConfigDict(data | changed)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Record i is noise of seed i, with label 10 * i, or one that cannot be read."""

    length: int
    bad: tuple[int, ...] = ()
    reads: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    num_classes = class_names = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        self.reads[index] += 1
        image = np.random.default_rng(index).integers(0, 256, (12, 15, 3), np.uint8)
        return {
            "image": b"no image" if index in self.bad else image,
            "label": 10 * index,
            "name": f"{index}.png",
        }


def train(source, steps: int, data: ConfigDict | None = None, **options) -> list[dict]:
    defaults = dict(batch_size=BATCH, image_size=SIZE, channels=3, seed=0)
    stream = pipeline.train_batches(source, data or config(), **(defaults | options))
    return list(itertools.islice(stream, steps))


def evaluate(source, data: ConfigDict | None = None, **options) -> list[dict]:
    defaults = dict(batch_size=BATCH, image_size=SIZE, channels=3)
    return list(pipeline.eval_batches(source, data or config(), **(defaults | options)))


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype


def indices(batches: list[dict]) -> np.ndarray:
    return np.concatenate([batch["index"] for batch in batches])


# --- what a batch is ---


def test_a_batch_holds_images_with_their_labels_and_indices():
    for batch in train(Noise(20), 4, config(crop="center", flip=0.0)):
        assert {key: (x.shape, str(x.dtype)) for key, x in batch.items()} == {
            "image": ((BATCH, *SIZE, 3), "uint8"),
            "label": ((BATCH,), "int32"),
            "index": ((BATCH,), "int32"),
            "bad": ((BATCH,), "int32"),
        }
        columns = (batch[key] for key in ("image", "label", "index", "bad"))
        for image, label, index, bad in zip(*columns, strict=True):
            picture = transforms.decode(Noise(20)[index]["image"])
            np.testing.assert_array_equal(image, transforms.center_crop(picture, SIZE))
            assert (label, bad) == (10 * index, -1)


@pytest.mark.parametrize("crop", pipeline.CROPS)
def test_every_crop_is_drawn_anew_in_every_epoch_but_the_centre(crop):
    batches = train(Noise(BATCH), 5, config(crop=crop, flip=0.0), image_size=(14, 14))
    seen = {image.tobytes() for batch in batches for image in batch["image"][batch["index"] == 3]}
    assert (len(seen) == 1) == (crop == "center")


def test_flip_is_a_probability():
    source = Noise(BATCH)
    centre = evaluate(source)[0]["image"]
    for flip, fewest, most in ((0.0, 0, 0), (0.5, 60, 100), (1.0, 160, 160)):
        flipped = 0
        for batch in train(source, 20, config(crop="center", flip=flip)):
            for image, index in zip(batch["image"], batch["index"], strict=True):
                mirrored = np.array_equal(image, centre[index][:, ::-1])
                assert mirrored or np.array_equal(image, centre[index])
                flipped += mirrored
        assert fewest <= flipped <= most


def test_images_of_any_number_of_channels_and_shape():
    @dataclasses.dataclass(frozen=True)
    class Spectral(Noise):
        def __getitem__(self, index):
            image = np.random.default_rng(index).integers(0, 256, (12, 15, 7), np.uint8)
            return {"image": image, "label": -1, "name": ""}

    (batch,) = train(Spectral(8), 1, image_size=(4, 10), channels=7)
    assert batch["image"].shape == (8, 4, 10, 7)
    (batch,) = train(Noise(8), 1, image_size=(4, 10), channels=1)
    assert batch["image"].shape == (8, 4, 10, 1)


def square(picture, size_HW, rng):
    return np.full((*size_HW, 3), rng.integers(256), np.uint8)


def test_a_crop_of_ones_own_is_named_by_its_dotted_path():
    (batch,) = train(Noise(8), 1, config(crop="test_pipeline.square"))
    assert all(len(set(image.ravel().tolist())) == 1 for image in batch["image"])


# --- order ---


@pytest.mark.parametrize(("length", "steps"), [(21, 2), (24, 3), (8, 1)], ids=str)
def test_every_epoch_is_a_new_permutation_that_drops_another_incomplete_batch(length, steps):
    orders, dropped = [], []
    batches = train(Noise(length), 6 * steps)
    for epoch in range(6):
        order = indices(batches[epoch * steps : (epoch + 1) * steps]).tolist()
        assert len(set(order)) == len(order) == steps * BATCH
        orders.append(tuple(order))
        dropped.append(frozenset(range(length)) - set(order))
    assert len(set(orders)) == 6
    assert {len(rest) for rest in dropped} == {length % BATCH}
    assert len(set(dropped)) == (6 if length % BATCH else 1)


def test_every_record_is_dropped_and_comes_first_equally_often():
    epochs, length, batch_size = 120, 20, 15
    batches = train(Noise(length), epochs, batch_size=batch_size, image_size=(1, 1))
    first = np.bincount([batch["index"][0] for batch in batches], minlength=length)
    dropped = epochs - np.bincount(indices(batches), minlength=length)
    for counts, chance in ((first, 1 / length), (dropped, 1 - batch_size / length)):
        assert counts.sum() == pytest.approx(epochs * length * chance)
        deviation = np.sqrt(epochs * chance * (1 - chance))
        assert np.abs(counts - epochs * chance).max() < 4 * deviation


@pytest.mark.parametrize("start", [1, 2, 5, 11])
def test_any_start_step_continues_the_same_sequence(start):
    assert_same(train(Noise(21), 4, start_step=start), train(Noise(21), 20)[start : start + 4])


def test_a_far_start_reads_nothing_of_what_comes_before():
    source = Noise(21)
    train(source, 1, start_step=10**9)
    assert sum(source.reads.values()) <= 5 * BATCH  # the batch and what is read ahead of it


def test_seeds_differ_in_order_and_in_crops():
    runs = [train(Noise(8), 1, seed=seed)[0] for seed in (-1, 0, 1, 2, 2**32 - 2)]
    assert len({run["index"].tobytes() for run in runs}) == len(runs)
    assert len({image.tobytes() for run in runs for image in run["image"]}) == 8 * len(runs)


HOSTS = {
    "one": [range(8)],
    "two": [range(4), range(4, 8)],
    "two, interleaved": [range(0, 8, 2), range(1, 8, 2)],
    "four": [range(0, 2), range(2, 4), range(4, 6), range(6, 8)],
    "four, in pieces": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "uneven": [(0,), (1, 2, 3, 4, 5, 6, 7)],
    "sharing rows": [range(8), range(4, 8)],
}


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS.keys())
def test_hosts_get_their_rows_of_the_same_global_batches(hosts):
    whole = train(Noise(21, bad=(4, 5)), 3, start_step=1)
    for rows in map(np.array, hosts):
        source = Noise(21, bad=(4, 5))
        local = train(source, 3, config(prefetch=1), start_step=1, rows=rows)
        assert_same(local, [{key: x[rows] for key, x in batch.items()} for batch in whole])


def test_a_host_reads_only_its_own_rows():
    source, rows = Noise(80), np.array([1, 6])
    batches = train(source, 5, config(threads=1, prefetch=1), rows=rows)
    ahead = train(Noise(80), 10, rows=rows)
    assert set(indices(batches)) <= set(source.reads) <= set(indices(ahead))


def test_threads_and_processes_give_the_same_batches():
    source = Noise(21, bad=(4, 5))
    expected = train(source, 7, start_step=2)
    for changed in ({"threads": 9, "prefetch": 7}, {"threads": 1, "prefetch": 1}, {"workers": 2}):
        assert_same(train(source, 7, config(**changed), start_step=2), expected)


WORKING = """
import multiprocessing
import sys
sys.path[:0] = ["tests"]
from test_pipeline import *

if __name__ == "__main__":
    stream = pipeline.train_batches(
        Noise(21), config(workers=2), batch_size=8, image_size=SIZE, channels=3, seed=0
    )
    next(stream)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    print(next(stream)["index"].tolist(), flush=True)
    for line in sys.stdin:
        print(next(stream)["index"].tolist(), flush=True)
"""


def test_signals_to_workers_stop_nothing_and_a_killed_run_leaves_none_behind(tmp_path):
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert len(workers) == 2
        run.stdout.readline()
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        expected = [batch["index"].tolist() for batch in train(Noise(21), 8)][2:]
        for batch in expected:  # more than was ready when the signals came
            run.stdin.write("\n")
            run.stdin.flush()
            assert run.stdout.readline() == f"{batch}\n"
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_dropped_iterator_stops_its_threads():
    def ours() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before]

    before = threading.enumerate()
    stream = pipeline.train_batches(
        Noise(21), config(threads=3), batch_size=BATCH, image_size=SIZE, channels=3, seed=0
    )
    next(stream)
    running = ours()
    assert running
    del stream
    for thread in running:
        thread.join(timeout=60)
    assert not ours()


# --- evaluation ---


def test_evaluation_sees_every_image_once_in_order_at_its_centre():
    source = Noise(21)
    batches = evaluate(source, config(workers=3))  # needs no processes
    assert [batch["valid"].sum() for batch in batches] == [8, 8, 5]
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.dtype == bool
    assert indices(batches)[valid].tolist() == list(range(21))
    images = np.concatenate([batch["image"] for batch in batches])
    for index in range(21):
        picture = transforms.decode(source[index]["image"])
        np.testing.assert_array_equal(images[index], transforms.center_crop(picture, SIZE))
    assert (images[21:] == 0).all()
    assert np.concatenate([b["label"] for b in batches])[valid].tolist() == [*range(0, 210, 10)]


@pytest.mark.parametrize(("limit", "counts"), [(5, [5]), (8, [8]), (9, [8, 1]), (99, [8, 8, 5])])
def test_evaluation_stops_at_its_limit(limit, counts):
    batches = evaluate(Noise(21), limit=limit)
    assert [batch["valid"].sum() for batch in batches] == counts


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS.keys())
def test_every_host_evaluates_the_same_number_of_batches(hosts):
    whole = evaluate(Noise(18))
    for rows in map(np.array, hosts):
        local = evaluate(Noise(18), rows=rows)
        assert_same(local, [{key: x[rows] for key, x in batch.items()} for batch in whole])


def test_evaluation_marks_what_it_cannot_read_and_replaces_nothing():
    (batch,) = evaluate(Noise(6, bad=(2, 5)))
    assert batch["bad"].tolist() == [-1, -1, 2, -1, -1, 5, -1, -1]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert (batch["image"][[2, 5]] == 0).all()


# --- unreadable images ---


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
    with pytest.raises(ValueError, match=r"100 images .* cannot be read, .* \d\.png: not an image"):
        train(Noise(9, bad=tuple(range(9))), 1, config(workers=workers))


def test_each_unreadable_image_is_counted_and_named_once():
    log = pipeline.BadImageLog(Noise(1000, bad=(3, 7, 9)), 0.01)
    assert (log.add(np.array([-1, -1])), log.count) == ([], 0)
    first, second = log.add(np.array([7, -1, 3, 7]))
    assert "3.png: not an image" in first
    assert "7.png: not an image" in second
    assert log.add(np.array([3, 7])) == []
    assert log.count == 2
    assert len(log.add(np.array([3, 9]))) == 1
    assert log.count == 3


def test_too_many_unreadable_images_stop_the_run_and_are_listed_with_reasons():
    log = pipeline.BadImageLog(Noise(100, bad=(3, 7, 90)), 0.02)
    assert len(log.add(np.array([3, 7]))) == 2  # as many as are allowed
    with pytest.raises(ValueError) as error:
        log.add(np.array([90]))
    text = str(error.value)
    assert "3 of 100 images (3.00%) cannot be read" in text
    assert "max_bad_fraction=0.02" in text
    assert all(f"\n  {index}.png: not an image" in text for index in (3, 7, 90))
    assert text.endswith("--config.data.max_bad_fraction=0.03")


def test_a_small_source_is_searched_for_all_that_would_have_to_be_mended():
    log = pipeline.BadImageLog(Noise(20, bad=(3, 7, 19)), 0.01)
    with pytest.raises(ValueError, match=r"(?s)3 of 20 images \(15.00%\).*3.png.*7.png.*19.png"):
        log.add(np.array([7]))


def test_a_large_source_tells_what_it_has_met_so_far(monkeypatch):
    monkeypatch.setattr(pipeline, "SMALL", 200)
    source = Noise(201, bad=tuple(range(100)))
    log = pipeline.BadImageLog(source, 0.1)
    with pytest.raises(ValueError, match=r"60 of 201 images so far") as error:
        log.add(np.arange(60))
    assert "49.png: not an image" in str(error.value)
    assert "50.png" not in str(error.value)
    assert "... and 10 more" in str(error.value)
    assert max(source.reads) < 60


def test_an_image_that_can_be_read_again_is_still_counted():
    log = pipeline.BadImageLog(Noise(1000), 0.01)
    (line,) = log.add(np.array([5]))
    assert "5.png: was unreadable for a moment" in line
    assert log.count == 1


def test_the_reason_of_a_source_is_the_one_that_is_told():
    class Broken(Noise):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": b"", "unreadable": "it is gone"}

    (line,) = pipeline.BadImageLog(Broken(1000), 0.01).add(np.array([5]))
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
    exif[transforms.ORIENTATION] = 6
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
    log = pipeline.BadImageLog(source, max_bad_fraction=0.4)
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
    with pytest.raises(ValueError, match="6 of 19 images") as error:
        pipeline.BadImageLog(source, max_bad_fraction=0.01).add(
            np.array([source.files.index("bad/bomb.png")])
        )
    assert all(f"\n  {name}: " in str(error.value) for name in reasons)


# --- limits, told before anything is read ---


def test_steps_per_epoch_drops_the_incomplete_batch():
    assert pipeline.steps_per_epoch(1_281_167, 4096) == 312  # REFERENCE section 2
    assert pipeline.steps_per_epoch(8, 8) == 1


@pytest.mark.parametrize("length", [0, 7])
def test_a_dataset_of_less_than_one_batch_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} images.*one batch of 8.*config.batch_size"):
        pipeline.steps_per_epoch(length, 8)
    with pytest.raises(ValueError, match=f"{length} images"):
        train(Noise(length), 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"crop": "random_resize"}, "random_resize.*nearest: random_resized"),
        ({"crop": "zoom"}, "there are: center, fixed, random_resized"),
        ({"crop": "test_pipeline.sqare"}, "no function 'sqare'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale.*0 < low"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale.*low <= high"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale.*at most 1"),
        ({"crop_scale": (0.5,)}, "crop_scale.*two numbers"),
        ({"crop_scale": (float("nan"), 1.0)}, "crop_scale"),
        ({"crop_ratio": (4 / 3, 3 / 4)}, "crop_ratio.*low <= high"),
        ({"crop_ratio": (-1.0, 1.0)}, "crop_ratio.*0 < low"),
        ({"crop_ratio": (1.0, float("inf"))}, "crop_ratio"),
        ({"std": (0.2, 0.0, 0.2)}, "std.*positive"),
        ({"flip": 1.5}, "flip=1.5.*from 0 to 1"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction=-0.1"),
        ({"workers": -1}, "workers=-1.*at least 0"),
        ({"threads": 0}, "threads=0.*at least 1"),
        ({"prefetch": 0}, "prefetch=0.*at least 1"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        pipeline.check(config(**changed))
    with pytest.raises(ValueError, match=message):
        train(Noise(20), 1, config(**changed))


def test_the_published_recipe_passes_the_check():
    from configs.pretrain import get_config

    pipeline.check(get_config().data)


def test_workers_without_room_in_shared_memory_are_refused():
    with pytest.raises(ValueError, match=r"workers=2 needs .* MiB of shared memory.*workers=0"):
        train(Noise(20), 1, config(workers=2), image_size=(1_000_000, 1_000_000))


def test_the_synthetic_batch_is_always_the_same():
    stream = pipeline.synthetic_batches(
        batch_size=BATCH, image_size=(4, 6), channels=5, rows=np.array([2, 3, 7])
    )
    first, second = next(stream), next(stream)
    assert_same([first], [second])
    assert first["image"].shape == (3, 4, 6, 5)
    assert first["image"].dtype == np.uint8
    assert first.keys() == train(Noise(8), 1)[0].keys()
