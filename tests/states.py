"""A tiny train state on any mesh, and runs of it, for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import checkpoint

TX = optax.adamw(1e-3)


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    extra: Any


def init(step=0, width=16):
    kernel = jnp.sin(jnp.arange(8 * width, dtype=jnp.float32) + step).reshape(8, width)
    params = {"dense": {"kernel": kernel, "bias": jnp.full((width,), float(step))}}
    return State(jnp.int32(step), params, TX.init(params), {"seen": jnp.arange(4)})


def target(devices=8, width=16):
    """Return shapes on a mesh of the first devices, with the leading axis split if it can be."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",), axis_types=(AxisType.Auto,))

    def placed(x):
        spec = P("fsdp") if x.ndim and x.shape[0] % devices == 0 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(lambda: init(width=width)))


def state_of(step, devices=8):
    """Return the state of a step on the first devices, of one host or of several."""
    host = jax.device_get(init(step))
    return jax.tree.map(
        lambda x, like: jax.make_array_from_callback(
            np.shape(x), like.sharding, lambda index: np.asarray(x)[index]
        ),
        host,
        target(devices),
    )


def save_steps(workdir, *steps, **kwargs):
    """Make a finished run with checkpoints of these steps."""
    with checkpoint.Checkpointer(workdir, **{"keep": 9} | kwargs) as run:
        for step in steps:
            run.save(step, state_of(step))


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def data_files(workdir, step):
    """Return the files with the arrays' bytes, largest first."""
    files = (Path(workdir) / "checkpoints" / str(step) / "state").glob("**/d/*")
    return sorted(files, key=lambda f: -f.stat().st_size)


def flip(workdir, step=20):
    """Flip one bit of a checkpoint."""
    file = data_files(workdir, step)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
