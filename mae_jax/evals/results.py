"""What a classifier got right and wrong: of each image, as tables, and as a figure."""

import io
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mae_jax.data.sources import Source
from mae_jax.evals.features import Extractor

BINS = 15  # of confidence, of equal width; arXiv 1706.04599 section 5
CONFUSIONS = 50  # pairs of classes in the table
WORST = 20  # classes in the figure
NAME_LENGTH = 20  # characters of a class name in the figure
PLAIN: dict[str, Any] = {"parse_math": False}  # of texts with names, where $ is a character


class Predictions(NamedTuple):
    """What became of N images; another axis, of heads side by side, may follow."""

    label_N: np.ndarray  # the true class
    predicted_N: np.ndarray  # the class of the largest logit, the first of equal ones; -1 = none
    rank_N: np.ndarray  # how many classes come before the true one
    confidence_N: np.ndarray  # softmax of the largest logit
    loss_N: np.ndarray  # cross-entropy with the label


def measure(logits: np.ndarray, label: np.ndarray) -> Predictions:
    """Predictions of logits (..., Y), in float64.

    Of equal logits the first class wins. An image with a logit that is not a number counts as
    wrong, and its confidence and loss are not numbers.

    Args:
      label: the true classes; broadcast to (...).
    """
    logits = logits.astype(np.float64)
    classes, label = logits.shape[-1], np.broadcast_to(label, logits.shape[:-1])
    true = np.take_along_axis(logits, label[..., None], -1)
    beaten = (logits < true) | ((logits == true) & (np.arange(classes) >= label[..., None]))
    largest = logits.max(-1)
    with np.errstate(invalid="ignore"):
        log_sum = np.log(np.exp(logits - largest[..., None]).sum(-1)) + largest
        known = ~np.isnan(log_sum)
        return Predictions(
            label,
            np.where(known, logits.argmax(-1), -1),
            np.where(known, classes - beaten.sum(-1), classes),
            np.exp(largest - log_sum),
            log_sum - true[..., 0],
        )


def classify(extractor: Extractor, state: Any, source: Source) -> Predictions:
    """Predictions of the readable images of a source, in their order, on every host.

    Args:
      extractor: computes logits, (B, Y) or (B, R, Y).
    """
    outcomes = []
    for batch in extractor.batches(state, source):
        found = extractor.fetch(batch)
        logits, label = found.x[found.counted], found.label[found.counted]
        outcomes.append(measure(logits, label if logits.ndim == 2 else label[:, None]))
    return Predictions(*map(np.concatenate, zip(*outcomes, strict=True)))


class Results(NamedTuple):
    """What `write` writes of one evaluation."""

    prefix: str  # of the names of its scalars, such as eval
    about: dict[str, Any]  # where the images come from
    classes: list[str]
    found: Predictions


def report(results: Results) -> dict[str, Any]:
    """The tables of a results.json; accuracies and calibration error in percent.

    top1, top5 (with more than five classes), loss, images, expected_calibration_error (the mean
    over images of the distance between the confidence and the accuracy of their bin), reliability
    (of each bin of confidence), confusions (the most frequent pairs), per_class (None: no image).
    """
    found, names = results.found, results.classes
    images, right = len(found.label_N), found.predicted_N == found.label_N
    said: dict[str, Any] = {"images": images, "classes": len(names)}
    said["top1"] = 100 * float((found.rank_N < 1).mean())
    if len(names) > 5:
        said["top5"] = 100 * float((found.rank_N < 5).mean())
    said["loss"] = _finite(found.loss_N.mean())
    bins = reliability(found.confidence_N, right)
    gap = sum(bin["images"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins)
    said["expected_calibration_error"] = round(gap / images, 4)
    said["reliability"] = bins

    total, correct = per_class(found, len(names))
    wrong = ~right & (found.predicted_N >= 0)
    pairs, counts = np.unique(
        found.label_N[wrong].astype(np.int64) * len(names) + found.predicted_N[wrong],
        return_counts=True,
    )
    said["confusions"] = [
        {
            "class": names[pairs[i] // len(names)],
            "taken_for": names[pairs[i] % len(names)],
            "images": int(counts[i]),
            "percent_of_class": round(100 * counts[i] / total[pairs[i] // len(names)], 2),
        }
        for i in np.argsort(-counts, kind="stable")[:CONFUSIONS]
    ]
    said["per_class"] = [
        {
            "class": name,
            "images": int(n),
            "right": int(k),
            "accuracy": round(100 * k / n, 2) if n else None,
        }
        for name, n, k in zip(names, total, correct, strict=True)
    ]
    return said


def reliability(confidence_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, float]]:
    """Of each bin of confidence with images: from, to, images, mean confidence, accuracy (percent).

    Images whose confidence is not a number are in none.
    """
    bins = []
    place_N = np.ceil(np.nan_to_num(confidence_N, nan=-1.0) * BINS) - 1
    for number in range(BINS):
        inside = np.maximum(place_N, 0) == number if number == 0 else place_N == number
        inside &= ~np.isnan(confidence_N)
        if inside.any():
            bins.append(
                {
                    "from": round(100 * number / BINS, 2),
                    "to": round(100 * (number + 1) / BINS, 2),
                    "images": int(inside.sum()),
                    "confidence": round(100 * float(confidence_N[inside].mean()), 4),
                    "accuracy": round(100 * float(right_N[inside].mean()), 4),
                }
            )
    return bins


def per_class(found: Predictions, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, and how many of them were classified right (Y,)."""
    right = found.predicted_N == found.label_N
    return (
        np.bincount(found.label_N, minlength=classes),
        np.bincount(found.label_N[right], minlength=classes),
    )


def worst(found: Predictions, classes: int, count: int = WORST) -> np.ndarray:
    """The classes of lowest accuracy, the lowest first; all in their order if there are no more."""
    total, correct = per_class(found, classes)
    present = np.flatnonzero(total)
    if len(present) <= count:
        return present
    order = np.lexsort((-total[present], correct[present] / total[present]))
    return present[order[:count]]


def confusion(found: Predictions, chosen: np.ndarray) -> list[dict[int, int]]:
    """Of each chosen class: predicted class -> images, the most frequent first; -1 = none."""
    table = []
    for label in chosen:
        predicted, counts = np.unique(found.predicted_N[found.label_N == label], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        table.append({int(predicted[i]): int(counts[i]) for i in order})
    return table


def write(workdir: str | os.PathLike, results: Results, state: Mapping[str, Any]) -> None:
    """results.json and results.png in a workdir, by the first host; those of an earlier step go.

    Another prefix than eval becomes part of the names: results_averaged.json of eval_averaged.

    Args:
      state: what was evaluated: step, checkpoint and the like.
    """
    if jax.process_index() == 0:
        said = {**state, **results.about, **report(results)}
        kind = re.sub(r"\W+", "_", results.prefix.removeprefix("eval")).strip("_")
        name = f"results_{kind}" if kind else "results"
        _replace(epath.Path(workdir) / f"{name}.json", _json(said).encode())
        _replace(epath.Path(workdir) / f"{name}.png", figure(results, said))


def _replace(path: epath.Path, content: bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _json(said: Mapping[str, Any]) -> str:
    """A line for each key, and for each entry of a table."""
    lines = []
    for key, value in said.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(entry)}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def figure(results: Results, said: Mapping[str, Any]) -> bytes:
    """A PNG: reliability with the number of images, and the worst classes with their confusions.

    Args:
      said: `report`, and what identifies the weights.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, names = results.found, [_short(name) for name in results.classes]
    chosen = worst(found, len(names))
    rows = len(chosen)
    figure = Figure(figsize=(15, max(5.0, 1.6 + 0.28 * rows)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.4])  # type: ignore[misc]
    _draw_reliability(left, said)
    _draw_classes(right, results, names, chosen)
    top5 = f", top-5 {said['top5']:.2f} %" if "top5" in said else ""
    loss = "not a number" if said["loss"] is None else f"{said['loss']:.4g}"
    figure.suptitle(
        f"{', '.join(str(said[key]) for key in ('source', 'split') if key in said)}:"
        f" {said['images']:,} images of {said['classes']:,} classes"
        + (f", step {said['step']:,}" if "step" in said else "")
        + f"\ntop-1 {said['top1']:.2f} %{top5}, loss {loss}",
        fontsize=12,
        **PLAIN,
    )
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()


def _short(name: str) -> str:
    """With the middle left out: names that differ, differ at their ends."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _draw_reliability(figure: Any, said: Mapping[str, Any]) -> None:
    """Accuracy over confidence, and below it how many images each bar stands for."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = said["reliability"]
    place, width = [bin["from"] for bin in bins], 100 / BINS
    upper.plot([0, 100], [0, 100], "--", color="0.5", linewidth=1, label="as it should be")
    style = dict(width=width, align="edge", edgecolor="white")
    upper.bar(place, [bin["accuracy"] for bin in bins], color="C0", **style)
    upper.set(
        xlim=(0, 100),
        ylim=(0, 100),
        ylabel="accuracy, %",
        title=f"Reliability: calibration error {said['expected_calibration_error']:.2f} %",
    )
    upper.legend(frameon=False, loc="upper left", fontsize=9)
    lower.bar(place, [bin["images"] for bin in bins], color="0.6", **style)
    lower.set_yscale("log")
    lower.set_ylim(bottom=0.5)
    lower.set(xlabel="confidence (softmax of the predicted class), %", ylabel="images")
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)


def _draw_classes(figure: Any, results: Results, names: list[str], chosen: np.ndarray) -> None:
    """A row for each chosen class: its accuracy, and what its images were taken for."""
    found, place = results.found, np.arange(len(chosen))
    total, correct = per_class(found, len(names))
    bars, cells = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.2])
    accuracy = 100 * correct[chosen] / total[chosen]
    bars.barh(place, accuracy, color="C0", height=0.8)
    for y, value in enumerate(accuracy):
        inside = value > 70
        bars.text(
            value + (-2 if inside else 2), y, f"{value:.1f}", va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    bars.set(xlim=(0, 100), xlabel="accuracy, %", title="Class (images): accuracy")
    bars.set_yticks(place, [f"{names[y]} ({total[y]:,})" for y in chosen], fontsize=8, **PLAIN)
    bars.spines[["top", "right"]].set_visible(False)

    # Predictions of many classes are too scattered for a matrix: each row then names its own.
    whole, confused = len(chosen) == (total > 0).sum(), confusion(found, chosen)
    few = whole and len({*chosen}.union(*confused) - {-1}) <= WORST
    columns, table = (_matrix if few else _listing)(confused, chosen, names)
    share = np.array([[count for count, _ in row] for row in table]) / total[chosen][:, None]
    cells.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(table):
        for x, (count, text) in enumerate(row):
            if count:
                dark = "white" if share[y, x] > 0.6 else "black"
                cells.text(x, y, text, ha="center", va="center", fontsize=7.5, color=dark, **PLAIN)
    slanted = max(map(len, columns)) > 3 and few
    cells.set_xticks(
        range(len(columns)), columns, fontsize=8, rotation=40 if slanted else 0,
        ha="right" if slanted else "center", rotation_mode="anchor" if slanted else "default",
        **PLAIN,
    )  # fmt: skip
    cells.tick_params(axis="y", length=0, labelleft=False)
    which = f"the {len(chosen)}" + ("" if whole else f" worst of {(total > 0).sum():,}")
    cells.set(title="Taken for" if few else f"What {which} classes were wrongly taken for")
    cells.spines[:].set_visible(False)
    cells.set_ylim(len(chosen) - 0.5, -0.5)


Cells = tuple[list[str], list[list[tuple[int, str]]]]  # columns, rows of (images, what is written)


def _matrix(table: list[dict[int, int]], chosen: np.ndarray, names: list[str]) -> Cells:
    """A column for each class."""
    places = [y for y in range(len(names)) if y in chosen or any(y in row for row in table)]
    places += [-1] * any(-1 in row for row in table)
    columns = [names[y] if y >= 0 else "nothing" for y in places]
    return columns, [[(row.get(y, 0), f"{row.get(y, 0):,}") for y in places] for row in table]


def _listing(table: list[dict[int, int]], chosen: np.ndarray, names: list[str]) -> Cells:
    """Columns of the most frequent errors, by name, and of the rest."""
    columns = ["most often", "second", "third", "any other class"]
    rows = []
    for label, row in zip(chosen, table, strict=True):
        errors = [(n, names[y] if y >= 0 else "nothing") for y, n in row.items() if y != label]
        rest = sum(n for n, _ in errors[3:])
        named = [(n, f"{name}: {n:,}") for n, name in errors[:3]]
        named += [(0, "")] * (3 - len(named))
        rows.append([*named, (rest, f"{rest:,}")])
    return columns, rows
