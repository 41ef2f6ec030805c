"""Other test sets of ImageNet: labels, competing classes and means are those of their papers."""

import io
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012_corrupted import (
    imagenet2012_corrupted_dataset_builder as corrupted,
)
from tiny import finetune_config, fresh_state, mesh_of, run, save_workdir, task_on

from mae_jax import checkpoint, train
from mae_jax.commands import prepare
from mae_jax.commands import train as command
from mae_jax.configs.robustness import get_config
from mae_jax.data import crops, robustness, sources
from mae_jax.data.decode import decode
from mae_jax.evals import robustness as evaluation
from mae_jax.metrics.writer import read

# tfds's own list: the WordNet ids of the 1000 classes, in the order of their labels
WORDNET_IDS = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
SUBSETS = json.loads((Path(__file__).parent / "data" / "imagenet_subsets.json").read_text())
SETS = {"imagenet_v2/matched-frequency": 1000, "imagenet_a": 200, "imagenet_r": 200,
        "imagenet_sketch": 1000}  # fmt: skip
SIZE = 8


def picture(code: int, corner_only: bool = False, format: str = "PNG") -> bytes:
    """An image whose first pixel, or all, tells a class."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[(0, 0) if corner_only else ...] = [
        code // 100 * 16,
        code // 10 % 10 * 16,
        code % 10 * 16,
    ]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All four sets in their archives' real layout, one image of every class, prepared."""
    folder, target = tmp_path_factory.mktemp("archives"), tmp_path_factory.mktemp("tfds")
    ids, v2 = WORDNET_IDS, "imagenetv2-matched-frequency-format-val"
    files = {
        **{f"{v2}/{y}/{y:04x}f00d.jpeg": y for y in range(1000)},
        **{f"imagenet-a/{ids[y]}/{y}_0.0001_x _ y_0.9.jpg": y for y in SUBSETS["imagenet_a"]},
        **{f"imagenet-r/{ids[y]}/art_0.jpg": y for y in SUBSETS["imagenet_r"]},
        **{f"sketch/{ids[y]}/sketch_{y}.JPEG": y for y in range(1000)},
    }
    for name, label in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(label))
    for archive, format, top in [
        ("imagenetv2-matched-frequency", "gztar", v2), ("ImageNet-Sketch", "zip", "sketch"),
        ("imagenet-a", "tar", "imagenet-a"), ("imagenet-r", "tar", "imagenet-r"),
    ]:  # fmt: skip
        shutil.make_archive(str(folder / archive), format, folder, top)
    for name in SETS:
        prepare.main([name, f"--manual-dir={folder}", f"--data-dir={target}"])
    return str(target)


def code_of(image_BHWC):
    """The class that the first pixel tells."""
    digits = jnp.round(image_BHWC[:, 0, 0].astype(jnp.float32) / 16).astype(jnp.int32)
    return digits @ jnp.array([100, 10, 1])


def confused(params, extra, batch):
    """Logits that prefer the class that follows the true one, except at every third."""
    code_B = code_of(batch["image"])
    logits_BY = jax.nn.one_hot(code_B, 1000)
    return logits_BY + 2 * jax.nn.one_hot((code_B + 1) % 1000, 1000) * (code_B % 3 > 0)[:, None]


def as_told(params, extra, batch):
    """Logits of a model that takes the first pixel's word for it."""
    return jax.nn.one_hot(code_of(batch["image"]), 1000)


def tiny_config(data_dir: str, arg: str = "") -> ConfigDict:
    config = get_config(f"source=imagenet_v2/matched-frequency,split=test{arg}")
    config.model.update(
        width=16, depth=1, heads=2, patch_size=(4, 4), image_size=(SIZE, SIZE), dtype="float32"
    )
    config.data.data_dir = data_dir
    config.batch_size = config.evals.robustness.batch_size = 96
    return config


def measure(config, predict):
    cfg, mesh = config.evals.robustness, mesh_of(8, 1, 1)
    evaluator = evaluation.Evaluator(cfg, config, {"logits": predict}, mesh)
    return evaluator.run(train.TrainState(jnp.zeros((), jnp.int32), {}, (), {})).scalars


# --- labels ---


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_200_classes_are_those_of_the_authors(name):
    ours = robustness.SUBSETS[name]
    assert len(set(ours)) == 200
    assert robustness.positions(ours, WORDNET_IDS, name).tolist() == SUBSETS[name]


def test_every_class_of_every_archive_gets_its_label_among_the_1000(data_dir):
    for name, count in SETS.items():
        builder = tfds.builder(name, data_dir=data_dir)
        assert builder.info.features["label"].names == WORDNET_IDS
        examples = list(builder.as_data_source("test"))
        assert len(examples) == count
        told = [int(code_of(example["image"][None])[0]) for example in examples]
        assert [example["label"] for example in examples] == told
        expected = SUBSETS.get(name, range(1000))
        assert sorted(told) == list(expected)
        for example in examples:
            folder, _, file = example["file_name"].decode().rpartition("/")
            if name.startswith("imagenet_v2"):
                assert int(folder) == example["label"]
            elif name == "imagenet_a":  # tfds keeps the name of the file alone
                assert (folder, file.split("_")[0]) == ("", str(example["label"]))
            else:
                assert folder == WORDNET_IDS[example["label"]]


def test_a_class_that_the_model_does_not_know_is_named(data_dir):
    with pytest.raises(ValueError, match="imagenet_a has 1 of 2 classes, such as 'n00000000'"):
        robustness.positions(["n01498041", "n00000000"], WORDNET_IDS, "imagenet_a")


# --- competing classes ---


def test_only_the_200_classes_compete_where_there_are_no_others(data_dir):
    found = measure(tiny_config(data_dir), confused)
    for name in SETS:
        short = name.split("/")[0]
        classes = SUBSETS.get(short, range(1000))
        # Right where nothing is preferred to the true class, or what is does not compete
        right = [y % 3 == 0 or (y + 1) % 1000 not in classes for y in classes]
        assert found[f"eval/{short}_images"] == len(classes)
        assert found[f"eval/{short}_top1"] == pytest.approx(100 * np.mean(right))
    assert found["eval/imagenet_a_top1"] > found["eval/imagenet_sketch_top1"]


def test_of_equal_logits_the_first_wins_and_what_is_no_number_is_wrong():
    logits = np.array([[1, 5, 1, 0], [0, 5, 1, 1], [0, 9, 1, np.nan], [np.nan, 0, 2, 1]])
    right = evaluation.correct(logits, np.array([0, 2, 2, 2]), np.array([0, 2, 3]))
    np.testing.assert_array_equal(right, [True, True, False, False])
    right = evaluation.correct(logits, np.array([2, 3, 2, 2]), np.array([1, 2, 3]))
    np.testing.assert_array_equal(right, [False, False, False, True])


# --- ImageNet-C ---

# arXiv 1903.12261; REFERENCE section 6
TABLE = """
    gaussian_noise .886428 shot_noise .894468 impulse_noise .922640 defocus_blur .819880
    glass_blur .826268 motion_blur .785948 zoom_blur .798360 snow .866816 frost .826572
    fog .819324 brightness .564592 contrast .853204 elastic_transform .646056 pixelate .717840
    jpeg_compression .606500
"""
ALEXNET = {name: float(error) for name, error in re.findall(r"(\w+) (\.\d+)", TABLE)}
LABELS = (0, 3, 500, 999)
GROUPS = {"blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")}


@pytest.fixture(scope="module")
def corruptions(tmp_path_factory):
    """The public folders, some in the group of their archive; of each part some images mislead."""
    root, rng, wrong = tmp_path_factory.mktemp("imagenet-c"), np.random.default_rng(0), {}
    for name in (*ALEXNET, "speckle_noise", "gaussian_blur", "spatter", "saturate"):
        group = "blur" if name in GROUPS["blur"] else ""
        for severity in range(1, 6):
            mistakes = rng.random(len(LABELS)) < severity / 6
            wrong[name, severity] = mistakes
            for label, mistake in zip(LABELS, mistakes, strict=True):
                folder = root / group / name / str(severity) / WORDNET_IDS[label]
                folder.mkdir(parents=True)
                told = (label + 1) % 1000 if mistake else label
                data = picture(told, corner_only=True)  # a centre crop would lose it
                (folder / f"ILSVRC2012_val_{label + 1:08d}.JPEG").write_bytes(data)
    return root, wrong


def test_the_mean_corruption_error_is_relative_to_alexnets(corruptions, data_dir):
    root, wrong = corruptions
    config = tiny_config(data_dir, f",v2=,a=,r=,sketch=,c=folder:{root}")
    found = measure(config, as_told)
    ratios, errors = [], []
    for name, alexnet in ALEXNET.items():
        total = sum(wrong[name, severity].mean() for severity in range(1, 6))
        assert found[f"eval/imagenet_c_error_{name}"] == pytest.approx(100 * total / 5)
        ratios.append(total / (5 * alexnet))
        errors.append(total / 5)
    assert found["eval/imagenet_c_mce"] == pytest.approx(100 * np.mean(ratios))
    assert found["eval/imagenet_c_top1"] == pytest.approx(100 * (1 - np.mean(errors)))
    assert found["eval/imagenet_c_images"] == 15 * 5 * len(LABELS)
    total = sum(wrong["spatter", severity].mean() for severity in range(1, 6))
    assert found["eval/imagenet_c_error_spatter"] == pytest.approx(100 * total / 5)


def test_crops_of_the_models_size_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    np.testing.assert_array_equal(crops.full(pixels, (224, 224)), pixels)
    larger = Image.fromarray(pixels).resize((448, 448), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crops.full(pixels, (448, 448)), np.asarray(larger))


def write_part(root: Path, corruption: str, severity: int, images: int = 1) -> None:
    """A part of ImageNet-C with images of one class."""
    folder = root / corruption / str(severity) / WORDNET_IDS[7]
    folder.mkdir(parents=True)
    for i in range(images):
        (folder / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(picture(7))


def test_without_all_corruptions_there_is_no_mean_and_what_lacks_is_named(
    tmp_path, data_dir, capsys
):
    for severity in range(1, 6):
        write_part(tmp_path, "snow", severity)
        if severity < 5:
            write_part(tmp_path, "frost", severity)
    found = measure(tiny_config(data_dir, f",v2=,a=,r=,sketch=,c=folder:{tmp_path}"), as_told)
    assert found == {"eval/imagenet_c_error_snow": 0.0}
    assert (
        "lacks gaussian_noise/1, gaussian_noise/2, gaussian_noise/3, ..." in capsys.readouterr().out
    )
    assert "frost/5" in robustness.find_corruptions(f"folder:{tmp_path}")[1]


def test_a_part_of_another_size_than_the_others_is_refused(tmp_path, data_dir):
    for severity in range(1, 6):
        write_part(tmp_path, "snow", severity, images=1 + (severity == 4))
    with pytest.raises(ValueError, match="snow/4 has 2 images .* before it 1: unpack it again"):
        measure(tiny_config(data_dir, f",v2=,a=,r=,sketch=,c=folder:{tmp_path}"), as_told)


class Corrupted(corrupted.Builder, skip_registration=True):  # type: ignore[call-arg]
    """What tfds writes, without TensorFlow."""

    name = "imagenet2012_corrupted"

    @classmethod
    def get_metadata(cls):
        return corrupted.Builder.get_metadata()

    def _split_generators(self, dl_manager):
        buffer = io.BytesIO()
        Image.new("RGB", (224, 224), (self.builder_config.severity,) * 3).save(buffer, "JPEG")
        example = {"image": buffer.getvalue(), "label": WORDNET_IDS[42], "file_name": "1.JPEG"}
        return {"validation": iter([("1.JPEG", example)])}


def test_a_copy_that_tfds_prepared_is_read_too(tmp_path):
    for severity in range(1, 6):
        part = f"fog_{severity}"
        builder = Corrupted(config=part, data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
    source, data_dir = "imagenet2012_corrupted", str(tmp_path)
    complete, missing = robustness.find_corruptions(source, data_dir)
    assert complete == ["fog"] and len(missing) == 14 * 5 and "snow/3" in missing
    part = robustness.open_corruption(source, "fog", 4, data_dir)
    assert len(part) == 1 and part.class_names == WORDNET_IDS and part[0]["label"] == 42
    decoded = decode(part[0]["image"])
    np.testing.assert_allclose(crops.full(decoded, (224, 224)), 4, atol=1)


# --- the command ---


@pytest.fixture(scope="module")
def finetuned(data_dir, tmp_path_factory):
    """The workdir of a classifier of 1000 classes whose predictions differ from image to image."""
    config = tiny_config(data_dir)
    config.start, config.ema = "normal", 0.9
    config.model.pool = "cls"
    task = task_on(config, mesh_of(1, 1, 1))
    params, extra = jax.jit(task.init)(jax.random.key(0))
    kernel = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    params["head"]["kernel"], extra["ema"]["head"]["kernel"] = -kernel, kernel
    workdir = tmp_path_factory.mktemp("runs") / "finetuned"
    save_workdir(config, workdir, train.TrainState(jnp.int32(0), params, (), extra))
    return workdir, task, extra["ema"]


def test_one_command_measures_a_finetuned_run_on_what_is_there(
    finetuned, corruptions, data_dir, tmp_path, capsys
):
    workdir, task, averaged = finetuned
    flags = ["--config.batch_size=96", "--config.evals.robustness.batch_size=96"]
    arg = f"init={workdir},c=folder:{corruptions[0]},sketch=imagenet_v2/topimages"
    argv = [f"--config=configs/robustness.py:{arg}", f"--workdir={tmp_path / 'run'}", *flags]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    (found,) = read(tmp_path / "run" / "metrics.jsonl")
    assert "imagenet_sketch is left out" in said
    assert "mae-jax prepare imagenet_v2/topimages --data_dir=" in said
    assert "eval/imagenet_sketch_top1" not in found
    for name in ("eval/imagenet_r_top1", "eval/imagenet_c_mce"):
        assert f"{name:38} {found[name]:.2f} %" in said
    assert re.search(r"eval/imagenet_r_images +200\n", said)

    # Directly, in one process's order: the averaged weights, head and all
    source = sources.open_source("imagenet_r", "test", data_dir)
    records = [source[i] for i in range(len(source))]
    images = np.stack([np.asarray(decode(record["image"])) for record in records])
    logits_BY = np.asarray(jax.jit(task.predict()["logits"])(averaged, {}, {"image": images}))
    classes = SUBSETS["imagenet_r"]
    best = [classes[np.argmax([logits_Y[y] for y in classes])] for logits_Y in logits_BY]
    right = np.mean([y == record["label"] for y, record in zip(best, records, strict=True)])
    assert found["eval/imagenet_r_top1"] == pytest.approx(100 * right)

    # The same on one device
    config = get_config(arg)
    config.batch_size = 96
    config.evals.robustness.batch_size = 40
    one = mesh_of(1, 1, 1)
    task, state = fresh_state(config, one)
    evaluator = evaluation.Evaluator(config.evals.robustness, config, task.predict(), one)
    state = task.load(checkpoint.find(workdir, "init_from"), state)
    assert evaluator.run(state).scalars == {k: v for k, v in found.items() if k != "step"}


def test_with_none_of_the_sets_it_says_how_to_get_each(tmp_path, data_dir):
    config = tiny_config(data_dir, ",v2=imagenet_v2/topimages,a=,r=,sketch=")
    with pytest.raises(ValueError) as refused:
        measure(config, as_told)
    assert "mae-jax prepare imagenet_v2/topimages" in str(refused.value)
    assert "zenodo.org/records/2235448" in str(refused.value)


# --- transfer ---


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """PATH/train and PATH/test of three classes that differ in colour."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for i, name in enumerate(("red", "green", "blue")):
            for number in range(count):
                pixels = rng.integers(0, 60, (12, 12, 3), np.uint8)
                pixels[..., i] += 160
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def test_any_images_with_labels_can_be_learned(coloured, tmp_path):
    """Of a folder and of a tfds dataset: one is learned, the other measured, then reversed."""
    source = ["folder", f"--source={coloured}/train", "--name=mine"]
    assert prepare.main([*source, f"--data_dir={tmp_path}", "--workers=1"]) == 0
    folder = f"folder:{coloured}/test"
    for learned, measured in (("mine", folder), (folder, "mine")):
        workdir = tmp_path / learned.partition(":")[0]
        sizes = dict(width=16, depth=1, heads=2, patch_size=(4, 4), image_size=(8, 8), channels=3)
        arg = f"scratch=true,source={learned},test=train,batch_size=8"
        config = finetune_config(arg, **sizes)
        config.data.update(
            data_dir=str(tmp_path), augment="", crop_scale=(0.5, 1.0), mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )  # fmt: skip
        config.optim.update(blr=0.1, warmup="2 steps")
        config.mix.update(mixup=0.0, cutmix=0.0)
        config.ema, config.train_for = 0.5, "20 steps"
        for cfg in config.evals.values():
            cfg.update(source=measured, split="train", every="")
        run(config, workdir, (1, 1, 1))
        lines = read(workdir / "metrics.jsonl")
        last = {name: value for line in lines for name, value in line.items()}
        assert last["eval/images"] == (15 if measured == folder else 48)
        assert last["eval/top1"] == 100
        assert "eval/top5" not in last  # of three classes
