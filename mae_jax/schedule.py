"""The durations of a run: when it logs, saves, evaluates and ends."""

import dataclasses
from collections.abc import Mapping
from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import steps
from mae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a run, in steps; an interval of 0 means only at the end."""

    total: int
    steps_per_epoch: int
    log_every: int
    save_every: int
    keep_every: int
    eval_every: Mapping[str, int]

    @classmethod
    def from_config(cls, config: ConfigDict, steps_per_epoch: int) -> "Schedule":
        """Resolve the durations of a config.

        Raises:
          UserError: one is no duration, or keep_every is no multiple of checkpoint.every.
        """
        in_steps = partial(steps, batch_size=config.batch_size, steps_per_epoch=steps_per_epoch)
        every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
        if in_steps(every) and in_steps(keep_every) % in_steps(every):
            raise UserError(
                f"config.checkpoint: keep_every={keep_every!r} ({in_steps(keep_every)} steps)"
                f" is not a multiple of every={every!r} ({in_steps(every)} steps)"
            )
        return cls(
            in_steps(config.train_for),
            steps_per_epoch,
            in_steps(config.log_every),
            in_steps(every),
            in_steps(keep_every),
            {name: in_steps(cfg.every) for name, cfg in config.evals.items()},
        )

    def due(self, step: int, every: int) -> bool:
        """Return whether what happens every `every` steps, and at the end, is due at `step`."""
        return step == self.total or bool(every and step % every == 0)
