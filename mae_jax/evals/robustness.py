"""Robustness of an ImageNet classifier: its accuracy on ImageNet-V2, -A, -R, -Sketch and -C."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data import crops, robustness
from mae_jax.data.sources import NotPrepared, Source
from mae_jax.distributed import log_once
from mae_jax.errors import UserError, nearest
from mae_jax.evals.features import Extractor, open_labelled

SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")
# Sets with images of few classes, which alone are told apart, as their papers do
SUBSETS = {"imagenet_a": robustness.IMAGENET_A, "imagenet_r": robustness.IMAGENET_R}


def correct(logits_BY: np.ndarray, label_B: np.ndarray, classes_K: np.ndarray) -> np.ndarray:
    """Whether, of the logits of some classes, that of the true one is the largest; bool (B,).

    Of equal ones the first wins. An image with a logit that is not a number counts as wrong.

    Args:
      label_B: classes, from 0 to Y - 1.
      classes_K: those that compete, rising.
    """
    chosen_BK = logits_BY[:, classes_K]
    known_B = ~np.isnan(chosen_BK).any(1)
    return known_B & (classes_K[chosen_BK.argmax(1)] == label_B)


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE in percent: the mean over corruptions of the error divided by AlexNet's.

    Args:
      errors: of each of `robustness.CORRUPTIONS`, error rates of the five severities, 0 to 1.
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
      config: the whole config.
      predict: its "logits" is used.
      mesh: where the state lives.

    Raises:
      UserError: none of the sets is there, or one has a class that the model does not know.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        if "logits" not in predict:
            raise UserError(f"robustness is that of a classifier{nearest('logits', [*predict])}")
        data = config.data
        self._data_dir, self._corrupted = data.data_dir, cfg.imagenet_c
        self._names = open_labelled(data.source, data.split, data.data_dir).class_names or []
        self._sets: dict[str, Source] = {}
        self._corruptions: list[str] = []
        left_out = []
        for name in filter(cfg.get, SETS):
            split = "train" if cfg[name].startswith("folder:") else "test"
            try:
                self._sets[name] = open_labelled(cfg[name], split, data.data_dir)
            except NotPrepared as error:
                left_out.append(f"{name} is left out: {error}")
                continue
            self._labels(self._sets[name], name)
        if self._corrupted:
            self._corruptions, absent = robustness.find_corruptions(self._corrupted, data.data_dir)
            if absent:
                left_out.append(
                    f"imagenet_c has no mCE: {self._corrupted} lacks {', '.join(absent[:3])}"
                    f"{', ...' if len(absent) > 3 else ''}"
                )
            for name in self._corruptions[:1]:
                self._labels(self._open(name, 1), "imagenet_c")
        else:
            left_out.append(f"imagenet_c is left out: {robustness.HOW_TO_GET_C}")
        if not self._sets and not self._corruptions:
            raise UserError("there is nothing to measure:\n  " + "\n  ".join(left_out))
        for line in left_out:
            log_once(line)
        extractor: Any = dict(compute=predict["logits"], mesh=mesh, batch_size=cfg.batch_size)
        self._extractor = Extractor(config, **extractor)
        self._uncropped = Extractor(config, **extractor, crop=crops.full)

    def _open(self, corruption: str, severity: int) -> Source:
        return robustness.open_corruption(self._corrupted, corruption, severity, self._data_dir)

    def _labels(self, source: Source, what: str) -> np.ndarray:
        """Of each class of a source, its place among those of the model."""
        return robustness.positions(source.class_names or [], self._names, what)

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars, on every host, and no pictures.

        eval/SET_top1, eval/SET_images: percent, and how many images were classified.
        eval/imagenet_c_error_CORRUPTION: mean over the severities, percent. eval/imagenet_c_mce,
        eval/imagenet_c_top1 (the mean accuracy), eval/imagenet_c_images: of the 15 corruptions of
        the benchmark, if all are there.

        Raises:
          UserError: no image of a set can be read; a part of ImageNet-C has another number of
            images than the others.
        """
        scalars: dict[str, float] = {}
        everything = np.arange(len(self._names))
        for name, source in self._sets.items():
            competing = everything
            if name in SUBSETS:
                competing = np.sort(robustness.positions(SUBSETS[name], self._names, name))
            right, images = self._count(self._extractor, state, source, name, competing)
            scalars |= {f"eval/{name}_top1": 100 * right / images, f"eval/{name}_images": images}
            log_once(f"{name}: top-1 accuracy {100 * right / images:.2f} % of {images:,} images")

        errors: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for name in self._corruptions:
            errors[name] = []
            for severity in robustness.SEVERITIES:
                what = f"imagenet_c {name}/{severity}"
                source = self._open(name, severity)
                right, images = self._count(self._uncropped, state, source, what, everything)
                errors[name].append(1 - right / images)
                sizes[what] = images
                first = next(iter(sizes))
                if images != sizes[first]:
                    raise UserError(
                        f"{what} has {images:,} images that can be read, and {first}"
                        f" {sizes[first]:,}: unpack it again"
                    )
            scalars[f"eval/imagenet_c_error_{name}"] = 100 * float(np.mean(errors[name]))
            each = ", ".join(f"{100 * error:.2f}" for error in errors[name])
            log_once(f"imagenet_c {name}: errors {each} %")
        if errors.keys() >= set(robustness.CORRUPTIONS):
            plain = [errors[name] for name in robustness.CORRUPTIONS]
            scalars["eval/imagenet_c_mce"] = mean_corruption_error(errors)
            scalars["eval/imagenet_c_top1"] = 100 * (1 - float(np.mean(plain)))
            scalars["eval/imagenet_c_images"] = images * len(robustness.SEVERITIES) * len(plain)
        return scalars, {}

    def _count(
        self, extractor: Extractor, state: Any, source: Source, what: str, competing: np.ndarray
    ) -> tuple[int, int]:
        """How many images of a source are classified right, and how many can be read."""
        labels = self._labels(source, what)
        right = images = 0
        for batch in extractor.batches(state, source):
            found = extractor.fetch(batch)
            label = labels[found.label[found.counted]]
            right += int(correct(found.x[found.counted], label, competing).sum())
            images += len(label)
        if not images:
            raise UserError(f"no image of {what} can be read: there is nothing to measure")
        return right, images
