"""k-NN is that of brute force, few-shot that of the normal equations, on any mesh."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import fresh_state, mesh_of, task_on, tiny_config

from mae_jax import evals
from mae_jax.data import labels
from mae_jax.data.sources import open_source
from mae_jax.evals import features, fewshot, knn

MESHES = [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)]


def random_bank(batches=3, rows=16, width=5, classes=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batches, rows, width)).astype(np.float32)
    x[1, 3] = x[0, 2] = x[2, 9] = x[0, 11]  # ties, which the order in the bank decides
    label = rng.integers(0, classes, (batches, rows)).astype(np.int32)
    counted = rng.random((batches, rows)) < 0.8
    for number, place in enumerate([(0, 2), (0, 11), (1, 3), (2, 9)]):
        label[place], counted[place] = number, True
    return features.Features(x, label, counted)


def table(config, predict, state, split, feature="cls", batch_size=16):
    """Features and labels of the readable images of a split, on one device."""
    compute = features.feature_of(predict, feature)
    extractor = features.Extractor(config, compute, mesh_of(1, 1, 1), batch_size=batch_size)
    return extractor.table(state, open_source(config.data.source, split))


def brute_force(query, bank, k):
    """Similarities and labels of the k nearest, by a stable sort of all similarities."""
    x = bank.x[bank.counted].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    similarity = np.round(query @ x.T, 6)  # equal rows are equally similar
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), bank.label[bank.counted][order]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 30])
def test_neighbours_are_those_of_brute_force(shape, k):
    bank, query = random_bank(), np.random.default_rng(1).normal(size=(11, 5)).astype(np.float32)
    query[0] = bank.x[0, 2]
    found = jax.jit(lambda q, b: knn.neighbours(q, b, k, mesh_of(*shape)))(query, bank)
    similarity, label = brute_force(query, bank, k)
    np.testing.assert_allclose(found[0], similarity, atol=2e-6)
    np.testing.assert_array_equal(found[1], label)


def test_classes_without_names_are_numbers():
    assert labels.names(SimpleNamespace(class_names=None, num_classes=3)) == ["0", "1", "2"]
    assert labels.names(SimpleNamespace(class_names=["a"], num_classes=1)) == ["a"]


def test_votes_are_weighted_by_similarity():
    similarity = np.array([[0.9, 0.5, 0.5, 0.5]])
    label = np.array([[2, 1, 1, 1]])
    assert knn.vote(similarity, label, 3, temperature=0.07) == 2  # exp(0.4 / 0.07) > 3
    assert knn.vote(similarity, label, 3, temperature=10.0) == 1
    assert knn.vote(np.array([[0.5, 0.5]]), np.array([[2, 1]]), 3, 0.07) == 1
    assert knn.vote(similarity - 0.8, label, 3, temperature=1e-4) == 2  # exp(-9000) is 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)], ids=str)
def test_features_that_are_not_finite_have_no_vote_and_as_queries_are_wrong(shape):
    """A model that sees nothing but an image's mean, and no number in those that are bright."""
    config = config_of(ks=(1,), batch_size=16)
    few = config.evals.fewshot.to_dict() | {"shots": (3,), "draws": 1}
    del config.evals.fewshot

    def features_of(bound):
        def compute(params, extra, batch):
            mean_B = batch["image"].astype(jnp.float32).mean((1, 2, 3))
            corner_B = batch["image"][:, 8, 12, 0].astype(jnp.float32)
            x_BD = jnp.stack([mean_B, corner_B], 1)
            return {"cls": jnp.where((mean_B > bound)[:, None], jnp.nan, x_BD)}

        return compute

    def run(bound, name="eval/knn1_cls"):
        predict = {"features": features_of(bound)}
        (evaluator,) = evals.build(config, predict, mesh_of(*shape)).values()
        return evaluator.run(SimpleNamespace(params={}, extra={})).scalars[name]

    state = SimpleNamespace(params={}, extra={})
    x, label = table(config, {"features": features_of(85)}, state, "test[:50]")
    bank_x, bank_label = table(config, {"features": features_of(85)}, state, "train[:70]")
    finite, bank_finite = np.isfinite(x).all(1), np.isfinite(bank_x).all(1)
    assert 0 < finite.sum() < 50 and 0 < bank_finite.sum() < 70
    _, near = brute_force(x[finite], features.Features(bank_x, bank_label, bank_finite), 1)
    assert run(85) == 100 * (near[:, 0] == label[finite]).sum() / 50
    with pytest.raises(ValueError, match="has 0 images .*features of 70 more are not finite"):
        run(-1)

    config.evals = ConfigDict({"fewshot": few})
    drawn = fewshot.draw_per_class(open_source("bundled:digits", "train[:70]"), 3, 1, seed=0)
    x, label = table(config, {"features": features_of(100)}, state, "test[:50]")
    bank_x, bank_label = table(config, {"features": features_of(100)}, state, "train[:70]")
    few_x, few_label = bank_x[drawn.indices], bank_label[drawn.indices]
    finite, few_finite = np.isfinite(x).all(1), np.isfinite(few_x).all(1)
    assert not few_finite.all() and len(set(few_label[few_finite])) == 10
    ridge = fewshot.fit_ridge(few_x[few_finite], few_label[few_finite], 10)
    right = (ridge.predict(x) == label)[finite].sum()
    assert run(100, "eval/fewshot3_cls") == pytest.approx(100 * right / 50)
    with pytest.raises(ValueError, match="no features of the images that were drawn .*are finite"):
        run(-1, "eval/fewshot3_cls")


# --- few-shot ---


def test_ridge_is_the_solution_of_the_normal_equations():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(30, 6)) * 4 + 1, rng.integers(0, 3, 30)
    ridge = fewshot.fit_ridge(x, label, 3)
    z = (x - x.mean(0)) / x.std(0)
    design = np.concatenate([z, np.ones((30, 1))], 1)
    penalty = ridge.penalty * np.diag([1] * 6 + [0])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ np.eye(3)[label])
    np.testing.assert_allclose(ridge.weight, solution[:6], atol=1e-9)
    np.testing.assert_allclose(ridge.bias, solution[6], atol=1e-9)


def test_the_penalty_is_the_one_with_the_least_error_of_images_left_out():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 24)
    x = np.eye(3)[label] @ rng.normal(size=(3, 40)) + 2 * rng.normal(size=(24, 40))
    z = (x - x.mean(0)) / x.std(0)
    largest = np.linalg.norm(z, 2) ** 2
    errors = {}
    for factor in fewshot.PENALTIES:
        total = 0.0
        for i in range(24):
            rest = np.arange(24) != i
            mean = z[rest].mean(0)
            bias = np.eye(3)[label[rest]].mean(0)
            centred = z[rest] - mean
            weight = np.linalg.solve(
                centred.T @ centred + factor * largest * np.eye(40),
                centred.T @ (np.eye(3)[label[rest]] - bias),
            )
            total += np.square(np.eye(3)[label[i]] - bias - (z[i] - mean) @ weight).sum()
        errors[factor] = total
    chosen = fewshot.fit_ridge(x, label, 3).penalty / largest
    assert chosen == pytest.approx(min(errors, key=errors.get))


def test_classes_are_drawn_alike_and_a_class_with_too_few_is_named():
    source = open_source("bundled:digits", "train")
    few = fewshot.draw_per_class(source, 3, 1, seed=0)
    assert [few[i]["label"] for i in range(30)] == list(np.repeat(np.arange(10), 3))
    other = fewshot.draw_per_class(source, 3, 1, seed=1)
    assert set(few.indices) != set(other.indices)
    with pytest.raises(ValueError, match="500 images of each class.*'0' has 1"):
        fewshot.draw_per_class(source, 500, 1, seed=0)


# --- as evaluators ---


def config_of(**changes) -> ConfigDict:
    config = tiny_config()
    common = dict(source="", split="test[:50]", bank_split="train[:70]", feature="cls", every="")
    with config.unlocked():
        config.evals = dict(
            knn=common | dict(type="knn", ks=(1, 5), temperature=0.07, batch_size=16),
            fewshot=common | dict(type="fewshot", shots=(2,), draws=2, batch_size=16),
        )
        for name in config.evals:
            config.evals[name].update({k: v for k, v in changes.items() if k in config.evals[name]})
        config.data.update({k: v for k, v in changes.items() if k == "source"})
    return config


@pytest.fixture(scope="module")
def state():
    return jax.device_get(fresh_state(tiny_config(), mesh_of(1, 1, 1))[1])


@pytest.fixture(scope="module")
def predict():
    return task_on(tiny_config(), mesh_of(1, 1, 1)).predict()


def evaluate(state, config, shape=(1, 1, 1)):
    mesh = mesh_of(*shape)
    evaluators = evals.build(config, task_on(config, mesh).predict(), mesh)
    return {k: v for x in evaluators.values() for k, v in x.run(state).scalars.items()}


@pytest.fixture(scope="module")
def alone(state):
    return evaluate(state, config_of(batch_size=70))


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
@pytest.mark.parametrize("batch_size", [3, 24])
def test_accuracies_are_the_same_on_any_mesh_and_for_any_batch_size(
    state, alone, shape, batch_size
):
    assert evaluate(state, config_of(batch_size=batch_size), shape) == alone
    assert alone.keys() == {
        "eval/knn1_cls", "eval/knn5_cls", "eval/fewshot2_cls", "eval/fewshot2_cls_std"
    }  # fmt: skip


def test_the_accuracy_of_knn_is_that_of_brute_force(state, predict, alone):
    x, label = table(config_of(), predict, state, "test[:50]", batch_size=10)
    bank_x, bank_label = table(config_of(), predict, state, "train[:70]", batch_size=10)
    bank = features.Features(bank_x, bank_label, np.ones(70, bool))
    similarity, near = brute_force(x, bank, 5)
    right = knn.vote(similarity, near, 10, 0.07) == label
    assert alone["eval/knn5_cls"] == 100 * right.mean()


def test_features_are_of_the_whole_image_in_order(state, predict):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, 32, 32, 1), np.uint8))
    found = predict["features"](state.params, {}, {"image": images})
    assert {name: x.shape for name, x in found.items()} == {"cls": (2, 32), "mean": (2, 32)}
    changed = images.at[:, 24:, 24:].set(0)  # the last patch is seen by all
    again = predict["features"](state.params, {}, {"image": changed})
    assert all(np.abs(found[name] - again[name]).max() > 1e-3 for name in found)
    mirrored = predict["features"](state.params, {}, {"image": images[:, :, ::-1]})
    assert np.abs(found["mean"] - mirrored["mean"]).max() > 1e-3


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("cat", 12), ("dog", 12)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02d}.png")
    return tmp_path


def test_images_that_cannot_be_read_are_left_out_of_queries_and_bank(state, predict, folder):
    splits = dict(split="train[:30%]", bank_split="train[30%:]", batch_size=5)
    config = config_of(source=f"folder:{folder}", **splits)
    (folder / "cat" / "03.png").write_bytes(b"not an image")
    (folder / "dog" / "07.png").write_bytes(b"")
    sizes = [
        len(table(config, predict, state, splits[key], "mean", 5)[0])
        for key in ("split", "bank_split")
    ]
    assert sum(sizes) == 22
    assert 0 <= evaluate(state, config)["eval/knn5_cls"] <= 100
    with pytest.raises(ValueError, match=rf"from 1 to the size of the bank, which has {sizes[1]}"):
        evaluate(state, config_of(source=f"folder:{folder}", **splits, ks=(sizes[1] + 1,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ks=(71,)), "ks=.71,.*the bank, which has 70 images"),
        (dict(ks=()), "give numbers from 1"),
        (dict(split="train[:70]"), "bank_split='train.:70.' have 70 images in common"),
        (dict(split="train[60:90]"), "bank_split='train.:70.' have 10 images in common"),
        (dict(temperature=0.0), "temperature=0.0: give a number above 0"),
        (dict(batch_size=0), "batch_size=0: give a whole number from 1"),
        (dict(shots=(20,)), "20 images of each class are wanted, and class '"),
        (dict(draws=0), "draws=0: give a whole number from 1"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(state, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(state, config_of(**changes))


def test_measures_that_would_overwrite_each_other_are_refused_and_take_another_prefix():
    config = config_of()
    for name in ("knn", "fewshot"):
        config.evals[f"{name}_mean"] = dict(config.evals[name], feature="mean")
    evals.require_distinct(config.evals)
    config.evals.other = dict(config.evals.knn, split="test[50:]", ks=(5, 20))
    with pytest.raises(
        ValueError, match="knn and config.evals.other .* eval/knn5_cls: .*other.prefix='eval_other'"
    ):
        evals.require_distinct(config.evals)
    config.evals.other.prefix = "eval_other"
    evals.require_distinct(config.evals)


def test_names_begin_with_the_prefix(state):
    config = config_of()
    for cfg in config.evals.values():
        cfg.prefix = "eval_x"
    assert {name.split("/")[0] for name in evaluate(state, config)} == {"eval_x"}


def test_a_source_without_labels_is_refused(state, folder):
    Image.new("L", (8, 8)).save(folder / "loose.png")
    config = config_of(source=f"folder:{folder}", split="train[:30%]", bank_split="train[30%:]")
    with pytest.raises(ValueError, match="has no labels.*PATH/CLASS/FILE"):
        evaluate(state, config)


def test_queries_of_a_class_that_the_bank_lacks_are_refused(state, folder):
    for i in range(11):
        (folder / "dog" / f"{i:02d}.png").unlink()
    order = open_source(f"folder:{folder}", "train")
    assert len(order) == 13
    splits = [("train[:1]", "train[1:]")] + [
        (f"train[{i}:{i + 1}]", f"train[:{i}]+train[{i + 1}:]") for i in range(1, 13)
    ]
    refused = 0
    for split, bank_split in splits:
        query = open_source(f"folder:{folder}", split)
        if query.class_names[query[0]["label"]] == "dog":
            config = config_of(
                source=f"folder:{folder}", split=split, bank_split=bank_split, ks=(1,)
            )
            with pytest.raises(ValueError, match="no image of class 'dog' is in the bank"):
                del config.evals.fewshot
                evaluate(state, config)
            refused += 1
    assert refused == 1
