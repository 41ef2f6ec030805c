"""Evaluators: each turns a training state into scalars and pictures, and may keep `results`."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import nearest, resolve

TYPES = ("accuracy", "fewshot", "knn", "probe", "reconstruct", "robustness")


def reported(cfg: Mapping[str, Any]) -> set[str]:
    """Names under which an evaluator of this package reports, as far as others may have the same.

    config.evals.NAME.prefix, which all but robustness and reconstruct have, is their first part.
    """
    prefix = "eval" if cfg["type"] == "reconstruct" else cfg.get("prefix", "eval")
    if cfg["type"] in ("accuracy", "probe", "reconstruct"):
        return {f"{prefix}/loss", f"{prefix}/images"}
    numbers = {"knn": cfg.get("ks"), "fewshot": cfg.get("shots")}.get(cfg["type"]) or ()
    return {f"{prefix}/{cfg['type']}{number}_{cfg['feature']}" for number in numbers}


def require_distinct(evaluations: Mapping[str, Any]) -> None:
    """Raises ValueError if two of config.evals would overwrite each other's numbers."""
    for (one, first), (other, second) in combinations(evaluations.items(), 2):
        if same := reported(first) & reported(second):
            name = one if second["type"] == "reconstruct" else other
            way_out = f"give one another prefix, such as config.evals.{name}.prefix='eval_{name}'"
            if first["type"] == second["type"] == "reconstruct":
                way_out = "leave one to a run of its own"
            raise ValueError(
                f"config.evals.{one} and config.evals.{other} would both report"
                f" {' and '.join(sorted(same))}: {way_out}"
            )


def build(config: ConfigDict, predict: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The evaluators of `config.evals` by name; `type` is a module here or a dotted path to one.

    Raises:
      ValueError: there is no such module, or two evaluators report under the same names.
    """
    require_distinct(config.evals)
    evaluators = {}
    for name, cfg in config.evals.items():
        if "." not in cfg.type and cfg.type not in TYPES:
            raise ValueError(
                f"config.evals.{name}.type={cfg.type!r} is unknown{nearest(cfg.type, list(TYPES))}"
            )
        path = cfg.type if "." in cfg.type else f"{__name__}.{cfg.type}"
        evaluators[name] = resolve(f"{path}.Evaluator", None)(cfg, config, predict, mesh)
    return evaluators
