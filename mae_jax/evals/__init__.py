"""Evaluators: each turns a training state into a `Report`.

`config.evals.NAME.type` is a module here with a class `Evaluator`, or a dotted path to another.
"""

import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

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
      files: file name in the workdir -> a function that makes its bytes from what only the loop
        knows of the evaluation: `step`, `checkpoint` (a path or None) and `started` (how the run
        began). Called on host 0.
    """

    scalars: Mapping[str, float]
    images: Mapping[str, np.ndarray] = {}
    files: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {}


def build(config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh) -> dict[str, Any]:
    """Return the evaluators of `config.evals` by name; each has run(state) -> Report.

    Args:
      predict: the functions (params, extra, batch) -> outputs of the task, by name.
      mesh: where the state lives.

    Raises:
      UserError: there is no such type, or two evaluators report under the same names.
    """
    require_distinct(config.evals)
    return {
        name: resolve(cfg.type, sys.modules[__name__], "Evaluator")(cfg, config, predict, mesh)
        for name, cfg in config.evals.items()
    }


def reported(cfg: Mapping[str, Any]) -> set[str]:
    """Return the metric names of an evaluator of this package that another may have too.

    config.evals.NAME.prefix, which all but robustness and reconstruct have, is their first part.
    """
    prefix = "eval" if cfg["type"] == "reconstruct" else cfg.get("prefix", "eval")
    if cfg["type"] in ("accuracy", "probe", "reconstruct"):
        return {f"{prefix}/loss", f"{prefix}/images"}
    numbers = {"knn": cfg.get("ks"), "fewshot": cfg.get("shots")}.get(cfg["type"]) or ()
    return {f"{prefix}/{cfg['type']}{number}_{cfg['feature']}" for number in numbers}


def require_distinct(evaluations: Mapping[str, Any]) -> None:
    """Raise UserError if two of config.evals would overwrite each other's numbers."""
    for (one, first), (other, second) in combinations(evaluations.items(), 2):
        if same := reported(first) & reported(second):
            name = one if second["type"] == "reconstruct" else other
            way_out = f"give one another prefix, such as config.evals.{name}.prefix='eval_{name}'"
            if first["type"] == second["type"] == "reconstruct":
                way_out = "leave one to a run of its own"
            raise UserError(
                f"config.evals.{one} and config.evals.{other} would both report"
                f" {' and '.join(sorted(same))}: {way_out}"
            )
