"""Segmentation without training: exact counts, scikit-learn's neighbours and classifiers."""

import json

import jax
import numpy as np
import pytest
from segments import CLASSES, write_folder
from segments import small as shrink
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from tiny import fresh_state, mesh_of, run, task_on, tiny_config

from mae_jax import evals
from mae_jax.configs import segment_frozen as recipe
from mae_jax.data import segmentation
from mae_jax.data.label_maps import IGNORED
from mae_jax.errors import UserError
from mae_jax.evals import iou, logistic, patch_knn, patches
from mae_jax.metrics import summary
from mae_jax.models.patchify import patchify

NAMES = list(CLASSES)


# --- counts ---


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_scikit_learns_jaccard_score_over_all_pixels(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 7, (4, 20, 30)).astype(np.uint8)  # no class 7, 8 and 9
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 9, truth.shape))
    truth[rng.random(truth.shape) < 0.2] = IGNORED
    counts = sum(iou.confusion(x, y, 10) for x, y in zip(truth, predicted, strict=True))
    scores, kept = iou.Scores.of(counts), truth != IGNORED
    each = jaccard_score(truth[kept], predicted[kept], labels=range(9), average=None)
    np.testing.assert_allclose(scores.iou_Y[:9], each)
    assert np.isnan(scores.iou_Y[9])
    assert scores.miou == pytest.approx(
        jaccard_score(truth[kept], predicted[kept], average="macro")
    )
    assert scores.pixel_accuracy == (truth == predicted)[kept].mean()


def test_a_pixel_that_is_taken_for_none_is_wrong_and_hurts_no_other_class():
    truth = np.array([0, 0, 1, 1], np.uint8)
    scores = iou.Scores.of(iou.confusion(truth, np.array([0, IGNORED, 1, 1], np.uint8), 2))
    assert scores.iou_Y.tolist() == [0.5, 1.0] and scores.pixel_accuracy == 0.75


def test_maps_without_a_class_at_all_are_refused():
    with pytest.raises(UserError, match="no pixel of the images .*config.data.ignore"):
        iou.Scores.of(iou.confusion(np.full(9, IGNORED, np.uint8), np.zeros(9, int), 3))


# --- neighbours and their blocks ---


def bank_of(rng, batches=3, rows=16, width=6, pixels=4, ignored=0.1):
    """Patches with labels that go with their features, some of them without a class."""
    x = rng.normal(size=(batches, rows, width)).astype(np.float32)
    block = (
        (x[..., :1] > 0).astype(int)
        + (x[..., 1:2] > 0)
        + (rng.random((batches, rows, pixels)) < 0.3)
    )
    block = np.where(rng.random(block.shape) < ignored, IGNORED, block).astype(np.uint8)
    label = patches.majority(block.reshape(-1, pixels)).reshape(batches, rows)
    return patches.Patches(x, block, label, np.asarray(label) != IGNORED)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_every_pixel_has_the_mode_of_scikit_learns_neighbours(distance, shape):
    rng = np.random.default_rng(0)
    bank = bank_of(rng, ignored=0)
    query = rng.normal(size=(5, 4, 6)).astype(np.float32)
    found = patch_knn.predict(query, bank, ks=(1, 3, 7), distance=distance, mesh=mesh_of(*shape))
    x, block = np.asarray(bank.x).reshape(-1, 6), np.asarray(bank.pixels).reshape(-1, 4)
    metric = {"l2": "euclidean"}.get(distance, distance)
    for k, ours in zip((1, 3, 7), found, strict=True):
        model = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x, block)
        np.testing.assert_array_equal(ours.reshape(-1, 4), model.predict(query.reshape(-1, 6)))


def test_the_distances_differ():
    rng = np.random.default_rng(1)
    bank, query = bank_of(rng, width=2), rng.normal(size=(5, 4, 2)).astype(np.float32)
    one, other = (
        patch_knn.predict(query, bank, ks=(1,), distance=distance, mesh=mesh_of(1, 1, 1))
        for distance in patch_knn.DISTANCES
    )
    assert (np.asarray(one) != np.asarray(other)).any()


def test_pixels_without_a_class_have_no_vote_and_whole_patches_fill_the_gap():
    gap = IGNORED
    votes = np.array([[[2, 1, gap], [gap, 0, gap], [2, 1, gap], [0, 0, gap]]], np.uint8)
    assert patch_knn.mode(votes).tolist() == [[2, 0, gap]]  # of 1 and 0, twice each, the lower
    bank = patches.Patches(
        np.eye(2, dtype=np.float32)[None], np.array([[[1, 1, gap], [0, 0, 0]]], np.uint8),
        np.array([[1, 0]]), np.array([[True, True]]),
    )  # fmt: skip
    query = np.array([[[2.0, 0.1]]], np.float32)
    found = patch_knn.predict(query, bank, ks=(1,), distance="cosine", mesh=mesh_of(1, 1, 1))
    assert found.tolist() == [[[[1, 1, 1]]]]


def test_patches_that_do_not_count_are_nobodys_neighbours():
    rng = np.random.default_rng(0)
    bank, query = bank_of(rng), rng.normal(size=(3, 4, 6)).astype(np.float32)
    kept = np.asarray(bank.counted) & (rng.random((3, 16)) < 0.5)
    some = bank._replace(counted=kept)
    fewer = patches.Patches(*(np.asarray(x)[kept][None] for x in some))
    found = [
        patch_knn.predict(query, x, ks=(1, 5), distance="l2", mesh=mesh_of(1, 1, 1))
        for x in (some, fewer)
    ]
    np.testing.assert_array_equal(*found)


def test_the_label_of_a_patch_is_its_most_frequent_class_and_of_equal_ones_the_lowest():
    blocks = np.array([[3, 3, 1, 0], [5, 2, 2, 5], [IGNORED, IGNORED, IGNORED, 1], [7, 7, 7, 7]])
    assert patches.majority(blocks.astype(np.uint8)).tolist() == [3, 2, IGNORED, 7]


# --- as evaluators ---


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pairs"), train=14, test=5)


def config_of(root, **changes):
    config = shrink(recipe.get_config("bank=train,test=test,variant=B/16"), root)
    config.evals.knn.ks = (1, 5)
    for cfg in config.evals.values():
        cfg.update({key: value for key, value in changes.items() if key in cfg})
    return config


@pytest.fixture(scope="module")
def state(root):
    return jax.device_get(fresh_state(config_of(root), mesh_of(1, 1, 1))[1])


def evaluate(config, state, name, shape=(1, 1, 1)):
    mesh = mesh_of(*shape)
    return evals.build(config, task_on(config, mesh).predict(), mesh)[name].run(state)


def table(root, state, split, block):
    """Features (N, D) and blocks (N, E) of a split, by hand."""
    config = config_of(root)
    task = task_on(config, mesh_of(1, 1, 1))
    reader = patches.Reader(config.evals.knn, config, task.predict(), mesh_of(1, 1, 1))
    source = {"train": reader.bank_source, "test": reader.queries}[split]
    pairs = [source[i] for i in range(len(source))]
    images = np.stack([np.asarray(record["map"]) for record in pairs])
    seen = np.stack([segmentation.read(source, i, 1, np.uint8).image for i in range(len(source))])
    x = task.patch_features(state.params, state.extra, {"image": seen}, block)
    blocks = np.asarray(patchify(images[..., None], (8, 8)))
    return np.asarray(x).reshape(-1, 32), blocks.reshape(-1, 64)


def jaccard(truth, predicted):
    kept = truth != IGNORED
    return 100 * jaccard_score(truth[kept], predicted[kept], average="macro")


@pytest.mark.parametrize("block", [1, 2])
def test_knn_has_the_mean_of_scikit_learn_on_standardised_features(root, state, block):
    (x, blocks), (query, truth) = (table(root, state, split, block) for split in ("train", "test"))
    label = np.asarray(patches.majority(blocks))
    mean, std = x[label != IGNORED].mean(0), x[label != IGNORED].std(0)
    found = evaluate(config_of(root, layers="all"), state, "knn").scalars
    for k in (1, 5):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        near = model.fit((x - mean) / std, label).kneighbors((query - mean) / std)[1]
        predicted = np.asarray(patch_knn.mode(blocks[near]))
        whole = np.asarray(patch_knn.mode(label[near][..., None].astype(np.uint8)))
        predicted = np.where(predicted == IGNORED, whole, predicted)
        ours = found[f"eval/miou_knn{k}_cosine_block{block}"]
        assert ours == pytest.approx(jaccard(truth, predicted), abs=0.3)  # rounding at ties
    if block == 2:
        assert found["eval/miou_knn1_cosine"] == found["eval/miou_knn1_cosine_block2"]


def test_the_logistic_regression_has_the_mean_of_scikit_learn(root, state):
    (x, blocks), (query, truth) = (table(root, state, split, 2) for split in ("train", "test"))
    label = np.asarray(patches.majority(blocks))
    kept = label != IGNORED
    mean, std = x[kept].mean(0), x[kept].std(0)
    z = (x - mean) / std
    held = logistic.hold_out(14, (1, 14)).repeat(12, 1)[0]

    def model(strength, rows):
        fitted = LogisticRegression(C=1 / (rows.sum() * strength), tol=1e-7, max_iter=5000)
        return fitted.fit(z[rows], label[rows])

    def left_out(strength):
        log = model(strength, kept & ~held).predict_log_proba(z[kept & held])
        return -log[np.arange(len(log)), label[kept & held]].mean()

    losses = [left_out(strength) for strength in logistic.STRENGTHS]
    rising = next((i for i in range(1, 7) if losses[i] >= losses[i - 1]), 7)
    best = model(logistic.STRENGTHS[rising - 1], kept)
    predicted = best.predict((query - mean) / std)[:, None].repeat(64, 1)
    found = evaluate(config_of(root), state, "logistic").scalars["eval/miou_logistic"]
    assert found == pytest.approx(jaccard(truth, predicted), abs=1.0)  # a patch of 60
    assert found > 60


@pytest.mark.parametrize("name", ["knn", "logistic"])
def test_the_numbers_are_the_same_on_any_mesh_and_with_padding(root, state, name):
    one = evaluate(config_of(root, layers="all"), state, name)
    many = evaluate(config_of(root, layers="all", batch_size=3), state, name, (8, 1, 1))
    assert one.scalars == many.scalars
    some = evaluate(config_of(root, layers="all", batch_size=4), state, name, (2, 2, 2))
    assert one.scalars == some.scalars


def test_half_precision_in_the_bank_changes_little(root, state):
    whole, half = (
        evaluate(config_of(root, bank_dtype=x), state, "knn").scalars for x in patch_knn.DTYPES[:2]
    )
    for key, number in whole.items():
        assert half[key] == pytest.approx(number, abs=3)


def test_a_run_of_the_recipe_writes_tables_pictures_and_says_what_was_measured(root, tmp_path):
    config = config_of(root)
    run(config, tmp_path, (1, 1, 1))
    results = json.loads((tmp_path / "results_patch_knn.json").read_text())
    assert results["label_resolution"] == [24, 32] and results["images"] == 5
    assert [row["class"] for row in results["per_class"]] == NAMES
    assert [row["setting"] for row in results["settings"]] == [
        "knn1_cosine", "knn5_cosine", "knn1_l2", "knn5_l2"
    ]  # fmt: skip
    iou_of = [row["iou"]["knn5_l2"] for row in results["per_class"]]
    assert results["settings"][3]["miou"] == pytest.approx(np.mean(iou_of), abs=0.01)
    for name in ("results_patch_knn.png", "results_patch_logistic.json"):
        assert (tmp_path / name).stat().st_size > 100
    pictures = [x.name for x in (tmp_path / "images").rglob("*.png")]
    assert any("patch_knn" in x for x in pictures) and any("patch_logistic" in x for x in pictures)
    line = summary.evaluations({"eval/miou_knn1_l2": 12.3, "eval/logistic_best_block": 3})
    assert [x.split()[1:] for x in line] == [["12.30", "%"], ["3"]]


def test_pre_training_can_measure_it_too(root, tmp_path):
    config = tiny_config()
    config.model.update(image_size=(24, 32))
    cfg = recipe.get_config("test=test,variant=B/16").evals.logistic
    with config.unlocked():
        config.evals = {"patches": cfg.to_dict() | {"classes": 0, "ignore": 9, "shift": False}}
    config.evals.patches.update(source=f"segfolder:{root}", batch_size=8)
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    found = evals.build(config, task.predict(), mesh_of(1, 1, 1))["patches"].run(state)
    assert found.scalars["eval/miou_logistic"] > 50


def test_pixels_are_a_baseline(root, state):
    config = config_of(root)
    config.features = "pixels"
    bare = fresh_state(config, mesh_of(1, 1, 1))[1]
    assert evaluate(config, bare, "knn").scalars["eval/miou_knn1_l2"] > 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ks=(1, 200)), r"ks=\(1, 200\).*which has 168 patches"),
        (dict(distances="cosine,l3"), "'l3' is none of cosine, l2"),
        (dict(bank_dtype="int8"), "bank_dtype='int8'"),
        (dict(layers="3"), "layers='3'.*from 1 to 2"),
        (dict(bank_split="test"), "have 5 images in common"),
        (dict(split="valid"), "split 'validation'"),
        (dict(source="bundled:digits"), "no label maps"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_run(root, changes, message):
    config = config_of(root, **changes)
    with pytest.raises(UserError, match=message):
        evals.build(config, task_on(config, mesh_of(1, 1, 1)).predict(), mesh_of(1, 1, 1))
