"""Small configs, batches, meshes and runs that several tests share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from mae_jax import checkpoint, provenance, sharding, tasks, train
from mae_jax.commands.running import run as run_config
from mae_jax.configs import finetune, linprobe, pretrain
from mae_jax.mesh import AXES
from mae_jax.tasks import init_from

MODEL = dict(width=32, depth=2, heads=4, patch_size=(8, 8), channels=1, dtype="float32")
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=4)
GREY = dict(mean=(0.5,), std=(0.5,))
SHAPES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]  # data, fsdp, tensor


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return a random uint8 image; [H, W] with 0 channels."""
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def tiny_config(**changes) -> ConfigDict:
    """Return a pre-training of ten steps on digits."""
    config = pretrain.get_config("batch_size=16,image_size=32")
    config.model.update(MODEL | DECODER)
    config.train_for, config.optim.warmup = "10 steps", "2 steps"
    config.data.update(GREY, source="bundled:digits")
    config.update(changes)
    return config


def finetune_config(arg: str = "", **model) -> ConfigDict:
    """Return the recipe from scratch, unless the argument names something to start from."""
    arg = arg or "scratch=true"
    config = finetune.get_config(f"source=bundled:digits,test=test,batch_size=16,{arg}")
    config.model.update(MODEL | {"image_size": (16, 16)} | model)
    config.data.update(GREY)
    config.mix.group = 8
    config.train_for, config.optim.warmup, config.log_every = "4 steps", "1 steps", "1 steps"
    config.checkpoint.every = "4 steps"
    for cfg in config.evals.values():
        cfg.update(every="4 steps", split="test[:50]", batch_size=16)
    return config


def probe_config(**changes) -> ConfigDict:
    """Return a probe of digits, with a sweep of three rates."""
    arg = "init=x,source=bundled:digits,test=test,epochs=2,batch_size=32,select=20"
    config = linprobe.get_config(arg)
    config.model.update(MODEL | {"image_size": (32, 32)})
    config.data.update(GREY)
    config.probe.update(bn_group=8, attention_heads=2)
    config.optim.update(warmup="1 steps", sweep=(0.02, 0.5))
    config.update_from_flattened_dict(changes)
    return config


def probe_of(workdir, **changes) -> ConfigDict:
    """Return a probe of one epoch of the run in a workdir."""
    arg = "source=bundled:digits,test=test[:40],epochs=1,batch_size=64,select=20"
    config = linprobe.get_config(f"init={workdir},{arg}")
    config.optim.warmup = "2 steps"
    config.checkpoint.update(every="5 steps", keep_every="")
    config.update_from_flattened_dict(changes)
    return config


def random_params(init, *args, seed=0):
    """Return parameters that are all random, so that none is hidden by a zero; scales are around 1.

    Drawn without JAX, which would compile a program for each shape.
    """
    shapes = jax.eval_shape(init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, x):
        values = rng.normal(size=x.shape) / 3
        return jnp.asarray(values + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def mesh_of(data, fsdp, tensor) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_of(config, seed=0) -> dict[str, np.ndarray]:
    """Return a random batch with labels 0 to 9, on the host."""
    rng = np.random.default_rng(seed)
    shape = (config.batch_size, *config.model.image_size, config.model.channels)
    return {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, 10, config.batch_size).astype(np.int32),
    }


def task_on(config, mesh) -> train.Task:
    return tasks.build(config, mesh)


def fresh_state(config, mesh):
    """Return a task on a mesh and its first state, in its shards."""
    task = task_on(config, mesh)
    return task, train.lay_out(task, task.optimizer(10, 100)[0], config.seed, mesh)[1]()


def compiled(config, mesh):
    """Return a task on a mesh, its first state and its compiled step."""
    task = task_on(config, mesh)
    tx, _ = task.optimizer(10, 100)
    shapes, init = train.lay_out(task, tx, config.seed, mesh)
    sizes = dict(batch_size=config.batch_size, grad_accum=config.grad_accum, seed=config.seed)
    return task, init(), train.compile_step(task, tx, mesh, shapes, **sizes)


def updates(config, mesh, steps):
    """Return the states before the first and after each update, and each update's metrics."""
    task, state, step = compiled(config, mesh)
    states, metrics = [jax.device_get(state)], []
    for i in range(steps):
        batch = {name: x for name, x in batch_of(config, i).items() if name in task.examples.inputs}
        state, values = step(state, sharding.put_batch(mesh, batch, config.batch_size))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def run(config, workdir, shape=None):
    """Run a config in a workdir, on a mesh of this shape or of all devices."""
    if shape is None:
        return run_config(config, workdir)
    config.mesh.update(dict(zip(AXES, shape, strict=True)))
    return run_config(config, workdir, devices=jax.devices()[: int(np.prod(shape))])


def save_workdir(config, workdir, state):
    """Write a workdir with its config and one checkpoint, of step 0; return the workdir."""
    provenance.prepare_workdir(workdir, config)
    saver = checkpoint.Checkpointer(workdir)
    saver.save(0, state)
    saver.close()
    return workdir


def load_encoder_into(config, workdir):
    """Return the encoder that a task would start from, on one device."""
    task = tasks.build(config)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])["encoder"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    return init_from.load_encoder(checkpoint.find(workdir, "init_from"), target, task.spec)


def assert_trees_equal(ours, theirs, **tolerance):
    """Assert that two trees are equal, or as close as the tolerance says."""
    compare = partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(compare if tolerance else np.testing.assert_array_equal, ours, theirs)
