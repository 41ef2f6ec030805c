"""Starting from another's encoder: other patches and channels, and what cannot be started from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import (
    finetune_config,
    fresh_state,
    load_encoder_into,
    mesh_of,
    probe_of,
    run,
    save_workdir,
    tiny_config,
)

from mae_jax import checkpoint, evals, tasks
from mae_jax.commands import train as command
from mae_jax.configs import finetune, linprobe
from mae_jax.evals import fewshot
from mae_jax.models import resize
from mae_jax.models.patchify import patchify
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.tasks import examples

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def spec_of(patch, mean, std):
    """A network of which the patch embedding alone matters."""
    vit = ViTSpec(width=16, depth=1, heads=1, mlp_width=16)
    return ModelSpec(patch, patch, len(mean), vit, mean=mean, std=std)


RGB = spec_of((8, 8), MEAN, STD)
GREY = spec_of((8, 8), (0.45,), (0.22,))


def kernel_and_bias(spec, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(spec.patch_dim, width)).astype(np.float32), rng.normal(size=width)


def embed(levels_BHWC, spec, kernel, bias):
    normalised = (levels_BHWC - np.array(spec.mean)) / np.array(spec.std)
    return np.asarray(patchify(jnp.asarray(normalised), spec.patch_size)) @ kernel + bias


# --- the arithmetic ---


@pytest.mark.parametrize("old, new", [(RGB, GREY), (GREY, RGB)], ids=["to grey", "to colour"])
def test_grey_images_keep_their_embedding_when_channels_change(old, new):
    kernel, bias = kernel_and_bias(old)
    grey = np.random.default_rng(1).uniform(size=(2, 16, 16, 1))
    before, after = (np.repeat(grey, len(p.mean), 3) for p in (old, new))
    expected = embed(before, old, kernel, bias)
    found = embed(after, new, *resize.patch_embedding(kernel, bias, old, new))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_enlarged_patches_keep_their_embedding():
    old, new = spec_of((4, 6), (0.0,) * 3, (1.0,) * 3), spec_of((7, 12), (0.0,) * 3, (1.0,) * 3)
    kernel, bias = kernel_and_bias(old)
    patches = np.random.default_rng(1).normal(size=(5, 4, 6, 3)).astype(np.float32)
    larger = jax.image.resize(patches, (5, 7, 12, 3), "bilinear")
    expected = embed(patches, old, kernel, bias)
    found = embed(np.asarray(larger), new, *resize.patch_embedding(kernel, bias, old, new))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_of_shrunken_patches_no_kernel_is_nearer():
    """The least squares over many patches of independent pixels, solved without the formula."""
    kernel, _ = kernel_and_bias(spec_of((6, 6), (0.0,), (1.0,)), width=3)
    patches = np.random.default_rng(1).normal(size=(40_000, 6, 6))
    small = np.asarray(jax.image.resize(patches, (40_000, 3, 4), "bilinear"))
    wanted = patches.reshape(len(patches), -1) @ kernel
    solved = np.linalg.lstsq(small.reshape(len(small), -1), wanted, rcond=None)[0]
    found = np.asarray(resize.patch_kernel(jnp.asarray(kernel), (6, 6), (3, 4)))
    assert np.abs(found - solved).max() < 0.03 * np.abs(found).max()
    summed = np.abs(kernel.reshape(3, 2, 6, 3).sum(1)).max()
    assert np.abs(found).max() > 0.3 * summed  # a patch of fewer pixels has larger weights


def test_channels_that_have_nothing_to_do_with_each_other_are_refused():
    four = spec_of((8, 8), (0.5,) * 4, (0.5,) * 4)
    with pytest.raises(ValueError, match="of 3 channels cannot be adapted to 4"):
        resize.patch_embedding(*kernel_and_bias(RGB), RGB, four)


# --- from a checkpoint ---


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Workdir -> a run of no updates, for grey images and for coloured ones; their encoders."""
    runs = {}
    for channels in (1, 3):
        config = tiny_config()
        config.model.channels = channels
        config.data.update(mean=MEAN[:channels], std=STD[:channels])
        task = tasks.build(config)
        params, _ = jax.jit(lambda task=task: task.init(jax.random.key(0)))()
        workdir = tmp_path_factory.mktemp(f"pretrained{channels}")
        save_workdir(config, workdir, {"params": params})
        runs[channels] = workdir, jax.device_get(params["encoder"])
    return runs


def tuning_of(workdir, **model):
    config = finetune_config(f"init={workdir}", **{"image_size": (32, 32), **model})
    channels = config.model.channels
    config.data.update(mean=MEAN[:channels], std=STD[:channels])
    return config


@pytest.mark.parametrize("old, new", [(3, 1), (1, 3)])
def test_fine_tuning_starts_from_an_encoder_of_other_channels_and_patches(
    pretrained, old, new, capsys
):
    workdir, encoder = pretrained[old]
    config = tuning_of(workdir, channels=new, patch_size=(4, 4), image_size=(16, 16))
    task, fresh = fresh_state(config, mesh_of(2, 2, 1))
    state = task.load(checkpoint.find(workdir, "init_from"), fresh)
    said = capsys.readouterr().out
    assert f"patch embedding of 8 x 8 pixels of {old} channel(s) adapted to 4 x 4" in said
    ours = jax.device_get(state.params["encoder"])
    before, after = (
        spec_of(patch, MEAN[:n], STD[:n]) for patch, n in (((8, 8), old), ((4, 4), new))
    )
    held = encoder["patch_embed"]
    kernel, bias = resize.patch_embedding(held["kernel"], held["bias"], before, after)
    np.testing.assert_allclose(ours["patch_embed"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(ours["patch_embed"]["bias"], bias, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, ours["stack"], encoder["stack"])
    shardings = [
        jax.tree.map(lambda x: x.sharding, s.params["encoder"]["patch_embed"])
        for s in (fresh, state)
    ]
    assert shardings[0] == shardings[1]


@pytest.mark.parametrize("depth", [None, 2], ids=["the same decoder", "another decoder"])
def test_pre_training_starts_from_a_network_for_other_patches(pretrained, depth):
    workdir, encoder = pretrained[1]
    config = tiny_config()
    config.model.update(patch_size=(4, 4), decoder_depth=depth or config.model.decoder_depth)
    config.data.update(mean=MEAN[:1], std=STD[:1])
    task, fresh = fresh_state(config, mesh_of(2, 2, 1))
    path = checkpoint.find(workdir, "init_from")
    loaded = task.load(path, fresh).params
    jax.tree.map(np.testing.assert_array_equal, loaded["encoder"]["stack"], encoder["stack"])
    assert loaded["encoder"]["patch_embed"]["kernel"].shape[0] == 16
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(
        lambda x: x.sharding, fresh.params
    )
    if depth:
        jax.tree.map(np.testing.assert_array_equal, loaded["decoder"], fresh.params["decoder"])
        return
    shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), checkpoint.shapes(path))
    saved = checkpoint.restore(path, shapes["params"], ("params",))["decoder"]
    jax.tree.map(np.testing.assert_array_equal, loaded["decoder"]["stack"], saved["stack"])
    predicted_B64 = np.ones((3, saved["pred"]["kernel"].shape[0])) @ saved["pred"]["kernel"]
    smaller_BHW1 = jax.image.resize(predicted_B64.reshape(3, 8, 8, 1), (3, 4, 4, 1), "bilinear")
    ours_B16 = np.ones((3, saved["pred"]["kernel"].shape[0])) @ loaded["decoder"]["pred"]["kernel"]
    np.testing.assert_allclose(ours_B16.reshape(3, 4, 4, 1), smaller_BHW1, atol=1e-5)


def test_what_fits_is_taken_as_it_is_and_nothing_is_said(pretrained, capsys):
    workdir, encoder = pretrained[1]
    found = load_encoder_into(tuning_of(workdir), workdir)
    jax.tree.map(np.testing.assert_array_equal, found["patch_embed"], encoder["patch_embed"])
    assert "adapted" not in capsys.readouterr().out


def test_a_probe_starts_from_an_encoder_of_other_channels_and_patches(pretrained, capsys):
    workdir, encoder = pretrained[3]
    changes = {"model.channels": 1, "data.mean": (0.45,), "data.std": (0.25,)}
    config = probe_of(pretrained[3][0], **{"model.patch_size": (4, 4), **changes})
    task, state = fresh_state(config, mesh_of(2, 1, 1))
    loaded = task.load(checkpoint.find(workdir, "init_from"), state).extra["encoder"]
    assert "adapted to 4 x 4 pixels of 1 channel(s)" in capsys.readouterr().out
    assert loaded["patch_embed"]["kernel"].shape == (16, 32)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded["stack"]), encoder["stack"])


def test_channels_that_cannot_be_adapted_are_refused_with_the_way_out(pretrained):
    workdir, _ = pretrained[3]
    config = tuning_of(workdir)
    config.model.channels = 2
    config.data.update(mean=(0.5, 0.5), std=(0.5, 0.5), augment="")
    with pytest.raises(ValueError, match=r"(?s)of 3 channel.*Set config.model.channels to 3 or 1"):
        load_encoder_into(config, workdir)


def test_each_channel_needs_its_mean_in_every_task(pretrained):
    config = probe_of(pretrained[3][0], **{"model.channels": 1})
    with pytest.raises(ValueError, match="mean has 3 numbers for images of 1 channel"):
        tasks.build(config)


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
        load_encoder_into(tuning_of(tmp_path), tmp_path)


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
    config = finetune_config()
    config.data.source, config.ema, config.train_for = source, 0.0, "1 steps"
    del config.evals.averaged
    config.evals.accuracy.update(split=test, every="1 steps")
    with config.evals.accuracy.unlocked():
        config.evals.accuracy.of_training_images = True
    return config


def test_a_class_of_one_image_is_trained_on_and_has_no_accuracy_where_it_has_no_image(tmp_path):
    source = folder_of_classes(tmp_path / "images", {"cat": 20, "dog": 20, "rare": 1})
    for test in ("train[90%:]", "train[:90%]"):
        config = folder_config(source, test)
        run(config, tmp_path / test[6], (1, 1, 1))
    both = [json.loads((tmp_path / x / "results.json").read_text())["per_class"] for x in "9:"]
    assert [row["class"] for row in both[0]] == ["cat", "dog", "rare"]
    assert sorted(rows[2]["images"] for rows in both) == [0, 1]
    assert sorted(str(rows[2]["accuracy"]) for rows in both) in (["0.0", "None"], ["100.0", "None"])


def test_accuracy_on_training_images_is_refused_unless_it_is_meant(tmp_path):
    source = folder_of_classes(tmp_path / "images", {"cat": 20, "dog": 20})
    config = folder_config(source, "train[80%:]")
    task, mesh = tasks.build(config), mesh_of(1, 1, 1)
    evals.build(config, task.predict(), mesh)
    config.evals.accuracy.of_training_images = False
    with pytest.raises(ValueError, match="config.data.split='train' have 8 images in common"):
        evals.build(config, task.predict(), mesh)
    config.data.split = "train[:80%]"
    evals.build(config, tasks.build(config).predict(), mesh)


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
    monkeypatch.setattr(examples, "open_labelled", lambda *_: Unlabelled(label))
    config = folder_config("bundled:digits", "test[:20]")
    config.evals = {}
    with pytest.raises(ValueError, match=f"an image has label {label}, and labels go from 0 to 9"):
        run(config, tmp_path, (1, 1, 1))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_run_starts_from_another_with_or_without_an_online_probe(before, after, tmp_path):
    task, state = fresh_state(tiny_config(online_probe=before), mesh_of(1, 1, 1))
    workdir = save_workdir(tiny_config(online_probe=before), tmp_path, state)
    config = tiny_config(online_probe=after, seed=1)
    task, fresh = fresh_state(config, mesh_of(1, 1, 1))
    loaded = task.load(checkpoint.find(workdir, "init_from"), fresh)
    for side in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, loaded.params[side], state.params[side])
    assert ("online" in loaded.params) == after
