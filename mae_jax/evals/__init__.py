"""Evaluators: each measures a training state and returns a `Report`.

`config.evals.NAME.type` is a module here with a class `Evaluator`, or a dotted path to one of a
fork, such as "my_fork.evals".
"""

import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import resolve
from mae_jax.errors import UserError


class Report(NamedTuple):
    """The outcome of one evaluation, the same on every host.

    Args:
      scalars: metric name -> number, such as "eval/top1".
      images: name -> uint8 HWC picture; only host 0 needs them.
      files: file name in the workdir -> a function that returns the file's bytes, called on host
        0 with facts that only the loop knows: `step`, `checkpoint` (the path that the state is
        saved as, or None) and `started` (how the run began).
    """

    scalars: Mapping[str, float]
    images: Mapping[str, np.ndarray] = {}
    files: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {}


class Evaluator(Protocol):
    """A measure of a state: made once, before the first update, and run whenever it is due.

    Args:
      cfg: config.evals.NAME. All evaluators here have `batch_size`, and all but robustness have
        `source` ('' = that of the training images) and `split`. All but robustness may have
        `prefix`, with which their metric names begin ("eval"). `every` is the loop's.
      config: the whole config: images, model, sources.
      predict: the functions (params, extra, batch) -> outputs of the task, by name. "features"
        gives `cls` and `mean` (B, D); "block_features", which a task may leave out, gives them
        after each block (depth, B, D), the last as in "features"; "patch_features", whose fourth
        argument is a block from 1 on, the patch tokens after it (B, L, D); "logits" (B, Y);
        "segmentation" logits of each patch (B, rows, columns, Y);
        "reconstruction", of a batch with mask scores, latent_BND, pred_BLT, target_BLT and mask_BL.
      mesh: where the state and the batches live.

    Raises:
      UserError: what `cfg` asks for cannot be measured.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ): ...

    def run(self, state: Any) -> Report:
        """Measure a TrainState; every host calls this at the same step."""
        ...


def build(config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh) -> dict[str, Evaluator]:
    """Return the evaluators of `config.evals` by name."""
    require_distinct(config.evals)
    return {
        name: resolve(cfg.type, sys.modules[__name__], member="Evaluator")(
            cfg, config, predict, mesh
        )
        for name, cfg in config.evals.items()
    }


def reported(cfg: Mapping[str, Any]) -> set[str]:
    """Return those metric names of an evaluator of this package that another could report too."""
    prefix = cfg.get("prefix", "eval")
    if cfg["type"] in ("accuracy", "probe", "reconstruct"):
        return {f"{prefix}/loss", f"{prefix}/images"}
    if cfg["type"] == "logistic":
        return {f"{prefix}/logistic_{cfg['feature']}"}
    if cfg["type"] == "segment":
        return {f"{prefix}/miou"}
    if cfg["type"] == "patch_logistic":
        return {f"{prefix}/miou_logistic"}
    if cfg["type"] == "patch_knn":
        kinds = [x.strip() for x in str(cfg["distances"]).split(",")]
        return {f"{prefix}/miou_knn{k}_{kind}" for k in cfg["ks"] for kind in kinds}
    numbers = {"knn": cfg.get("ks"), "fewshot": cfg.get("shots")}.get(cfg["type"]) or ()
    return {f"{prefix}/{cfg['type']}{number}_{cfg['feature']}" for number in numbers}


def require_distinct(evaluations: Mapping[str, Any]) -> None:
    """Raise UserError if two of config.evals would report numbers under the same name."""
    for (one, first), (other, second) in combinations(evaluations.items(), 2):
        if same := reported(first) & reported(second):
            name = one if second["type"] == "reconstruct" else other
            raise UserError(
                f"config.evals.{one} and config.evals.{other} would both report"
                f" {' and '.join(sorted(same))}: give one another prefix, such as"
                f" config.evals.{name}.prefix='eval_{name}', or leave one to another run"
            )
