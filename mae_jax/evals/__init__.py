"""Evaluators: each turns a training state into scalars and pictures, and may keep `results`."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import nearest, resolve

TYPES = ("accuracy", "fewshot", "knn", "probe", "reconstruct", "robustness")


def build(config: ConfigDict, predict: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The evaluators of `config.evals` by name; `type` is a module here or a dotted path to one.

    Raises:
      ValueError: there is no such module.
    """
    evaluators = {}
    for name, cfg in config.evals.items():
        if "." not in cfg.type and cfg.type not in TYPES:
            raise ValueError(
                f"config.evals.{name}.type={cfg.type!r} is unknown{nearest(cfg.type, list(TYPES))}"
            )
        path = cfg.type if "." in cfg.type else f"{__name__}.{cfg.type}"
        evaluators[name] = resolve(f"{path}.Evaluator", None)(cfg, config, predict, mesh)
    return evaluators
