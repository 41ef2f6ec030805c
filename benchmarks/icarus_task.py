"""Pre-training that starts as IcarusWizard's MAE does, for `config.task` of the learning benchmark.

Matrices and biases of linear layers start uniform within 1 / sqrt(inputs), as PyTorch's do, the
encoder's positions are learned from normal(0.02), and weight decay is on all parameters.
"""

from dataclasses import dataclass, replace

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import optim
from mae_jax.tasks import common, pretrain

EVERY_ROLE = tuple({role for _, role in optim.ROLES})


@dataclass(frozen=True)
class Task(pretrain.Task):
    @classmethod
    def from_config(cls, config, mesh=None):
        task = super().from_config(config, mesh)
        encoder = replace(task.spec.encoder, trained_positions=True)
        return replace(task, network=task.network.clone(spec=replace(task.spec, encoder=encoder)))

    def init(self, rng):
        params, extra = super().init(rng)
        flat = flatten_dict(params)
        for number, (path, x) in enumerate(flat.items()):
            key = jax.random.fold_in(rng, number)
            kernel = flat.get((*path[:-1], "kernel"))  # None: of a LayerNorm, a token, a position
            if kernel is not None and path[-2:] != ("qkv", "bias"):
                bound = inputs(path, kernel.shape) ** -0.5
                flat[path] = jax.random.uniform(key, x.shape, x.dtype, -bound, bound)
            elif path == ("encoder", "pos_embed"):
                flat[path] = (0.02 * jax.random.normal(key, x.shape)).at[:, 0].set(0)
        return unflatten_dict(flat), extra

    def optimizer(self, total_steps, steps_per_epoch):
        batch_size = self.examples.batch_size
        schedule = common.learning_rate(self.optim, batch_size, total_steps, steps_per_epoch)
        return common.optimizer(self.optim, schedule, decayed=EVERY_ROLE), schedule


def inputs(path, shape):
    """Return the number of inputs of a linear layer; those of blocks have a layer axis."""
    stacked = "blocks" in path
    return shape[1] * shape[2] if path[-2] == "proj" else shape[stacked]
