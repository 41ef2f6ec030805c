"""Robustness of an ImageNet classifier: its accuracy on ImageNet-V2, -A, -R, -Sketch and -C."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data import crops, robustness
from mae_jax.data.labels import open_labelled
from mae_jax.data.sources import NotPrepared, Source
from mae_jax.distributed import log_once
from mae_jax.errors import UserError, nearest
from mae_jax.evals import Report
from mae_jax.evals.features import Crop, Extractor, require_images

SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")


def correct(logits_BY: np.ndarray, label_B: np.ndarray, classes_K: np.ndarray) -> np.ndarray:
    """Return whether the true class has the largest of the logits of some classes; bool (B,).

    Of equal ones the first wins. An image with a logit that is not a number counts as wrong.

    Args:
      label_B: classes, from 0 to Y - 1.
      classes_K: those that compete, rising.
    """
    chosen_BK = logits_BY[:, classes_K]
    known_B = ~np.isnan(chosen_BK).any(1)
    return known_B & (classes_K[chosen_BK.argmax(1)] == label_B)


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Return the mCE in percent: the mean over corruptions of the error over AlexNet's error.

    Args:
      errors: corruption -> error rates of the five severities, 0 to 1.
    """
    ratios = [np.mean(errors[name]) / alexnet for name, alexnet in robustness.ALEXNET.items()]
    return 100 * float(np.mean(ratios))


class Evaluator:
    """Classifies the images of every set that is there; of one that is not, says what to do.

    ImageNet-V2, -A, -R and -Sketch are resized and cropped as in evaluation elsewhere. Images of
    ImageNet-C are crops of 224 pixels already: they are taken as they are, or resized for a model
    of another image size. On ImageNet-A and -R the logits of their 200 classes compete, on the
    others those of all classes.

    Args:
      cfg: `imagenet_v2`, `imagenet_a`, `imagenet_r`, `imagenet_sketch`: a tfds dataset or
        "folder:PATH" with class folders; `imagenet_c`: see `robustness.find_corruptions`; '' = is
        not measured; `batch_size`.
      predict: its "logits" is used.

    Raises:
      UserError: none of the sets is there, or one has a class that the model does not know.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        if "logits" not in predict:
            raise UserError(f"robustness is that of a classifier{nearest('logits', predict)}")
        data = config.data
        self._cfg, self._data_dir = cfg, data.data_dir
        self._classes = open_labelled(data.source, data.split, data.data_dir).class_names or []
        self._sets, missing_sets = self._open_sets()
        self._corruptions, missing_corruptions = self._find_corruptions()
        missing = missing_sets + missing_corruptions
        if not self._sets and not self._corruptions:
            raise UserError("there is nothing to measure:\n  " + "\n  ".join(missing))
        for line in missing:
            log_once(line)
        self._extractor = Extractor(config, predict["logits"], mesh, cfg.batch_size)

    def _open_sets(self) -> tuple[dict[str, Source], list[str]]:
        """Return the sets that are there, and a line for each that is not."""
        sets, missing = {}, []
        for name in filter(self._cfg.get, SETS):
            source = self._cfg[name]
            split = "train" if source.startswith("folder:") else "test"
            try:
                sets[name] = open_labelled(source, split, self._data_dir)
            except NotPrepared as error:
                missing.append(f"{name} is left out: {error}")
                continue
            self._positions(sets[name].class_names, name)
        return sets, missing

    def _find_corruptions(self) -> tuple[list[str], list[str]]:
        """Return the complete corruptions of ImageNet-C, and a line if some are missing."""
        source = self._cfg.imagenet_c
        if not source:
            return [], [f"imagenet_c is left out: {robustness.HOW_TO_GET_C}"]
        corruptions, absent = robustness.find_corruptions(source, self._data_dir)
        if corruptions:
            self._positions(self._open(corruptions[0], 1).class_names, "imagenet_c")
        if not absent:
            return corruptions, []
        parts = f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"
        return corruptions, [f"imagenet_c has no mCE: {source} lacks {parts}"]

    def _open(self, corruption: str, severity: int) -> Source:
        source = self._cfg.imagenet_c
        return robustness.open_corruption(source, corruption, severity, self._data_dir)

    def _positions(self, names: Sequence[str] | None, name: str) -> np.ndarray:
        """Return where each class of a set stands among those of the model."""
        return robustness.positions(names or [], self._classes, name)

    def run(self, state: Any) -> Report:
        """Return the accuracies of a TrainState on every set.

        eval/SET_top1, eval/SET_images: percent, and how many images were classified.
        eval/imagenet_c_error_CORRUPTION: mean over the severities, percent. eval/imagenet_c_mce,
        eval/imagenet_c_top1 (the mean accuracy), eval/imagenet_c_images: of the 15 corruptions of
        the benchmark, if all are there.

        Raises:
          UserError: no image of a set can be read; a part of ImageNet-C has another number of
            images than the others.
        """
        scalars: dict[str, float] = {}
        for name, source in self._sets.items():
            right, images = self._count(state, source, name)
            scalars |= {f"eval/{name}_top1": 100 * right / images, f"eval/{name}_images": images}
        return Report(scalars | self._measure_corruptions(state))

    def _measure_corruptions(self, state: Any) -> dict[str, float]:
        """Return the scalars of ImageNet-C."""
        scalars: dict[str, float] = {}
        errors: dict[str, list[float]] = {name: [] for name in self._corruptions}
        images: dict[str, int] = {}
        for name in self._corruptions:
            for severity in robustness.SEVERITIES:
                part, source = f"imagenet_c {name}/{severity}", self._open(name, severity)
                right, images[part] = self._count(state, source, part, crops.full)
                errors[name].append(1 - right / images[part])
                first = next(iter(images))
                if images[part] != images[first]:
                    raise UserError(
                        f"{part} has {images[part]:,} images that can be read, and {first}"
                        f" {images[first]:,}: unpack it again"
                    )
            scalars[f"eval/imagenet_c_error_{name}"] = 100 * float(np.mean(errors[name]))
        if errors.keys() >= set(robustness.CORRUPTIONS):
            benchmark = [errors[name] for name in robustness.CORRUPTIONS]
            scalars["eval/imagenet_c_mce"] = mean_corruption_error(errors)
            scalars["eval/imagenet_c_top1"] = 100 * (1 - float(np.mean(benchmark)))
            scalars["eval/imagenet_c_images"] = images[first] * np.size(benchmark)
        return scalars

    def _count(
        self, state: Any, source: Source, name: str, crop: Crop = crops.center
    ) -> tuple[int, int]:
        """Return how many images of a source are classified right, and how many can be read."""
        positions = self._positions(source.class_names, name)
        competing = np.arange(len(self._classes))
        if name in robustness.SUBSETS:
            competing = np.sort(self._positions(robustness.SUBSETS[name], name))
        right = images = 0
        for logits_BY, label_B in self._extractor.rows(state, source, crop):
            right += int(correct(logits_BY, positions[label_B], competing).sum())
            images += len(label_B)
        require_images(images, name)
        log_once(f"{name}: top-1 accuracy {100 * right / images:.2f} % of {images:,} images")
        return right, images
