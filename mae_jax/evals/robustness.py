"""Robustness of an ImageNet classifier: its accuracy on ImageNet-V2, -A, -R, -Sketch and -C."""

from collections.abc import Callable, Mapping
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
from mae_jax.evals.features import Crop, Extractor

SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")


def correct(logits_BY: np.ndarray, label_B: np.ndarray, classes_K: np.ndarray) -> np.ndarray:
    """Return whether the true class has the largest of the logits of some classes; bool (B,).

    Of equal ones the first wins. An image with a logit that is not a number counts as wrong.
    """
    chosen_BK = logits_BY[:, classes_K]
    return (classes_K[chosen_BK.argmax(1)] == label_B) & ~np.isnan(chosen_BK).any(1)


class Evaluator:
    """Accuracy on every set that is there; a missing one is left out, with what to do about it.

    Images of ImageNet-C are crops of 224 pixels already: they are taken as they are, or resized for
    a model of another image size. On ImageNet-A and -R the logits of their 200 classes compete, on
    the others those of all classes.

    Args:
      cfg: in place of `source` and `split` those of SETS, each a tfds dataset or "folder:PATH" with
        class folders, and `imagenet_c`, see `robustness.find_corruptions`; '' = is not measured.
      predict: its "logits" is used.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        if "logits" not in predict:
            raise UserError(f"robustness is that of a classifier{nearest('logits', predict)}")
        data = config.data
        self._imagenet_c, self._data_dir = cfg.imagenet_c, data.data_dir
        self._classes = open_labelled(data.source, data.split, data.data_dir).class_names or []
        self._sets: dict[str, Source] = {}
        self._corruptions: list[str] = []
        missing = []
        for name in filter(cfg.get, SETS):
            split = "train" if cfg[name].startswith("folder:") else "test"
            try:
                self._sets[name] = open_labelled(cfg[name], split, data.data_dir)
            except NotPrepared as error:
                missing.append(f"{name} is left out: {error}")
        if cfg.imagenet_c:
            self._corruptions, absent = robustness.find_corruptions(cfg.imagenet_c, data.data_dir)
            if absent:
                missing.append(f"imagenet_c has no mCE: it lacks {', '.join(absent[:3])}, ...")
        else:
            missing.append(f"imagenet_c is left out: {robustness.HOW_TO_GET_C}")
        if not self._sets and not self._corruptions:
            raise UserError("there is nothing to measure:\n  " + "\n  ".join(missing))
        for line in missing:
            log_once(line)
        for name, source in self._sets.items():
            self._positions(source, name)
        if self._corruptions:
            self._positions(self._open(self._corruptions[0], 1), "imagenet_c")
        self._extractor = Extractor(config, predict["logits"], mesh, cfg.batch_size)

    def _open(self, corruption: str, severity: int) -> Source:
        return robustness.open_corruption(self._imagenet_c, corruption, severity, self._data_dir)

    def _positions(self, source: Source, name: str) -> np.ndarray:
        """Return where each class of a set stands among those of the model."""
        return robustness.positions(source.class_names or [], self._classes, name)

    def run(self, state: Any) -> Report:
        """Return the accuracies of a TrainState on every set.

        eval/SET_top1, eval/SET_images: percent, and how many images were classified.
        eval/imagenet_c_error_CORRUPTION: mean over the severities, percent. If all 15 corruptions
        of the benchmark are there also eval/imagenet_c_mce (the mean of the errors over those of
        AlexNet, percent), eval/imagenet_c_top1 (the mean accuracy) and eval/imagenet_c_images.
        """
        scalars: dict[str, float] = {}
        for name, source in self._sets.items():
            right_N = self._classify(state, source, name)
            scalars[f"eval/{name}_top1"] = 100 * float(right_N.mean())
            scalars[f"eval/{name}_images"] = len(right_N)
        return Report(scalars | self._measure_corruptions(state))

    def _measure_corruptions(self, state: Any) -> dict[str, float]:
        """Return the scalars of ImageNet-C."""
        errors: dict[str, float] = {}
        images = 0
        for name in self._corruptions:
            each = []
            for severity in robustness.SEVERITIES:
                part, source = f"imagenet_c {name}/{severity}", self._open(name, severity)
                right_N = self._classify(state, source, part, crops.full)
                each.append(1 - right_N.mean())
                images = images or len(right_N)
                if len(right_N) != images:
                    raise UserError(
                        f"{part} has {len(right_N):,} images that can be read, and the parts before"
                        f" it {images:,}: unpack it again"
                    )
            errors[name] = float(np.mean(each))
        scalars = {f"eval/imagenet_c_error_{name}": 100 * error for name, error in errors.items()}
        if errors.keys() >= robustness.ALEXNET.keys():
            benchmark = np.array([errors[name] for name in robustness.ALEXNET])
            ratios = benchmark / np.array(list(robustness.ALEXNET.values()))
            scalars["eval/imagenet_c_mce"] = 100 * float(ratios.mean())
            scalars["eval/imagenet_c_top1"] = 100 * float(1 - benchmark.mean())
            scalars["eval/imagenet_c_images"] = images * ratios.size * len(robustness.SEVERITIES)
        return scalars

    def _classify(
        self, state: Any, source: Source, name: str, crop: Crop = crops.center
    ) -> np.ndarray:
        """Return whether each readable image of a source is classified right; bool (N,)."""
        positions = self._positions(source, name)
        competing = np.arange(len(self._classes))
        if name in robustness.SUBSETS:
            competing = np.sort(robustness.positions(robustness.SUBSETS[name], self._classes, name))
        right_N = np.concatenate(
            [
                correct(logits_BY, positions[label_B], competing)
                for logits_BY, label_B in self._extractor.rows(state, source, crop)
            ]
        )
        log_once(f"{name}: top-1 accuracy {right_N.mean():.2%} of {len(right_N):,} images")
        return right_N
