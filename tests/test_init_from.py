"""Starting from another's encoder: other patches and channels, and what cannot be started from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_finetune import fresh_state, load_into, tiny_config
from test_probe import config_after
from test_train import mesh_of
from test_train import tiny_config as pretrain_config

from configs import finetune, linprobe
from mae_jax import checkpoint, evals, provenance, sharding, train
from mae_jax.commands import train as command
from mae_jax.evals import fewshot
from mae_jax.models import patch_embed
from mae_jax.models.patch_embed import Pixels
from mae_jax.models.patchify import patchify
from mae_jax.tasks import classify, pretrain
from mae_jax.tasks import probe as probe_task

RGB = Pixels((8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Pixels((8, 8), (0.45,), (0.22,))


def kernel_and_bias(pixels, width=16, seed=0):
    rng = np.random.default_rng(seed)
    values = pixels.patch[0] * pixels.patch[1] * len(pixels.mean)
    return rng.normal(size=(values, width)).astype(np.float32), rng.normal(size=width)


def embed(levels_BHWC, pixels, kernel, bias):
    normalised = (levels_BHWC - np.array(pixels.mean)) / np.array(pixels.std)
    return np.asarray(patchify(jnp.asarray(normalised), pixels.patch)) @ kernel + bias


# --- the arithmetic ---


@pytest.mark.parametrize("old, new", [(RGB, GREY), (GREY, RGB)], ids=["to grey", "to colour"])
def test_grey_images_keep_their_embedding_when_channels_change(old, new):
    kernel, bias = kernel_and_bias(old)
    grey = np.random.default_rng(1).uniform(size=(2, 16, 16, 1))
    before, after = (np.repeat(grey, len(p.mean), 3) for p in (old, new))
    expected = embed(before, old, kernel, bias)
    found = embed(after, new, *patch_embed.adapt(kernel, bias, old, new))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_enlarged_patches_keep_their_embedding():
    old, new = Pixels((4, 6), (0.0,) * 3, (1.0,) * 3), Pixels((7, 12), (0.0,) * 3, (1.0,) * 3)
    kernel, bias = kernel_and_bias(old)
    patches = np.random.default_rng(1).normal(size=(5, 4, 6, 3)).astype(np.float32)
    larger = jax.image.resize(patches, (5, 7, 12, 3), "bilinear")
    expected = embed(patches, old, kernel, bias)
    found = embed(np.asarray(larger), new, *patch_embed.adapt(kernel, bias, old, new))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_of_shrunken_patches_no_kernel_is_nearer():
    """The least squares over many patches of independent pixels, solved without the formula."""
    kernel, _ = kernel_and_bias(Pixels((6, 6), (0.0,), (1.0,)), width=3)
    patches = np.random.default_rng(1).normal(size=(40_000, 6, 6))
    small = np.asarray(jax.image.resize(patches, (40_000, 3, 4), "bilinear"))
    wanted = patches.reshape(len(patches), -1) @ kernel
    solved = np.linalg.lstsq(small.reshape(len(small), -1), wanted, rcond=None)[0]
    found = np.asarray(patch_embed.resize(jnp.asarray(kernel), (6, 6), (3, 4)))
    assert np.abs(found - solved).max() < 0.03 * np.abs(found).max()
    summed = np.abs(kernel.reshape(3, 2, 6, 3).sum(1)).max()
    assert np.abs(found).max() > 0.3 * summed  # a patch of fewer pixels has larger weights


def test_channels_that_have_nothing_to_do_with_each_other_are_refused():
    four = Pixels((8, 8), (0.5,) * 4, (0.5,) * 4)
    with pytest.raises(ValueError, match="of 3 channels cannot be made ones of 4"):
        patch_embed.adapt(*kernel_and_bias(RGB), RGB, four)


# --- from a checkpoint ---


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Workdir -> a run of no updates, for grey images and for coloured ones; their encoders."""
    found = {}
    for channels in (1, 3):
        config = pretrain_config()
        config.model.channels = channels
        config.data.update(mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.25, 0.3)[:channels])
        workdir = tmp_path_factory.mktemp(f"pretrained{channels}")
        task = pretrain.make_task(config)
        params, _ = jax.jit(lambda task=task: task.init(jax.random.key(0)))()
        provenance.prepare_workdir(workdir, config)
        saver = checkpoint.Checkpointer(workdir)
        saver.save(0, {"params": params})
        saver.close()
        found[channels] = workdir, jax.device_get(params["encoder"])
    return found


def finetune_config(workdir, **model):
    config = tiny_config(f"init={workdir}", **{"image_size": (32, 32), **model})
    channels = config.model.channels
    config.data.update(mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    return config


@pytest.mark.parametrize("old, new", [(3, 1), (1, 3)])
def test_fine_tuning_starts_from_an_encoder_of_other_channels_and_patches(
    pretrained, old, new, capsys
):
    workdir, encoder = pretrained[old]
    config = finetune_config(workdir, channels=new, patch_size=(4, 4), image_size=(16, 16))
    task, fresh = fresh_state(config, mesh_of(2, 2, 1))
    state = task.load(checkpoint.find(workdir, "init_from"), fresh)
    said = capsys.readouterr().out
    assert f"patch embedding of 8 x 8 pixels of {old} channel(s) adapted to 4 x 4" in said
    ours = jax.device_get(state.params["encoder"])
    before, after = (
        Pixels(patch, (0.5, 0.4, 0.3)[:n], (0.2, 0.25, 0.3)[:n])
        for patch, n in (((8, 8), old), ((4, 4), new))
    )
    held = encoder["patch_embed"]
    kernel, bias = patch_embed.adapt(held["kernel"], held["bias"], before, after)
    np.testing.assert_allclose(ours["patch_embed"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(ours["patch_embed"]["bias"], bias, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, ours["stack"], encoder["stack"])
    shardings = [
        jax.tree.map(lambda x: x.sharding, s.params["encoder"]["patch_embed"])
        for s in (fresh, state)
    ]
    assert shardings[0] == shardings[1]


def test_what_fits_is_taken_as_it_is_and_nothing_is_said(pretrained, capsys):
    workdir, encoder = pretrained[1]
    found = load_into(finetune_config(workdir), workdir)
    jax.tree.map(np.testing.assert_array_equal, found["patch_embed"], encoder["patch_embed"])
    assert "adapted" not in capsys.readouterr().out


def test_a_probe_starts_from_an_encoder_of_other_channels_and_patches(pretrained, capsys):
    workdir, encoder = pretrained[3]
    changes = {"model.channels": 1, "data.mean": (0.45,), "data.std": (0.25,)}
    config = config_after(pretrained[3], **{"model.patch_size": (4, 4), **changes})
    task = probe_task.make_task(config, sharding.constrain_batch(mesh_of(2, 1, 1)))
    tx, _ = task.optimizer(10, 100)
    state = train.lay_out(task, tx, config, mesh_of(2, 1, 1))[1]()
    loaded = task.load(checkpoint.find(workdir, "init_from"), state).extra["encoder"]
    assert "adapted to 4 x 4 pixels of 1 channel(s)" in capsys.readouterr().out
    assert loaded["patch_embed"]["kernel"].shape == (16, 32)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded["stack"]), encoder["stack"])


def test_channels_that_cannot_be_adapted_are_refused_with_the_way_out(pretrained):
    workdir, _ = pretrained[3]
    config = finetune_config(workdir)
    config.model.channels = 2
    config.data.update(mean=(0.5, 0.5), std=(0.5, 0.5), augment="")
    with pytest.raises(ValueError, match=r"(?s)of 3 channel.*Set config.model.channels to 3 or 1"):
        load_into(config, workdir)


def test_each_channel_needs_its_mean_in_every_task(pretrained):
    config = config_after(pretrained[3], **{"model.channels": 1})
    with pytest.raises(ValueError, match="config.data.mean has 3 numbers for images of 1 channel"):
        probe_task.make_task(config)


# --- what is no checkpoint of an encoder ---


@pytest.mark.parametrize("recipe", [finetune, linprobe], ids=["finetune", "linprobe"])
@pytest.mark.parametrize("kind", ["nothing", "empty folder", "file", "hugging face"])
def test_a_path_that_is_no_checkpoint_is_refused(recipe, kind, tmp_path):
    path = tmp_path / "weights"
    if kind == "file":
        path.write_bytes(b"PK")
    elif kind != "nothing":
        path.mkdir()
    if kind == "hugging face":
        (path / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    file = recipe.__file__
    arg = f"init={path},variant=Ti/16,source=bundled:digits,test=test,batch_size=32"
    argv = [f"--config={file}:{arg}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.train_for=1 steps"]
    with pytest.raises(ValueError) as error:
        command.main(argv)
    assert f"config.init_from='{path}' holds no checkpoint" in str(error.value)
    assert ("mae-jax convert" in str(error.value)) == (kind in ("file", "hugging face"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_checkpoint_without_an_encoder_is_refused_with_what_it_has(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(0, {"params": {"probe": jnp.zeros(3)}, "extra": {"encoder": jnp.zeros(2)}})
    saver.close()
    with pytest.raises(ValueError, match="holds no encoder; its parameters: probe. Name a run"):
        load_into(finetune_config(tmp_path), tmp_path)


# --- labels ---


def folder_of_classes(root, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 20), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return f"folder:{root}"


def folder_config(source, test) -> ConfigDict:
    config = tiny_config()
    config.data.source, config.ema, config.train_for = source, 0.0, "1 steps"
    del config.evals.averaged
    config.evals.accuracy.update(split=test, every="1 steps")
    with config.evals.accuracy.unlocked():
        config.evals.accuracy.of_training_images = True
    return config


def test_a_class_of_one_image_is_trained_on_and_has_no_accuracy_where_it_has_no_image(tmp_path):
    source = folder_of_classes(tmp_path / "images", {"cat": 20, "dog": 20, "rare": 1})
    run = tmp_path / "run"
    for test in ("train[90%:]", "train[:90%]"):
        config = folder_config(source, test)
        task = classify.make_task(config)
        train.fit(config, run / test[6], task, mesh_of(1, 1, 1))
    both = [json.loads((run / x / "results.json").read_text())["per_class"] for x in "9:"]
    assert [row["class"] for row in both[0]] == ["cat", "dog", "rare"]
    assert sorted(rows[2]["images"] for rows in both) == [0, 1]
    assert sorted(str(rows[2]["accuracy"]) for rows in both) in (["0.0", "None"], ["100.0", "None"])


def test_accuracy_on_training_images_is_refused_unless_it_is_meant(tmp_path):
    source = folder_of_classes(tmp_path / "images", {"cat": 20, "dog": 20})
    config = folder_config(source, "train[80%:]")
    task, mesh = classify.make_task(config), mesh_of(1, 1, 1)
    evals.build(config, task.predict, mesh)
    config.evals.accuracy.of_training_images = False
    with pytest.raises(ValueError, match="config.data.split='train' have 8 images in common"):
        evals.build(config, task.predict, mesh)
    config.data.split = "train[:80%]"
    evals.build(config, classify.make_task(config).predict, mesh)


def test_a_class_of_one_image_is_named_where_there_are_too_few(tmp_path):
    source = folder_of_classes(tmp_path / "images", {"cat": 6, "rare": 1})
    config = folder_config(source, "train[50%:]")
    few = dict(
        type="fewshot", every="", source="", split="train[:1]", bank_split="train[1:]", shots=2
    )
    few |= dict(draws=1, feature="pooled", batch_size=8)
    cfg = ConfigDict(few | {"shots": (2,)})
    with pytest.raises(ValueError, match="class 'rare' has 1 .*ask for fewer, or use a larger"):
        fewshot.Evaluator(cfg, config, {"features": lambda *a: {}}, mesh_of(1, 1, 1))


class Unlabelled:
    """Real images, of which the last has the label that tfds gives the test images of ImageNet."""

    num_classes, class_names, ranges = 10, [str(y) for y in range(10)], ()

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 16

    def __getitem__(self, index):
        image = np.full((20, 20, 1), index, np.uint8)
        return {"image": image, "label": self.label if index == 15 else 3, "name": str(index)}


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_stops_fine_tuning_before_an_update(label, monkeypatch, tmp_path):
    monkeypatch.setattr(classify, "open_labelled", lambda *_: Unlabelled(label))
    config = folder_config("bundled:digits", "test[:20]")
    config.evals = {}
    task = classify.make_task(config)
    with pytest.raises(ValueError, match=f"an image has label {label}, and labels go from 0 to 9"):
        train.fit(config, tmp_path, task, mesh_of(1, 1, 1))
    assert not (tmp_path / "metrics.jsonl").exists()
