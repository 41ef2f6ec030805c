"""Encoders of others in our tasks: embed, k-NN, segmentation, fine-tuning, and their table."""

import csv
import json

import numpy as np
import pytest
from official import DATA
from PIL import Image
from segments import IGNORE, write_folder
from tiny import assert_trees_equal, load_encoder_into, run

import mae_jax
from mae_jax.commands import convert, embed, sweep
from mae_jax.configs import encoders, finetune, segment
from mae_jax.data import crops
from mae_jax.data.decode import decode
from mae_jax.interop.open import open_weights
from mae_jax.models import resize

FOLDER = DATA / "encoders"
NAMES = ("dinov2", "dinov2_registers", "dinov3", "pixio")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Workdirs of the encoders, by name."""
    root = tmp_path_factory.mktemp("ours")
    sources = {name: FOLDER / name for name in NAMES} | {"mae": DATA / "hf_vitmae_tiny"}
    for name, source in sources.items():
        assert convert.main([str(source), str(root / name), "--to=ours"]) == 0
    return root


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pairs"))


def test_embed_reads_the_folder_itself(tmp_path):
    images = np.load(FOLDER / "tokens.npz")["images/16x16"]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    out = tmp_path / "out.npy"
    files = [str(tmp_path / f"{i}.png") for i in range(len(images))]
    arguments = [str(FOLDER / "pixio"), *files, f"--out={out}", "--feature=tokens"]
    assert embed.main(arguments) == 0
    pictures = [decode((tmp_path / f"{i}.png").read_bytes()) for i in range(2)]
    images = np.stack([crops.center(picture, (16, 16)) for picture in pictures])
    model, params = mae_jax.load(FOLDER / "pixio")
    np.testing.assert_allclose(np.load(out), model.encode(params, images), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_starts_from_all_of_it(name, ours):
    arg = f"source=bundled:digits,test=test,batch_size=8,init={ours / name}"
    config = finetune.get_config(arg)
    config.mix.group, config.model.image_size = 8, (16, 16)
    found = load_encoder_into(config, ours / name)
    wanted = open_weights(ours / name).params["encoder"]
    assert_trees_equal(found, {key: wanted[key] for key in wanted if key != "norm"})


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers"])
def test_training_at_another_size_resizes_positions_as_loading_does(name, ours):
    config = finetune.get_config(f"source=bundled:digits,test=test,batch_size=8,init={ours / name}")
    config.mix.group, config.model.image_size = 8, (8, 24)
    found = load_encoder_into(config, ours / name)["pos_embed"]
    spec, params, _ = open_weights(FOLDER / name, image_size=(8, 24))
    np.testing.assert_array_equal(found, params["encoder"]["pos_embed"])
    table = open_weights(FOLDER / name).params["encoder"]["pos_embed"]
    other = resize.positions(table, (4, 4), spec.grid, antialias=not spec.encoder.registers)
    assert np.abs(found - other).max() > 0.01  # the contrast: the other way of resizing


@pytest.mark.parametrize(("name", "tuned"), [("dinov3", True), ("pixio", False)])
def test_a_segmentation_trains_on_it(name, tuned, ours, pairs, tmp_path):
    arg = f"init={ours / name},source=segfolder:{pairs},ignore={IGNORE},test=test,recipe=short"
    config = segment.get_config(f"{arg},batch_size=4,finetune={str(tuned).lower()}")
    config.train_for, config.optim.warmup, config.log_every = "2 steps", "1 steps", "1 steps"
    config.evals.segment.update(every="2 steps", batch_size=4)
    config.model.dtype = "float32"
    state = run(config, tmp_path / "run", (1, 1, 1))
    before = open_weights(ours / name).params["encoder"]["patch_embed"]["kernel"]
    after = (state.extra | state.params)["encoder"]["patch_embed"]["kernel"]
    assert np.array_equal(before, after) != tuned
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["settings"][0]["miou"] >= 0


def sweep_of(ours, measure, names, *flags, workdir):
    paths = "+".join(str(ours / name) for name in names)
    arg = f"--config=encoders:init={paths},measure={measure}"
    assert sweep.main([arg + flags[0], *flags[1:], f"--workdir={workdir}"]) == 0
    with open(workdir / "table.csv") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def test_one_command_segments_with_each_and_writes_one_table(ours, pairs, tmp_path):
    names = ("mae", "dinov2_registers", "pixio")
    data = f",source=segfolder:{pairs},ignore={IGNORE},test=test,image_size=24"
    small = ["--config.evals.knn.batch_size=4", "--config.evals.logistic.batch_size=4"]
    rows = sweep_of(ours, "segment_frozen", names, data, *small, workdir=tmp_path)
    assert list(rows) == list(names)
    assert all(0 < float(row["miou_logistic"]) <= 100 for row in rows.values())
    assert len({row["miou_logistic"] for row in rows.values()}) > 1
    for name in names:
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model"]["image_size"] == [24, 24]
        assert config["model"].get("cls_tokens", 1) == (3 if name == "pixio" else 1)
        assert config["model"].get("block", {}).get("registers", 0) == 3 * ("registers" in name)


def test_one_command_classifies_with_each_and_writes_one_table(ours, tmp_path):
    data = ",source=bundled:digits,bank=train[:100],test=test[:20]"
    small = [f"--config.evals.{x}.batch_size=20" for x in ("knn", "logistic", "fewshot")]
    rows = sweep_of(ours, "knn", ("dinov2", "dinov3"), data, *small, workdir=tmp_path)
    assert all(0 <= float(rows[x]["knn1_cls"]) <= 100 for x in ("dinov2", "dinov3"))


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("", "init='': give workdirs"),
        ("init=a/x+b/x", "end in different names"),
        ("init=a,measure=pretrain", "measure='pretrain': give one of knn, segment_frozen"),
        ("init=a,scratch=true", "config argument 'scratch=true'"),
    ],
)
def test_what_cannot_be_compared_is_refused(arg, words):
    with pytest.raises(ValueError, match=words):
        encoders.get_config(arg)
