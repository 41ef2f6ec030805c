"""What an evaluation writes: tables counted by hand, the figure, the same on any devices."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import mesh_of, probe_config, tiny_config

from mae_jax.data import eval_pipeline
from mae_jax.data.labels import open_labelled
from mae_jax.evals import accuracy, probe, results
from mae_jax.metrics import summary

STATE = SimpleNamespace(params={}, extra={})


def predictions_of(label, predicted, confidence=0.5):
    label, predicted = np.array(label), np.array(predicted)
    wrong = (label != predicted).astype(int)
    confidence = np.broadcast_to(confidence, label.shape)
    return results.Predictions(label, predicted, wrong, confidence, wrong * 1.0)


def tables_of(*prediction, names="abcde"):
    return results.tables(predictions_of(*prediction), list(names))


def write(workdir, report, **facts):
    """Write the files of a report as a run does, in their order."""
    for name, content in report.files.items():
        (workdir / name).write_bytes(content(facts))


# --- numbers ---


def test_what_is_predicted_and_how_surely_are_those_of_a_softmax():
    logits = np.array([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0], [np.nan, 1.0, 2.0]])
    found = results.measure(logits, np.array([2, 1, 2]))
    np.testing.assert_array_equal(found.predicted_N, [1, 0, -1])  # the first of equal ones
    np.testing.assert_array_equal(found.rank_N, [1, 1, 3])
    expected = [np.exp(3) / np.exp([1, 3, 2]).sum(), 1 / (2 + np.exp(-1))]
    np.testing.assert_allclose(found.confidence_N[:2], expected)
    assert np.isnan(found.confidence_N[2]) and np.isnan(found.loss_N[2])


def test_an_image_is_right_exactly_when_its_rank_is_the_first():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (500, 6)).astype(float)  # many equal ones
    logits[::7, 2] = np.nan
    found = results.measure(logits, rng.integers(0, 6, 500))
    np.testing.assert_array_equal(found.predicted_N == found.label_N, found.rank_N == 0)


def test_the_tables_are_those_counted_by_hand():
    names = ["cat", "dog", "eel", "fox"]
    report = tables_of([0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 1, 0, 2, -1], names=names)
    assert report["top1"] == pytest.approx(100 * 3 / 8) and "top5" not in report
    assert report["per_class"] == [
        {"class": "cat", "images": 4, "right": 1, "accuracy": 25.0},
        {"class": "dog", "images": 2, "right": 1, "accuracy": 50.0},
        {"class": "eel", "images": 2, "right": 1, "accuracy": 50.0},
        {"class": "fox", "images": 0, "right": 0, "accuracy": None},
    ]
    assert report["confusions"] == [
        {"class": "cat", "taken_for": "dog", "images": 2, "percent_of_class": 50.0},
        {"class": "cat", "taken_for": "eel", "images": 1, "percent_of_class": 25.0},
        {"class": "dog", "taken_for": "cat", "images": 1, "percent_of_class": 50.0},
    ]


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy():
    """Two bins: 0.9 sure and right in half of 4, 0.3 sure and right in one of 1."""
    confidence = [0.91, 0.89, 0.9, 0.9, 0.3]
    report = tables_of([0, 0, 0, 0, 0], [0, 0, 1, 1, 0], confidence)
    first, second = report["reliability"]
    assert (first["images"], first["confidence"], first["accuracy"]) == (1, 30.0, 100.0)
    assert (second["images"], second["confidence"], second["accuracy"]) == (4, 90.0, 50.0)
    assert second["from"] < 89 and second["to"] > 91
    assert report["expected_calibration_error"] == pytest.approx((4 * 40 + 1 * 70) / 5)


def test_every_confidence_is_in_one_bin_with_its_upper_edge():
    edges = np.arange(16) / 15
    bins = results.reliability(edges, np.ones(16, bool))
    assert [bin["images"] for bin in bins] == [2] + [1] * 14
    assert not results.reliability(np.array([np.nan]), np.array([False]))


def test_the_worst_classes_come_first_and_those_without_images_not_at_all():
    rows = tables_of([0, 0, 1, 1, 2, 2, 2, 4], [0, 0, 1, 0, 0, 0, 2, 0])["per_class"]
    assert "".join(row["class"] for row in results.worst(rows, count=3)) == "ecb"
    assert "".join(row["class"] for row in results.worst(rows)) == "ecba"


# --- files ---


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_figure_is_drawn_for_any_number_of_classes(tmp_path, classes):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, 3000)
    logits = rng.normal(size=(3000, classes))
    logits[np.arange(3000), label] += 2
    logits[0] = np.nan
    names = [f"a class $1_$2 with quite a long name, number {y}" for y in range(classes)]
    found = results.measure(logits, label)
    write(tmp_path, results.report("eval_averaged", {}, {}, found, names), step=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results_averaged.json", "results_averaged.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "results_averaged.png") as picture:
        assert picture.width == 880 and 200 <= picture.height <= 800
    text = (tmp_path / "results_averaged.json").read_text()
    written = json.loads(text, parse_constant=pytest.fail)  # no NaN
    assert written["loss"] is None and written["step"] == 7
    assert len(written["per_class"]) == classes and len(text.splitlines()) < classes + 100


def test_names_in_the_figure_are_no_formulas(monkeypatch):
    from matplotlib import mathtext

    monkeypatch.setattr(mathtext.MathTextParser, "parse", lambda *a: pytest.fail("a formula"))
    names = [f"$1_$5 {y}" for y in range(3)]
    found = {"source": "$a_$b", **tables_of([0, 1, 2], [1, 2, 0], names=names)}
    assert results.figure(found).startswith(b"\x89PNG")


def test_the_tables_are_there_even_if_the_figure_cannot_be_drawn(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(results, "figure", fail)
    with pytest.raises(RuntimeError, match="no font"):
        write(tmp_path, results.report("eval", {}, {}, predictions_of([0], [1]), "ab"), step=7)
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 7


def test_the_summary_of_a_run_names_the_tables(tmp_path):
    write(tmp_path, results.report("eval", {}, {}, predictions_of([0, 1], [0, 0]), "ab"), step=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/top1": 50.0, "eval/images": 2}\n')
    text = "\n".join(summary.lines(str(tmp_path), own_images=False))
    assert f"{tmp_path}/results.json, and drawn in results.png" in text


# --- evaluators ---


def logits_of_a_pixel(params, extra, batch):
    pixel_B = batch["image"][:, 16, 16, 0].astype(jnp.float32)
    return jnp.sin(pixel_B[:, None] * (1 + jnp.arange(10)))


def evaluate(config, shape, batch_size):
    """Return the scalars and the results.json of an evaluator."""
    name, module, logits = (
        ("probe", probe, lambda *a: jnp.stack([logits_of_a_pixel(*a), -logits_of_a_pixel(*a)], 1))
        if config.task == "probe"
        else ("accuracy", accuracy, logits_of_a_pixel)
    )
    cfg = config.evals[name]
    cfg.batch_size = batch_size
    report = module.Evaluator(cfg, config, {"logits": logits}, mesh_of(*shape)).run(STATE)
    return dict(report.scalars), json.loads(report.files["results.json"]({}))


def accuracy_config():
    config = tiny_config()
    config.evals.accuracy = dict(type="accuracy", every="", source="", split="test[:100]")
    return config


def test_tables_are_the_same_on_any_mesh_and_for_any_batch_size():
    alone = evaluate(accuracy_config(), (1, 1, 1), 100)
    for shape, batch_size in [((8, 1, 1), 16), ((2, 2, 2), 7)]:
        assert evaluate(accuracy_config(), shape, batch_size) == alone
    scalars, written = alone
    about = {"source": "bundled:digits", "split": "test[:100]", "predict": "logits"}
    assert about.items() <= written.items()
    for key in ("top1", "top5", "loss", "images"):
        assert scalars[f"eval/{key}"] == written[key]
    source = open_labelled("bundled:digits", "test[:100]", "")
    shown = dict(batch_size=100, image_size=(32, 32), channels=1)
    (batch,) = eval_pipeline.eval_batches(source, **shown)
    guess = np.asarray(logits_of_a_pixel({}, {}, batch)).argmax(1)
    for y, row in enumerate(written["per_class"]):
        of_class = batch["label"] == y
        assert (row["images"], row["right"]) == (of_class.sum(), (guess == y)[of_class].sum())
    assert sum(row["images"] for row in written["confusions"]) == (guess != batch["label"]).sum()


def test_the_tables_of_a_probe_are_those_of_its_best_rate():
    config = probe_config(**{"optim.sweep": (0.5,)})
    config.evals.probe.split = "test[:100]"
    scalars, written = evaluate(config, (1, 1, 1), 100)
    assert written["blr"] == scalars["eval/best_blr"] and written["chosen_on"] == "train[80%:]"
    assert written["top1"] == scalars["eval/best_top1"]
    config.optim.sweep = ()
    scalars, written = evaluate(config, (2, 1, 1), 16)
    assert written["blr"] == 0.1 and written["top1"] == scalars["eval/top1"]
