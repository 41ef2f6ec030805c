"""Batches are a function of (seed, step), whoever loads them."""

import collections
import dataclasses
import itertools
import multiprocessing
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

from mae_jax.config import choices
from mae_jax.data import crops, eval_pipeline, pipeline, settings, workers
from mae_jax.data.decode import decode
from mae_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BATCH, SIZE = 8, (6, 6)


def config(**changed) -> ConfigDict:
    data = dict(
        crop="random_resized", crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        workers=0, max_bad_fraction=0.01,
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


def stream(source, data: ConfigDict | None = None, **options):
    defaults = dict(batch_size=BATCH, image_size=SIZE, channels=3, seed=0)
    return pipeline.train_batches(source, data or config(), **(defaults | options))


def train(source, steps: int, data: ConfigDict | None = None, **options) -> list[dict]:
    return list(itertools.islice(stream(source, data, **options), steps))


def evaluate(source, **options) -> list[dict]:
    defaults = dict(batch_size=BATCH, image_size=SIZE, channels=3)
    return list(eval_pipeline.eval_batches(source, **(defaults | options)))


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
    number = ((BATCH,), "int32")
    types = {"image": ((BATCH, *SIZE, 3), "uint8"), "label": number, "index": number, "bad": number}
    for batch in train(Noise(20), 4, config(crop="center", flip=0.0)):
        assert {key: (x.shape, str(x.dtype)) for key, x in batch.items()} == types
        columns = (batch[key] for key in ("image", "label", "index", "bad"))
        for image, label, index, bad in zip(*columns, strict=True):
            picture = decode(Noise(20)[index]["image"])
            np.testing.assert_array_equal(image, crops.center(picture, SIZE))
            assert (label, bad) == (10 * index, -1)


@pytest.mark.parametrize("crop", choices(crops))
def test_every_crop_is_drawn_anew_in_every_epoch_but_those_of_the_centre(crop):
    batches = train(Noise(BATCH), 5, config(crop=crop, flip=0.0), image_size=(14, 14))
    seen = {image.tobytes() for batch in batches for image in batch["image"][batch["index"] == 3]}
    assert (len(seen) == 1) == (crop in ("center", "full"))


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


def with_settings(picture, size_HW, rng, ratio=None, *, scale):
    return np.full((*size_HW, 3), 100 * scale[0] if ratio is None else 0, np.uint8)


def lighter(image, rng):
    return image // 2 + 128


def unit(image, rng):
    return image / 255


def forgetful(image, rng):
    image // 2


def narrow(picture, size_HW, rng):
    return np.zeros((*size_HW, 1), np.uint8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("augment", "unit", "float64"),
        ("augment", "forgetful", "NoneType"),
        ("crop", "narrow", r"uint8\[\d+, \d+, 1\]"),
    ],
)
def test_images_of_another_type_or_shape_are_refused_not_converted(workers, key, name, words):
    changed = config(workers=workers, **{key: f"test_pipeline.{name}"})
    with pytest.raises(UserError, match=f"data.{key}=.*returned {words}.*must return uint8"):
        train(Noise(8), 1, changed)


def test_crop_and_augmentation_of_ones_own_are_named_by_their_dotted_paths():
    (batch,) = train(Noise(8), 1, config(crop="test_pipeline.square"))
    assert all(len(set(image.ravel().tolist())) == 1 for image in batch["image"])
    (light,) = train(Noise(8), 1, config(augment="test_pipeline.lighter"))
    (plain,) = train(Noise(8), 1)
    np.testing.assert_array_equal(light["image"], plain["image"] // 2 + 128)


def test_a_crop_is_given_the_settings_that_are_keyword_only_arguments_of_it():
    (batch,) = train(Noise(8), 1, config(crop="test_pipeline.with_settings", crop_scale=(0.5, 1.0)))
    assert (batch["image"] == 50).all()


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
    ahead = workers.PREFETCH + 2  # one is copied, one is ready
    assert sum(source.reads.values()) <= (1 + ahead) * BATCH


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
        local = train(source, 3, start_step=1, rows=rows)
        assert_same(local, [{key: x[rows] for key, x in batch.items()} for batch in whole])


def test_a_host_reads_only_its_own_rows():
    source, rows = Noise(80), np.array([1, 6])
    batches = train(source, 5, rows=rows)
    ahead = train(Noise(80), 10 + workers.PREFETCH, rows=rows)
    assert set(indices(batches)) <= set(source.reads) <= set(indices(ahead))


@pytest.mark.parametrize("resizer", ["pillow", "fast"])
def test_threads_and_processes_give_the_same_batches(resizer, monkeypatch):
    source = Noise(21, bad=(4, 5))
    expected = train(source, 7, config(resizer=resizer), start_step=2)
    assert_same(train(source, 7, config(resizer=resizer, workers=2), start_step=2), expected)
    monkeypatch.setattr(workers, "SMALL_IMAGE", 0)
    for threads, prefetch in ((9, 7), (1, 1)):
        monkeypatch.setattr(workers, "THREADS", threads)
        monkeypatch.setattr(workers, "PREFETCH", prefetch)
        assert_same(train(source, 7, config(resizer=resizer), start_step=2), expected)


def test_the_fast_resizer_gives_other_pixels():
    pairs = zip(train(Noise(21), 4), train(Noise(21), 4, config(resizer="fast")), strict=True)
    assert any((exact["image"] != fast["image"]).any() for exact, fast in pairs)


WORKING = """
import multiprocessing
import sys
sys.path[:0] = ["tests"]
from test_pipeline import *

if __name__ == "__main__":
    batches = stream(Noise(21), config(workers=2))
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    print(next(batches)["index"].tolist(), flush=True)
    for line in sys.stdin:
        print(next(batches)["index"].tolist(), flush=True)
"""


def test_signals_to_workers_stop_nothing_and_a_killed_run_leaves_none_behind(tmp_path):
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        processes = [int(pid) for pid in run.stdout.readline().split()]
        assert len(processes) == 2
        run.stdout.readline()
        for pid in processes:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        expected = [batch["index"].tolist() for batch in train(Noise(21), 8)][2:]
        for batch in expected:  # more than was ready when the signals came
            run.stdin.write("\n")
            run.stdin.flush()
            assert run.stdout.readline() == f"{batch}\n"
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, processes))


def test_a_killed_worker_is_said_in_words():
    batches = stream(Noise(21), config(workers=2))
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(workers.WorkerLost, match="killed, perhaps for its memory: lower config"):
        for _ in range(100):
            next(batches)


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
    batches = stream(Noise(21))
    next(batches)
    running = ours()
    assert running
    del batches
    for thread in running:
        thread.join(timeout=60)
    assert not ours()


# --- evaluation ---


def test_evaluation_sees_every_image_once_in_order_at_its_centre():
    source = Noise(21)
    batches = evaluate(source)
    assert [batch["valid"].sum() for batch in batches] == [8, 8, 5]
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.dtype == bool
    assert indices(batches)[valid].tolist() == list(range(21))
    images = np.concatenate([batch["image"] for batch in batches])
    for index in range(21):
        picture = decode(source[index]["image"])
        np.testing.assert_array_equal(images[index], crops.center(picture, SIZE))
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


# --- limits, told before anything is read ---


def test_steps_per_epoch_drops_the_incomplete_batch():
    assert pipeline.steps_per_epoch(1_281_167, 4096) == 312  # REFERENCE section 2
    assert pipeline.steps_per_epoch(8, 8) == 1


@pytest.mark.parametrize("length", [0, 7])
def test_a_dataset_of_less_than_one_batch_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} images.*one batch of 8.*config.batch_size"):
        train(Noise(length), 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"crop": "random_resize"}, "random_resize.*nearest: random_resized"),
        ({"crop": "zoom"}, "there are: center, fixed, full, probe, random_resized"),
        ({"crop": "test_pipeline.sqare"}, "no 'sqare'"),
        ({"crop": "test_pipeline.lighter"}, "lighter' is no function .picture, size, rng"),
        ({"augment": "test_pipeline.square"}, "square' is no function .image, rng"),
        ({"augment": "test_pipeline.light"}, "no 'light'.*nearest: lighter"),
        ({"resizer": "fats"}, "fats.*fast"),
        ({"resizer": "fast", "crop": "center"}, "fast.*not for 'center'"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale.*.low, high."),
        ({"crop_scale": (0.5,)}, "crop_scale.*two numbers"),
        ({"crop_ratio": (4 / 3, 3 / 4)}, "crop_ratio.*.low, high."),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        settings.check(config(**changed))


def test_the_published_recipe_passes_the_check():
    from configs.pretrain import get_config

    settings.check(get_config().data)


def test_workers_without_memory_to_share_are_refused():
    with pytest.raises(ValueError, match=r"workers=2 would share .* MiB of memory.*workers=0"):
        train(Noise(20), 1, config(workers=2), image_size=(1_000_000, 1_000_000))


def test_the_synthetic_batch_is_always_the_same():
    batches = pipeline.synthetic_batches(np.array([2, 3, 7]), (4, 6), 5)
    first, second = next(batches), next(batches)
    assert_same([first], [second])
    assert first["image"].shape == (3, 4, 6, 5)
    assert first["image"].dtype == np.uint8
    assert first.keys() == train(Noise(8), 1)[0].keys()
