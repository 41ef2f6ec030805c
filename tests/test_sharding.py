"""Where arrays live: meshes, rules, rows of hosts, and what the compiled step sends around."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import compiled, mesh_of, tiny_config

from mae_jax import sharding, tasks, train
from mae_jax.mesh import AXES, make_mesh, sizes_of
from mae_jax.models.block import Attention
from mae_jax.models.compute import ComputeConfig

COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collective_shapes(mesh) -> list[tuple[int, ...]]:
    """The shape of every array that a collective of the compiled step returns."""
    *_, step = compiled(tiny_config(), mesh)
    results = [m[1] for m in map(COLLECTIVE.search, step.as_text().splitlines()) if m]
    shapes = [s for r in results for s in re.findall(r"[a-z]+[0-9]*\[([0-9,]*)\]", r)]
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def activations(shapes):
    """5 tokens enter the encoder and 17 the decoder; no parameter has such a side."""
    return [shape for shape in shapes if {5, 17} & set(shape)]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 4, 1)], ids=str)
def test_no_collective_touches_an_activation(shape):
    shapes = collective_shapes(mesh_of(*shape))
    assert shapes and not activations(shapes)


def test_without_the_constraint_xla_sends_activations_around(monkeypatch):
    monkeypatch.setattr(sharding, "constrain_batch", lambda mesh: lambda x: x)
    assert activations(collective_shapes(mesh_of(1, 8, 1)))


@pytest.mark.parametrize("split_heads", [True, False])
def test_devices_that_share_heads_do_not_gather_the_kernel_of_all_heads(split_heads):
    mesh = mesh_of(1, 1, 4)
    attention = Attention(4, ComputeConfig(split_heads=split_heads))
    x = jax.ShapeDtypeStruct((2, 5, 32), jnp.float32, sharding=sharding.batch_sharding(mesh))
    params = jax.eval_shape(attention.init, jax.random.key(0), x)["params"]
    splits = {"qkv": P(None, None, "tensor"), "proj": P("tensor")}
    for name, split in splits.items():
        kernel, placed = params[name]["kernel"], NamedSharding(mesh, split)
        params[name]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=placed)
    program = jax.jit(attention.apply).lower({"params": params}, x).compile().as_text()
    assert ("all-gather" in program) != split_heads


def test_a_batch_that_the_mesh_does_not_divide_passes_the_constraint():
    constrain = sharding.constrain_batch(mesh_of(2, 4, 1))
    assert constrain(jnp.ones((1, 3))).sharding.is_fully_replicated
    assert not constrain(jnp.ones((16, 3))).sharding.is_fully_replicated


def state_shapes():
    config = tiny_config()
    config.model.width, config.model.decoder_width = 512, 512
    task = tasks.build(config)
    tx, _ = task.optimizer(10, 100)
    return jax.eval_shape(lambda: train.init_state(task, tx, 0))


def test_a_rule_that_leaves_a_large_parameter_whole_raises(monkeypatch):
    rules = [(p, jax.sharding.PartitionSpec()) if "fc1/kernel" in p else (p, s)
             for p, s in sharding.RULES]  # fmt: skip
    state = state_shapes()
    sharding.state_shardings(mesh_of(1, 8, 1), state)
    monkeypatch.setattr(sharding, "RULES", rules)
    with pytest.raises(ValueError, match="copied whole to every device"):
        sharding.state_shardings(mesh_of(1, 8, 1), state)
    sharding.state_shardings(mesh_of(8, 1, 1), state)  # data parallel: whole everywhere, as meant


def test_heads_are_split_over_fsdp_where_they_divide_and_else_the_width():
    """The tiny encoder has 4 heads."""
    for shape, wanted in (
        ((4, 2, 1), (None, ("tensor", "fsdp"))),
        ((2, 2, 2), (None, ("tensor", "fsdp"))),
        ((1, 8, 1), (None, "tensor", None, "fsdp")),
    ):
        params = sharding.state_shardings(mesh_of(*shape), state_shapes()).params
        assert tuple(params["encoder"]["stack"]["blocks"]["attn"]["proj"]["kernel"].spec) == wanted


def test_a_path_without_a_rule_raises():
    with pytest.raises(ValueError, match="no sharding rule for 'params/adapter/weights'"):
        sharding.state_shardings(
            mesh_of(1, 8, 1), {"params": {"adapter": {"weights": jnp.ones(3)}}}
        )


def test_moments_are_split_like_their_parameters():
    shardings = sharding.state_shardings(mesh_of(2, 2, 2), state_shapes())
    moments = shardings.opt_state[0]
    assert shardings.params == moments.mu == moments.nu
    qkv = shardings.params["encoder"]["stack"]["blocks"]["attn"]["qkv"]["kernel"].spec
    assert tuple(qkv) == (None, "fsdp", None, "tensor", None)


def test_an_axis_that_does_not_divide_raises():
    config = tiny_config()
    config.model.heads = config.model.decoder_heads = 2
    task = tasks.build(config)
    shapes = jax.eval_shape(lambda: train.init_state(task, task.optimizer(10, 100)[0], 0))
    with pytest.raises(ValueError, match="not divisible by mesh axis tensor=8"):
        sharding.state_shardings(mesh_of(1, 1, 8), shapes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": -1, "fsdp": -1},
        {"data": 2, "fsdp": 1},
        {"data": -1, "tensor": 3},
        {"data": 0},
    ],
)
def test_a_mesh_that_does_not_multiply_out_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh data="):
        make_mesh(**sizes)


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("devices", "platform", "slices", "shape"),
    [
        (1, "tpu", 1, (1, 1, 1)),
        (6, "tpu", 1, (3, 2, 1)),
        (8, "tpu", 1, (1, 8, 1)),
        (12, "tpu", 1, (3, 4, 1)),
        (48, "tpu", 1, (3, 16, 1)),
        (256, "tpu", 1, (16, 16, 1)),
        (256, "tpu", 2, (16, 16, 1)),
        (32, "tpu", 4, (4, 8, 1)),  # the state stays inside a slice of 8 chips
        (1, "gpu", 1, (1, 1, 1)),
        (6, "gpu", 1, (3, 2, 1)),
        (8, "gpu", 1, (1, 8, 1)),
        (48, "gpu", 1, (6, 8, 1)),  # six nodes of 8
        (8, "gpu", 2, (2, 4, 1)),  # two nodes of 4
        (8, "cpu", 1, (8, 1, 1)),
    ],
)
def test_by_default_up_to_16_chips_of_a_slice_or_a_node_of_gpus_share_the_state(
    devices, platform, slices, shape
):
    sizes = sizes_of({"data": -1, "fsdp": 0, "tensor": 1}, devices, platform, slices)
    assert tuple(sizes.values()) == shape


@pytest.mark.parametrize(
    ("asked", "shape"),
    [((256, 0, 1), (256, 1, 1)), ((-1, 0, 4), (16, 16, 4)), ((8, 0, 2), (8, 16, 2))],
)
def test_a_given_size_leaves_the_rest_to_the_rule(asked, shape):
    sizes = dict(zip(AXES, asked, strict=True))
    devices = 256 if 256 in asked or 8 in asked else 1024
    assert tuple(sizes_of(sizes, devices, "tpu").values()) == shape


def test_the_state_is_split_over_what_a_given_data_axis_leaves():
    sizes = sizes_of({"data": 2, "fsdp": 0, "tensor": -1}, 8, "gpu")
    assert sizes == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(("batch", "accum"), [(12, 1), (16, 4), (0, 1), (16, 0)])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(batch, accum):
    with pytest.raises(ValueError, match="choose a multiple|must both be at least 1"):
        sharding.check_batch(mesh_of(8, 1, 1), batch, accum)


def test_a_batch_is_laid_out_in_its_order():
    mesh = mesh_of(2, 2, 2)
    rows = sharding.host_rows(mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    local = np.arange(16 * 3).reshape(16, 3)
    np.testing.assert_array_equal(sharding.put_batch(mesh, {"x": local}, 16)["x"], local)
