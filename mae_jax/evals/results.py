"""Results of a classifier: numbers of each image, results.json and results.png."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy.special import logsumexp

from mae_jax.data.labels import open_labelled
from mae_jax.data.sources import Source
from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.features import Extractor, open_split

BINS = 15  # of confidence, of equal width; arXiv 1706.04599 section 5
CONFUSIONS = 50  # pairs of classes in the table
WORST = 20  # classes in the figure
NAME_LENGTH = 30  # characters of a class name in the figure


class Predictions(NamedTuple):
    """Predictions of a classifier for N images; a second axis, of several heads, may follow."""

    label_N: np.ndarray  # the true class
    predicted_N: np.ndarray  # the class of the largest logit, the first of equal ones; -1 = none
    rank_N: np.ndarray  # how many classes come before the true one
    confidence_N: np.ndarray  # softmax of the largest logit
    loss_N: np.ndarray  # cross-entropy with the label, without smoothing

    def head(self, number: int) -> "Predictions":
        """Return the predictions of one of several heads."""
        return Predictions(*(x[:, number] for x in self))


def measure(logits: np.ndarray, label: np.ndarray) -> Predictions:
    """Return the predictions of logits (..., Y), computed in float64.

    Of equal logits the first class wins. An image with a logit that is not a number counts as
    wrong, and its confidence and loss are not numbers. `label` is broadcast to (...).
    """
    logits = logits.astype(np.float64)
    classes, label = logits.shape[-1], np.broadcast_to(label, logits.shape[:-1])
    true = np.take_along_axis(logits, label[..., None], -1)
    behind = (logits < true) | ((logits == true) & (np.arange(classes) >= label[..., None]))
    with np.errstate(invalid="ignore"):
        log_sum = logsumexp(logits, axis=-1)
        finite = np.isfinite(log_sum)
        return Predictions(
            label,
            np.where(finite, logits.argmax(-1), -1),
            np.where(finite, classes - behind.sum(-1), classes),
            np.exp(logits.max(-1) - log_sum),
            log_sum - true[..., 0],
        )


def classify(extractor: Extractor, state: Any, source: Source) -> Predictions:
    """Return the predictions of a source's readable images, in their order, on every host.

    The extractor computes logits, (B, Y) or (B, R, Y).
    """
    batches = [
        measure(logits, label if logits.ndim == 2 else label[:, None])
        for logits, label in extractor.rows(state, source)
    ]
    return Predictions(*map(np.concatenate, zip(*batches, strict=True)))


def open_both(cfg: ConfigDict, config: ConfigDict) -> tuple[Source, Source]:
    """Open the images that are measured and the training images, of the same classes."""
    data, source = config.data, open_split(cfg, config)
    trained = open_labelled(data.source, data.split, data.data_dir)
    if source.class_names != trained.class_names:
        raise UserError(
            f"{cfg.source} has other classes than the training images of {data.source}:"
            f" {source.num_classes} and {trained.num_classes}, or in another order; labels of the"
            " two cannot be compared"
        )
    return source, trained


def summary(predictions: Predictions, classes: int) -> dict[str, float]:
    """Return top1 and top5 (with more than five classes) in percent, loss, and images."""
    ranks = {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}
    accuracies = {name: 100 * float((predictions.rank_N < k).mean()) for name, k in ranks.items()}
    loss = float(predictions.loss_N.mean())
    return {**accuracies, "loss": loss, "images": len(predictions.label_N)}


def report(
    prefix: str,
    scalars: Mapping[str, float],
    about: Mapping[str, Any],
    predictions: Predictions,
    names: list[str],
) -> Report:
    """Return scalars with the prefix before their names, results.json and results.png.

    Another prefix than eval becomes part of the files' names: results_averaged.json of
    eval_averaged. The tables come first, so that a figure that cannot be drawn does not stop them.
    Both begin with `about`, which says where the images come from.
    """

    def results(facts: Mapping[str, Any]) -> dict[str, Any]:
        return {**facts, **about, **tables(predictions, names)}

    named = {f"{prefix}/{name}": value for name, value in scalars.items()}
    return Report(named, files=files(prefix, "", results, figure))


def files(
    prefix: str, kind: str, results: Callable[[Mapping], dict], draw: Callable[[dict], bytes]
) -> dict[str, Callable[[Mapping], bytes]]:
    """Return results_{kind}.json and .png, by the facts of a run.

    What a prefix has after "eval" is added to their names. `results` makes the tables of the facts,
    and `draw` a PNG of the tables.
    """
    parts = ["results", kind, *re.findall(r"\w+", prefix.removeprefix("eval"))]
    stem = "_".join(part.strip("_") for part in parts if part.strip("_"))
    return {
        f"{stem}.json": lambda facts: to_json(results(facts)),
        f"{stem}.png": lambda facts: draw(results(facts)),
    }


def tables(predictions: Predictions, names: list[str]) -> dict[str, Any]:
    """Return the tables of a results.json; accuracies and calibration error in percent.

    The expected calibration error is the mean over images of the distance between the confidence
    and the accuracy of their bin.
    """
    label_N, right_N = predictions.label_N, predictions.rank_N == 0
    numbers = summary(predictions, len(names))
    bins = reliability(predictions.confidence_N, right_N)
    gap = sum(bin["images"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins)
    total = np.bincount(label_N, minlength=len(names)).tolist()
    right = np.bincount(label_N[right_N], minlength=len(names)).tolist()
    return {
        "classes": len(names),
        **numbers,
        "loss": numbers["loss"] if math.isfinite(numbers["loss"]) else None,
        "expected_calibration_error": round(gap / numbers["images"], 4),
        "reliability": bins,
        "confusions": confusions(predictions, names),
        "per_class": [
            {
                "class": name,
                "images": n,
                "right": k,
                "accuracy": round(100 * k / n, 2) if n else None,
            }
            for name, n, k in zip(names, total, right, strict=True)
        ],
    }


def reliability(confidence_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, float]]:
    """Return from, to, images, mean confidence and accuracy (percent) of each bin with images.

    A bin includes its upper edge. Images whose confidence is not a number are in none.
    """
    known_N = ~np.isnan(confidence_N)
    confidence_N, right_N = confidence_N[known_N], right_N[known_N]
    bin_N = np.maximum(np.ceil(confidence_N * BINS).astype(int) - 1, 0)
    return [
        {
            "from": round(100 * number / BINS, 2),
            "to": round(100 * (number + 1) / BINS, 2),
            "images": int((bin_N == number).sum()),
            "confidence": round(100 * float(confidence_N[bin_N == number].mean()), 4),
            "accuracy": round(100 * float(right_N[bin_N == number].mean()), 4),
        }
        for number in np.unique(bin_N).tolist()
    ]


def confusions(predictions: Predictions, names: list[str]) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a class and the one that its images were taken for."""
    wrong_N = (predictions.predicted_N >= 0) & (predictions.predicted_N != predictions.label_N)
    pairs = Counter(zip(*(x[wrong_N].tolist() for x in predictions[:2]), strict=True))
    total = np.bincount(predictions.label_N)
    return [
        {
            "class": names[label],
            "taken_for": names[predicted],
            "images": count,
            "percent_of_class": round(100 * count / total[label], 2),
        }
        for (label, predicted), count in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    ][:CONFUSIONS]


def worst(per_class: list[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """Return the rows of lowest accuracy, the lowest first, without classes of no images."""
    present = [row for row in per_class if row["images"]]
    return sorted(present, key=lambda row: (row["accuracy"], -row["images"]))[:count]


def to_json(results: Mapping[str, Any]) -> bytes:
    """Return a results.json: a line for each key, and for each entry of a table."""
    lines = []
    for key, value in results.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(entry)}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def figure(results: Mapping[str, Any]) -> bytes:
    """Return a PNG of the classes of lowest accuracy."""
    rows = worst(results["per_class"])
    return bars(
        [row["accuracy"] for row in rows],
        [f"{row['class'][:NAME_LENGTH]} ({row['images']:,})" for row in rows],
        "accuracy of the worst classes (images of each), %",
        f"{results.get('source')}, {results.get('split')}, step {results.get('step')}:"
        f" top-1 {results['top1']:.2f} % of {results['images']:,} images",
    )


def bars(
    percents: Sequence[float], names: Sequence[str], what: str, title: str, spacing: float = 0.25
) -> bytes:
    """Return a PNG with a bar for each name, the first on top, `spacing` inches apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + spacing * len(names)), layout="constrained", dpi=110)
    axis = figure.subplots()
    axis.barh(range(len(names)), percents)
    axis.invert_yaxis()
    # A $ in a name is a character, and begins no formula.
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set(xlim=(0, 100), xlabel=what)
    axis.set_title(title, parse_math=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()
