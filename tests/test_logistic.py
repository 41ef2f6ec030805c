"""Logistic regression is scikit-learn's, of any blocks, on any mesh, and chosen on its bank."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from tiny import fresh_state, mesh_of, probe_config, task_on, tiny_config

from mae_jax import evals
from mae_jax.configs import knn as recipe
from mae_jax.data.sources import open_source
from mae_jax.errors import UserError
from mae_jax.evals import features, logistic
from mae_jax.metrics import summary
from mae_jax.models.patchify import normalize, patchify
from mae_jax.models.vit import Encoder

STATELESS = SimpleNamespace(params={}, extra={})
NAME = "eval/logistic_cls"


def random_bank(images=120, padding=0, batch=None):
    """Three classes that overlap, features of other scales, one of them constant."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, images)
    x = rng.normal(size=(3, 6))[label] + 1.5 * rng.normal(size=(images, 6))
    x = (x * [1, 30, 0.01, 1, 1, 0] + [0, 5, 1, -2, 0, 4]).astype(np.float32)
    x = np.concatenate([x, np.full((padding, 6), 1e6, np.float32)])
    label = np.concatenate([label, np.zeros(padding, int)]).astype(np.int32)
    counted = np.arange(len(label)) < images
    shape = (-1, batch or len(label))
    return features.Features(x.reshape(*shape, 6), label.reshape(shape), counted.reshape(shape))


def zeros(width, classes):
    return logistic.Linear(jnp.zeros((width, classes)), jnp.zeros(classes))


def reference(x, label, strength):
    """scikit-learn's solution, of standardised features in float64."""
    std = x.std(0, dtype=np.float64)
    z = (x - x.mean(0, dtype=np.float64)) / np.where(std > 1e-6 * std.max(), std, 1)
    model = LogisticRegression(C=1 / (len(z) * strength), tol=1e-9, max_iter=10_000)
    return z, model.fit(z, label)


def objective(weight, bias, z, label, strength):
    logits = z @ np.asarray(weight, np.float64) + np.asarray(bias, np.float64)
    log_sum = np.log(np.exp(logits).sum(1))
    loss = (log_sum - logits[np.arange(len(z)), label]).mean()
    return loss + strength / 2 * np.square(np.asarray(weight, np.float64)).sum()


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-6])
def test_the_fit_is_that_of_scikit_learn(strength):
    bank = random_bank()
    x, label = bank.x[0], bank.label[0]
    z, model = reference(x, label, strength)
    standardised, scale = logistic.standardise(bank)
    np.testing.assert_allclose(standardised.x[0], z, atol=1e-5)
    linear = jax.jit(logistic.fit)(standardised, strength, zeros(6, 3))
    np.testing.assert_allclose(linear.weight, model.coef_.T, atol=2e-3)
    ours, theirs = (
        objective(*found, z, label, strength)
        for found in (linear, (model.coef_.T, model.intercept_))
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    np.testing.assert_array_equal(logistic.classify(linear, scale, x), model.predict(z))


def test_padding_and_rows_that_are_not_finite_have_no_part_in_the_fit():
    alone = random_bank(images=100)
    padded = random_bank(images=100, padding=28, batch=16)
    padded.x[6, 5:7], padded.counted[6, 5:7] = np.nan, True  # two images more, without numbers
    fits = []
    for bank in (alone, padded):
        standardised, scale = logistic.standardise(bank)
        assert standardised.counted.sum() == 100
        fits.append((logistic.fit(standardised, 1e-3, zeros(6, 3)), scale))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), *fits)
    x = alone.x[0].copy()
    x[3, 2] = np.inf
    assert np.flatnonzero(logistic.classify(*fits[0], x) == -1).tolist() == [3]


# --- as an evaluator ---


def config_of(config=None, **changes):
    config = config or tiny_config()
    common = dict(source="", split="test[:50]", bank_split="train[:150]", feature="cls", every="")
    with config.unlocked():
        config.evals = dict(
            logistic=common | dict(type="logistic", batch_size=16, layers="last"),
            knn=common | dict(type="knn", batch_size=16, layers="last", ks=(1,), temperature=0.07),
        )
    for cfg in config.evals.values():
        cfg.update({key: value for key, value in changes.items() if key in cfg})
    return config


@pytest.fixture(scope="module")
def state():
    return jax.device_get(fresh_state(tiny_config(), mesh_of(1, 1, 1))[1])


def evaluate(config, state, shape=(1, 1, 1), name="logistic", predict=None):
    mesh = mesh_of(*shape)
    predict = predict or task_on(config, mesh).predict()
    return dict(evals.build(config, predict, mesh)[name].run(state).scalars)


def table(config, state, block):
    """Features after a block, by hand, and labels of the queries and of the bank."""
    task = task_on(config, mesh_of(1, 1, 1))
    encoder = Encoder(task.spec, task.network.compute)

    def compute(params, extra, batch):
        patches = patchify(normalize(batch["image"], task.spec), task.spec.patch_size)
        variables = {"params": params["encoder"]}
        last, blocks = encoder.apply(variables, patches, return_blocks=True)
        return (last if block == task.spec.encoder.depth else blocks[block])[:, 0]

    extractor = features.Extractor(config, compute, mesh_of(1, 1, 1), batch_size=50)
    cfg = config.evals.logistic
    return [
        extractor.table(state, open_source(config.data.source, split))
        for split in (cfg.split, cfg.bank_split)
    ]


@pytest.fixture(scope="module")
def of_all(state):
    return evaluate(config_of(layers="all"), state)


def test_each_block_has_the_accuracy_of_scikit_learn_with_the_best_of_the_strengths(state, of_all):
    held = logistic.hold_out(150, (1, 150))[0]
    assert held.sum() == 15
    losses = {}
    for block in (1, 2):
        (x, label), (bank_x, bank_label) = table(config_of(), state, block)
        mean, std = bank_x.mean(0), bank_x.std(0)
        z, bank_z = (x - mean) / std, (bank_x - mean) / std

        def model(strength, rows, z=bank_z, y=bank_label):
            fitted = LogisticRegression(C=1 / (rows.sum() * strength), tol=1e-7, max_iter=5000)
            return fitted.fit(z[rows], y[rows])

        left_out = {
            strength: -model(strength, ~held)
            .predict_log_proba(bank_z[held])[np.arange(15), bank_label[held]]
            .mean()
            for strength in logistic.STRENGTHS
        }
        best = min(left_out, key=left_out.get)
        losses[block] = left_out[best]
        expected = 100 * (model(best, held | True).predict(z) == label).mean()
        assert of_all[f"{NAME}_block{block}"] == pytest.approx(expected, abs=2.0)  # an image
    assert of_all[f"{NAME}_best_block"] == min(losses, key=losses.get)


def test_all_layers_give_a_number_for_each_block_the_last_and_the_best(state, of_all):
    names = {NAME, f"{NAME}_block1", f"{NAME}_block2", f"{NAME}_best", f"{NAME}_best_block"}
    assert set(of_all) == names
    assert of_all[NAME] == of_all[f"{NAME}_block2"] != of_all[f"{NAME}_block1"]
    assert of_all[f"{NAME}_best"] == of_all[f"{NAME}_block{of_all[f'{NAME}_best_block']}"]
    last = evaluate(config_of(), state)
    assert last == {NAME: pytest.approx(of_all[NAME], abs=2.0)}
    assert evaluate(config_of(layers="1"), state).keys() == names  # and the last, always


@pytest.mark.parametrize(("shape", "batch_size"), [((8, 1, 1), 64), ((2, 2, 2), 7)], ids=str)
def test_the_numbers_are_the_same_on_any_mesh_and_with_padding(state, of_all, shape, batch_size):
    found = evaluate(config_of(layers="all", batch_size=batch_size), state, shape)
    assert found == of_all


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)], ids=str)
def test_block_features_are_those_of_a_forward_pass_by_hand(state, shape):
    config = config_of(layers="all")
    predict = task_on(config, mesh_of(*shape)).predict()
    blocks = features.Blocks.of(config.evals.logistic, config, predict)
    assert blocks.numbers == (1, 2)
    extractor = features.Extractor(config, blocks.compute, mesh_of(*shape), batch_size=16)
    bank = extractor.bank(state, open_source(config.data.source, "test[:50]"))
    for x, number in zip(bank.x, blocks.numbers, strict=True):
        (by_hand, _), _ = table(config, state, number)
        np.testing.assert_allclose(np.asarray(x)[np.asarray(bank.counted)], by_hand, atol=1e-5)


def test_the_last_block_has_the_features_of_the_task(state):
    predict = task_on(config_of(), mesh_of(1, 1, 1)).predict()
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)}
    last = predict["features"](state.params, {}, batch)
    for name, x in predict["block_features"](state.params, {}, batch).items():
        np.testing.assert_allclose(x[-1], last[name], atol=1e-6)
        assert np.abs(x[0] - last[name]).max() > 0.1


def test_knn_takes_layers_too(state):
    found = evaluate(config_of(layers="all"), state, name="knn")
    assert set(found) == {"eval/knn1_cls", "eval/knn1_cls_block1", "eval/knn1_cls_block2"}
    for block in (1, 2):
        (x, label), (bank_x, bank_label) = table(config_of(), state, block)
        unit, bank_unit = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (x, bank_x))
        nearest = bank_label[(unit @ bank_unit.T).argmax(1)]
        assert found[f"eval/knn1_cls_block{block}"] == 100 * (nearest == label).mean()


def test_an_untrained_probe_has_features_of_blocks_and_pixels_have_none():
    config = config_of(probe_config(features="random", init_from=""), layers="all")
    state = jax.device_get(fresh_state(config, mesh_of(1, 1, 1))[1])
    assert f"{NAME}_best" in evaluate(config, state)
    config.features = "pixels"
    for name in config.evals:
        with pytest.raises(ValueError, match=f"{name} with layers='all': .*give layers='last'"):
            evaluate(config, state)
        config.evals[name].layers = "last"
    assert evaluate(config, state)[NAME] > 50


@pytest.mark.parametrize("layers", ["0", "3", "1,3", "-1", "1;2", "first", "", "1,"])
@pytest.mark.parametrize("name", ["logistic", "knn"])
def test_layers_that_do_not_exist_are_refused_before_the_run(layers, name):
    config = config_of()
    config.evals[name].layers = layers
    with pytest.raises(ValueError, match=f"{name} with layers='{layers}': .*from 1 to 2"):
        evals.build(config, task_on(config, mesh_of(1, 1, 1)).predict(), mesh_of(1, 1, 1))


def test_features_that_are_not_finite_are_wrong_as_queries_and_refused_as_a_bank():
    config = config_of()

    def predict(bound):
        def compute(params, extra, batch):
            x_BD = batch["image"][:, ::4, ::4, 0].astype(jnp.float32).reshape(-1, 64)
            mean_B = batch["image"].astype(jnp.float32).mean((1, 2, 3))
            return {"cls": jnp.where((mean_B > bound)[:, None], jnp.nan, x_BD)}

        return {"features": compute}

    finite = evaluate(config, STATELESS, predict=predict(1000))[NAME]
    some = evaluate(config, STATELESS, predict=predict(85))[NAME]
    assert 0 < some < finite
    with pytest.raises(ValueError, match="features of all images of train.:150. are not finite"):
        evaluate(config, STATELESS, predict=predict(-1))


def test_a_held_out_part_without_an_image_that_counts_is_refused():
    bank = random_bank(images=12)
    held = logistic.hold_out(12, bank.label.shape)
    fitter = logistic.Fitter(mesh_of(1, 1, 1))
    fitter(bank, 3, held, "train")
    for part, words in ((held, "a held-out tenth"), (~held, "the other nine tenths")):
        with pytest.raises(UserError, match=f"no image of {words} of train can be used"):
            fitter(bank._replace(counted=bank.counted & ~part), 3, held, "train")


def test_the_recipe_measures_it_and_its_names_are_told_as_percentages():
    config = recipe.get_config("source=bundled:digits,test=test")
    assert config.evals.logistic.layers == config.evals.knn.layers == "last"
    lines = summary.evaluations({f"{NAME}_block12": 51.0, f"{NAME}_best_block": 12})
    assert [line.split() for line in lines] == [
        [f"{NAME}_block12", "51.00", "%"], [f"{NAME}_best_block", "12"]
    ]  # fmt: skip
    config.evals.other = dict(config.evals.logistic, split="test[:10]")
    with pytest.raises(ValueError, match="would both report eval/logistic_cls: .*prefix"):
        evals.require_distinct(config.evals)
