"""`mae-jax visualize` of a run of segmentation draws what the run predicts."""

import json

import numpy as np
import pytest
from PIL import Image
from segments import small, write_folder
from tiny import fresh_state, mesh_of, run, save_workdir

from mae_jax import evals, tasks
from mae_jax.commands import convert, visualize
from mae_jax.configs import segment as recipe
from mae_jax.errors import UserError
from mae_jax.evals import segment_figures
from mae_jax.interop.open import open_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    root = write_folder(place / "data", train=16, test=3)
    config = small(recipe.get_config("test=test,variant=B/16,recipe=short,batch_size=8"), root)
    config.head.layers, config.data.workers, config.data.distort = "last", 0, False
    config.train_for, config.optim.warmup, config.optim.blr = "20 steps", "1 steps", 0.5
    config.evals.segment.every = config.checkpoint.every = "20 steps"
    return config, place, run(config, place / "run", (1, 1, 1))


def draw(place, out, *images, **flags):
    flags = [f"--{name}={value}" for name, value in flags.items()]
    argv = [str(place / "run"), *images, f"--out={place / out}", *flags]
    assert visualize.main(argv) == 0
    return {x.name: np.asarray(Image.open(x)) for x in (place / out).iterdir()}


def test_the_pictures_are_those_of_the_evaluation(trained):
    config, place, state = trained
    pictures = draw(place, "pairs", f"segfolder:{place / 'data'}", split="test")
    assert sorted(pictures) == ["00-test00.png", "01-test01.png", "02-test02.png", "sheet.png"]
    task = tasks.build(config)
    mesh = mesh_of(1, 1, 1)
    report = evals.build(config, task.predict(), mesh)["segment"].run(state)
    evaluated, drawn = report.images["segment"], pictures["sheet.png"]
    width = min(evaluated.shape[1], drawn.shape[1])
    rows = slice(25, 25 + 2 * 120)  # of images; captions differ
    np.testing.assert_array_equal(evaluated[rows, :width], drawn[rows, :width])


def test_images_without_a_truth_have_a_prediction_and_no_error(trained):
    _, place, _ = trained
    file = place / "data/test/images/test01.png"
    pictures = draw(place, "plain", str(file), limit=1)
    assert sorted(pictures) == ["00-test01.png", "sheet.png"]
    red = (pictures["sheet.png"] == np.array(segment_figures.WRONG)).all(-1)
    assert not red.any()


def test_names_of_classes_come_from_the_run_or_are_numbers_when_its_data_are_gone(trained):
    _, place, _ = trained
    (place / "data/classes.txt").rename(place / "classes.txt")
    try:
        saved = json.loads((place / "run/config.json").read_text())
        assert saved["data"]["classes"] == 0
        file = place / "data/test/images/test01.png"
        assert "sheet.png" in draw(place, "nameless", str(file))
    finally:
        (place / "classes.txt").rename(place / "data/classes.txt")


def test_an_image_that_cannot_be_read_is_refused_and_leaves_nothing(trained):
    _, place, _ = trained
    (place / "broken.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        draw(place, "new", str(place / "broken.png"))
    with pytest.raises(UserError, match="run of segmentation.*leave out --pca, --neighbours"):
        draw(place, "new", str(place / "broken.png"), pca=True, neighbours="nowhere.png")
    assert not (place / "new").exists()


@pytest.mark.parametrize("layers", ["last", "1,2"])
def test_of_a_fine_tuned_run_the_encoder_is_loaded_and_its_head_of_patches_left_out(
    layers, trained, tmp_path
):
    arg = "test=test,variant=B/16,recipe=short,batch_size=8,finetune=true"
    config = small(recipe.get_config(arg), trained[1] / "data")
    config.head.layers = layers
    _, state = fresh_state(config, mesh_of(1, 1, 1))
    weights = open_weights(save_workdir(config, tmp_path / "run", state))
    assert "left out: the head of the segmentation" in weights.report
    assert weights.spec.classes == 0 and weights.params.keys() == {"encoder"}
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to=hf"]) == 0
    saved = json.loads((tmp_path / "hf/config.json").read_text())
    assert saved["architectures"] == ["ViTModel"]


def test_each_class_has_a_colour_of_its_own_and_a_legend_names_those_that_occur():
    table = segment_figures.colours(20)
    assert len(np.unique(table[:20], axis=0)) == 20 and (table[20:] == segment_figures.GREY).all()
    names = [f"class {i}" for i in range(20)]
    few, many = (segment_figures.legend(names, range(n), 400) for n in (2, 20))
    assert few.shape[1] == many.shape[1] == 400 and many.shape[0] > few.shape[0]
