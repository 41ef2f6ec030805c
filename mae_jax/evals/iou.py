"""Intersection over union of predicted label maps: counts, numbers, results.json and results.png.

All pixels of a split are pooled in one table of counts. The mean is over the classes that occur, in
the truth or in a prediction; an ignored pixel is not counted.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.results import NAME_LENGTH, bars, files


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return how many pixels of each true class got each predicted class, int64 (Y, Y + 1).

    The last column counts predictions of no class. Pixels whose truth is no class from 0 to Y - 1
    are not counted.
    """
    labelled = (truth >= 0) & (truth < classes)
    truth, predicted = truth[labelled].astype(np.int64), predicted[labelled].astype(np.int64)
    predicted = np.where((predicted >= 0) & (predicted < classes), predicted, classes)
    width = classes + 1
    return np.bincount(truth * width + predicted, minlength=classes * width).reshape(-1, width)


class Scores(NamedTuple):
    """Scores of a table of `confusion`, as fractions; nan for a class that does not occur."""

    iou_Y: np.ndarray
    accuracy_Y: np.ndarray
    pixels_Y: np.ndarray  # of each class in the truth
    pixel_accuracy: float

    @classmethod
    def of(cls, counts: np.ndarray) -> "Scores":
        """Return the scores of a table of `confusion`.

        Raises:
          UserError: no pixel was counted.
        """
        right_Y, pixels_Y = np.diagonal(counts), counts.sum(1)
        if not pixels_Y.any():
            raise UserError(
                "no pixel of the images that are measured has a class: are config.data.ignore and"
                " config.data.shift those of the label maps?"
            )
        union_Y = pixels_Y + counts[:, :-1].sum(0) - right_Y
        with np.errstate(invalid="ignore"):
            return cls(
                right_Y / union_Y,
                right_Y / pixels_Y,
                pixels_Y,
                float(right_Y.sum() / pixels_Y.sum()),
            )

    @property
    def miou(self) -> float:
        return float(np.nanmean(self.iou_Y))

    @property
    def mean_accuracy(self) -> float:
        return float(np.nanmean(self.accuracy_Y))


def report(
    prefix: str,
    kind: str,
    settings: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    names: list[str],
    images: Mapping[str, np.ndarray],
) -> Report:
    """Return the metrics of some settings, their results.json and results.png.

    Each setting NAME gives {prefix}/miou_NAME and {prefix}/pixel_accuracy_NAME in percent; "" gives
    {prefix}/miou. The files are results_{kind}.json and .png; what a prefix has after "eval" is
    added to their names.

    Args:
      settings: name -> table of `confusion`.
      about: where the images come from and what was measured; the files begin with it.
      names: of the classes.
      images: pictures; see `Report`.
    """
    scores = {name: Scores.of(counts) for name, counts in settings.items()}
    scalars = {}
    for name, score in scores.items():
        end = f"_{name}" if name else ""
        scalars[f"{prefix}/miou{end}"] = 100 * score.miou
        scalars[f"{prefix}/pixel_accuracy{end}"] = 100 * score.pixel_accuracy

    def results(facts: Mapping[str, Any]) -> dict[str, Any]:
        return {**facts, **about, **tables(scores, names)}

    return Report(scalars, images, files(prefix, kind, results, figure))


def tables(scores: Mapping[str, Scores], names: list[str]) -> dict[str, Any]:
    """Return the tables of a results.json, in percent: of each setting, and of each class.

    A class that occurs neither in the truth nor in a prediction has null.
    """
    first = next(iter(scores.values()))

    def percent(fraction: float) -> float | None:
        return None if np.isnan(fraction) else round(100 * float(fraction), 2)

    return {
        "classes": len(names),
        "pixels": int(first.pixels_Y.sum()),
        "settings": [
            {
                "setting": name,
                "miou": percent(score.miou),
                "pixel_accuracy": percent(score.pixel_accuracy),
                "mean_class_accuracy": percent(score.mean_accuracy),
                "classes_that_occur": int((~np.isnan(score.iou_Y)).sum()),
            }
            for name, score in scores.items()
        ],
        "per_class": [
            {
                "class": name,
                "pixels": int(first.pixels_Y[number]),
                "iou": {key: percent(score.iou_Y[number]) for key, score in scores.items()},
            }
            for number, name in enumerate(names)
        ],
    }


def figure(results: Mapping[str, Any]) -> bytes:
    """Return a PNG of the classes' intersection over union, of the setting with the best mean."""
    best = max(results["settings"], key=lambda row: row["miou"])
    rows = [row for row in results["per_class"] if row["iou"][best["setting"]] is not None]
    rows.sort(key=lambda row: -row["pixels"])
    share = [100 * row["pixels"] / results["pixels"] for row in rows]
    return bars(
        [row["iou"][best["setting"]] for row in rows],
        [f"{r['class'][:NAME_LENGTH]} ({s:.1f} %)" for r, s in zip(rows, share, strict=True)],
        "intersection over union, % (share of the labelled pixels)",
        f"{results.get('source')}, {results.get('split')}, step {results.get('step')}:"
        f" mIoU {best['miou']:.2f} % {best['setting']}",
        spacing=0.22,
    )
