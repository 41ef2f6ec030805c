"""What a classifier got right and wrong: numbers of each image, results.json and results.png."""

import io
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy.special import logsumexp

from mae_jax.data.labels import open_labelled
from mae_jax.data.sources import Source
from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.features import Extractor, open_split, require_images, split_name

BINS = 15  # of confidence, of equal width; arXiv 1706.04599 section 5
CONFUSIONS = 50  # pairs of classes in the table
WORST = 20  # classes in the figure
NAME_LENGTH = 20  # characters of a class name in the figure
PLAIN: dict[str, Any] = {"parse_math": False}  # for texts with names, where $ is a character


class Predictions(NamedTuple):
    """What a classifier predicts for N images; a second axis, of heads side by side, may follow."""

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
    wrong, and its confidence and loss are not numbers.

    Args:
      label: the true classes; broadcast to (...).
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


def classify(extractor: Extractor, state: Any, source: Source, name: str) -> Predictions:
    """Return the predictions of the readable images of a source, in their order, on every host.

    Args:
      extractor: computes logits, (B, Y) or (B, R, Y).
      name: of the source, for messages.

    Raises:
      UserError: no image can be read; a label is out of range.
    """
    batches = [
        measure(logits, label if logits.ndim == 2 else label[:, None])
        for logits, label in extractor.rows(state, source)
    ]
    predictions = Predictions(*map(np.concatenate, zip(*batches, strict=True)))
    require_images(len(predictions.label_N), name)
    return predictions


def open_both(cfg: ConfigDict, config: ConfigDict) -> tuple[Source, Source]:
    """Open the images that are measured, and the training images.

    Raises:
      UserError: one has no labels, or they have different classes.
    """
    data = config.data
    source = open_split(cfg, config)
    trained = open_labelled(data.source, data.split, data.data_dir)
    if source.class_names != trained.class_names:
        raise UserError(
            f"{split_name(cfg, config)} has other classes than the training images of"
            f" {data.source}: {source.num_classes} and {trained.num_classes}, or in another"
            " order; labels of the two cannot be compared"
        )
    return source, trained


def summary(predictions: Predictions, classes: int) -> dict[str, float]:
    """Return top1 and top5 (with more than five classes) in percent, loss, and images."""
    ranks = {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}
    accuracies = {name: 100 * float((predictions.rank_N < k).mean()) for name, k in ranks.items()}
    loss = float(predictions.loss_N.mean())
    return {**accuracies, "loss": loss, "images": len(predictions.label_N)}


class Results(NamedTuple):
    """One evaluation of a classifier."""

    prefix: str  # of the names of its scalars, such as eval
    about: dict[str, Any]  # where the images come from
    classes: list[str]
    predictions: Predictions


def report(results: Results, scalars: Mapping[str, float]) -> Report:
    """Return scalars with the prefix before their names, results.json and results.png.

    Another prefix than eval becomes part of the files' names: results_averaged.json of
    eval_averaged. The tables come first: a figure that cannot be drawn does not keep them back.
    """
    kind = re.sub(r"\W+", "_", results.prefix.removeprefix("eval")).strip("_")
    stem = f"results_{kind}" if kind else "results"
    return Report(
        {f"{results.prefix}/{name}": value for name, value in scalars.items()},
        files={f"{stem}.json": partial(to_json, results), f"{stem}.png": partial(figure, results)},
    )


def tables(results: Results) -> dict[str, Any]:
    """Return the tables of a results.json; accuracies and calibration error in percent.

    top1, top5 (with more than five classes), loss, images, expected_calibration_error (the mean
    over images of the distance between the confidence and the accuracy of their bin), reliability
    (of each bin of confidence), confusions (the most frequent pairs), per_class (None: no image).
    """
    (label_N, predicted_N, _, confidence_N, _), names = results.predictions, results.classes
    numbers = summary(results.predictions, len(names))
    bins = reliability(confidence_N, predicted_N == label_N)
    gap = sum(bin["images"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins)
    total = np.bincount(label_N, minlength=len(names)).tolist()
    right = np.bincount(label_N[predicted_N == label_N], minlength=len(names)).tolist()
    return {
        "images": numbers["images"],
        "classes": len(names),
        **numbers,
        "loss": numbers["loss"] if math.isfinite(numbers["loss"]) else None,
        "expected_calibration_error": round(gap / numbers["images"], 4),
        "reliability": bins,
        "confusions": [
            {
                "class": names[label],
                "taken_for": names[predicted],
                "images": count,
                "percent_of_class": round(100 * count / total[label], 2),
            }
            for label, predicted, count in confusions(results.predictions)
            if predicted >= 0
        ][:CONFUSIONS],
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

    A bin holds its upper edge. Images whose confidence is not a number are in none.
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


def confusions(predictions: Predictions) -> list[tuple[int, int, int]]:
    """Return (class, predicted class, images) of all errors, the most frequent first; -1 = none."""
    wrong_N = predictions.label_N != predictions.predicted_N
    pairs_2N = np.stack([predictions.label_N[wrong_N], predictions.predicted_N[wrong_N]])
    pairs_2K, count_K = np.unique(pairs_2N.astype(int), axis=1, return_counts=True)
    order = np.argsort(-count_K, kind="stable")
    return list(zip(*(x[order].tolist() for x in (*pairs_2K, count_K)), strict=True))


def worst(per_class: list[dict[str, Any]], count: int = WORST) -> list[int]:
    """Return the classes of lowest accuracy, the lowest first; all in their order if few enough."""
    present = [label for label, row in enumerate(per_class) if row["images"]]
    if len(present) <= count:
        return present

    def key(label: int) -> tuple[float, int]:
        row = per_class[label]
        return row["right"] / row["images"], -row["images"]

    return sorted(present, key=key)[:count]


def to_json(results: Results, facts: Mapping[str, Any]) -> bytes:
    """Return a results.json: a line for each key, and for each entry of a table.

    Args:
      facts: what was evaluated, see `Report.files`.
    """
    lines = []
    for key, value in {**facts, **results.about, **tables(results)}.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(entry)}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def figure(results: Results, facts: Mapping[str, Any]) -> bytes:
    """Return a PNG: reliability, and the classes of lowest accuracy with their confusions.

    Args:
      facts: what was evaluated, see `Report.files`.
    """
    from matplotlib.figure import Figure

    shown = {**facts, **results.about, **tables(results)}
    chosen = worst(shown["per_class"])
    figure = Figure(figsize=(15, max(5.0, 1.6 + 0.28 * len(chosen))), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    _draw_reliability(left, shown)
    _draw_classes(right, [shown["per_class"][y] for y in chosen], errors_of(results, chosen))
    top5 = f", top-5 {shown['top5']:.2f} %" if "top5" in shown else ""
    loss = "not a number" if shown["loss"] is None else f"{shown['loss']:.4g}"
    figure.suptitle(
        f"{shown.get('source')}, {shown.get('split')}, step {shown.get('step')}:"
        f" {shown['images']:,} images of {shown['classes']:,} classes\n"
        f"top-1 {shown['top1']:.2f} %{top5}, loss {loss}",
        **PLAIN,
    )
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()


def errors_of(results: Results, labels: list[int], count: int = 3) -> list[str]:
    """Return what images of each class were most often taken for, and how many, in words."""
    names = [*results.classes, "nothing"]
    errors: dict[int, list[str]] = {label: [] for label in labels}
    for label, predicted, images in confusions(results.predictions):
        if label in errors:
            errors[label].append(f"{_short(names[predicted])}: {images:,}")
    return [", ".join(words[:count]) for words in errors.values()]


def _short(name: str) -> str:
    """Leave the middle of a long name out: names that differ, differ at their ends."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _draw_reliability(axis: Any, shown: Mapping[str, Any]) -> None:
    """Draw accuracy over confidence, with the number of images above each bar."""
    axis.plot([0, 100], [0, 100], "--", color="0.5", linewidth=1, label="as it should be")
    for bin in shown["reliability"]:
        width = bin["to"] - bin["from"]
        axis.bar(bin["from"], bin["accuracy"], width, align="edge", color="C0", edgecolor="white")
        centre = bin["from"] + width / 2
        axis.text(centre, bin["accuracy"] + 1, f"{bin['images']:,}", ha="center", fontsize=7)
    axis.legend(frameon=False, loc="lower right")
    axis.set(
        xlim=(0, 100),
        ylim=(0, 105),
        xlabel="confidence (softmax of the predicted class), %",
        ylabel="accuracy, %, and number of images",
        title=f"Reliability: calibration error {shown['expected_calibration_error']:.2f} %",
    )


def _draw_classes(axis: Any, rows: list[dict[str, Any]], errors: list[str]) -> None:
    """Draw a bar for the accuracy of each class, and write its errors beside it."""
    axis.barh(range(len(rows)), [row["accuracy"] for row in rows], color="C0")
    for y, (row, words) in enumerate(zip(rows, errors, strict=True)):
        text = f"{row['accuracy']:.1f} %   {words}"
        axis.text(101, y, text, va="center", fontsize=8, **PLAIN)
    names = [f"{_short(row['class'])} ({row['images']:,})" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8, **PLAIN)
    axis.set(
        xlim=(0, 100),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="accuracy, %",
        title="Classes of lowest accuracy (images), and what they were taken for",
    )
