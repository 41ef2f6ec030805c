"""Plans: programs are read right, estimates add up, and mistakes are refused before compiling.

The compiler for TPUs must be installed: bash launch/test.sh puts it where only the tests see it.
"""

import importlib.util
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import clock, flops, hlo, plan, tasks, topologies, traffic
from mae_jax.commands import plan as command
from mae_jax.commands import recipes
from mae_jax.errors import UserError
from mae_jax.mesh import arrange, make_mesh
from tests.tiny import tiny_config

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
TINY = [
    "--config=configs/pretrain.py:image_size=32,batch_size=64",
    "--config.model.patch_size=(8,8)",
    *(f"--config.model.{name}=2" for name in ("heads", "depth", "decoder_heads", "decoder_depth")),
    *(f"--config.model.{name}=64" for name in ("width", "decoder_width")),
]


# As the compiler for TPUs writes it: an unrolled ring in a loop that counts by two, a gather spread
# over two fusions, a sum fused with the slice of it that is kept, and a sum between slices.
PROGRAM = """\
HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%gather_start (p.0: bf16[8,16]) -> bf16[32,16] {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.0 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%gather_end (p.1: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%all-reduce-scatter (p.2: f32[32,16]) -> f32[8,16] {
  %p.2 = f32[32,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %nought = f32[] constant(0)
  %padded = f32[36,16]{1,0} pad(%p.2, %nought), padding=0_4x0_0
  %r.2 = f32[36,16]{1,0} all-reduce(%padded), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%sum
  ROOT %s.2 = f32[8,16]{1,0} dynamic-slice(%r.2, %zero, %zero), dynamic_slice_sizes={8,16}
}

%cond (w: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %w = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (v: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %one = s32[] constant(1)
  %v = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%v), index=0
  %next = s32[] add(%j, %one)
  %after = s32[] add(%next, %one)
  %x = bf16[8,16]{1,0} get-tuple-element(%v), index=1
  %ring = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=9, source_target_pairs={{0,4},{4,0}}
  %got = bf16[8,16]{1,0} collective-permute-done(%ring)
  %ring.2 = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%got), channel_id=9, source_target_pairs={{0,4},{4,0}}
  %got.2 = bf16[8,16]{1,0} collective-permute-done(%ring.2)
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%after, %got.2)
}

ENTRY %main (weight: bf16[8,16], x: f32[32,16]) -> f32[8,16] {
  %weight = bf16[8,16]{1,0} parameter(0)
  %x.1 = f32[32,16]{1,0} parameter(1)
  %g.2 = bf16[32,16]{1,0} fusion(%weight), kind=kCustom, calls=%gather_start
  %g.3 = bf16[32,16]{1,0} fusion(%weight), kind=kCustom, calls=%gather_end
  %start = s32[] constant(0)
  %init = (s32[], bf16[8,16]{1,0}) tuple(%start, %weight)
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%cond, body=%body
  %gradient = f32[32,16]{1,0} convolution(%x.1, %g.3), dim_labels=bf_io->bf
  %t = token[] after-all()
  %sent = (f32[32,16]{1,0}, u32[], token[]) send(%gradient, %t), channel_id=10, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %kept = f32[8,16]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_of_loops_fusions_and_slices_are_counted_as_they_run():
    collectives = traffic.collectives(hlo.parse(PROGRAM), MESH)
    assert [(c.kind, c.axes, c.members, c.times, c.payload) for c in collectives] == [
        ("all-gather", ("fsdp",), 4, 1, 32 * 16 * 2),
        ("collective-permute", ("data",), 2, 4, 4 * 8 * 16 * 2),
        ("collective-permute", ("data",), 2, 4, 4 * 8 * 16 * 2),  # a copy, with the same channel
        ("all-reduce", ("slices",), 2, 1, 32 * 16 * 4),
        ("reduce-scatter", ("fsdp",), 4, 1, 32 * 16 * 4),
    ]
    # To gather, a member of a ring of four sends three of four parts; to sum for all, twice that.
    assert [c.sent for c in collectives] == [768, 1024, 1024, 2 * 2048 / 2, 2048 * 3 / 4]
    assert traffic.by_axes(collectives) == [
        dict(kind="collective-permute", axes="data", dtype="bf16", bytes=2048, sent=2048),
        dict(kind="all-reduce", axes="slices", dtype="f32", bytes=2048, sent=2048),
        dict(kind="reduce-scatter", axes="fsdp", dtype="f32", bytes=2048, sent=1536),
        dict(kind="all-gather", axes="fsdp", dtype="bf16", bytes=1024, sent=768),
    ]
    # The last runs alone, and the sum between slices takes another network.
    seconds = clock.waiting(collectives, flops.Chip(tflops=1, link_rate=1e-9))
    assert seconds == {"beside": pytest.approx(768 + 2048), "alone": pytest.approx(1536)}


# A fusion with an estimate in a loop of three rounds, and one outside; what has no estimate: a
# gather, a copy that runs beside other work, and a collective, which is counted elsewhere.
CLOCKED = """\
%one (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %n = f32[64]{0} negate(%p)
}

%cond (w: (s32[], f32[64])) -> pred[] {
  %w = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%w), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (v: (s32[], f32[64])) -> (s32[], f32[64]) {
  %v = (s32[], f32[64]{0}) parameter(0)
  %j = s32[]{:S(6)} get-tuple-element(%v), index=0
  %step = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%j, %step)
  %x = f32[64]{0} get-tuple-element(%v), index=1
  %y = f32[64]{0} fusion(%x), kind=kLoop, calls=%one, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[64]{0}) tuple(%next, %y)
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[64]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[64]{0}) while(%init), condition=%cond, body=%body
  %b = f32[64]{0} get-tuple-element(%loop), index=1
  %space = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"
  %picked = f32[64]{0} custom-call(%b), custom_call_target="Pick"
  %moving = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%picked)
  %moved = f32[64]{0:S(1)} copy-done(%moving)
  %sum = f32[64]{0} all-reduce(%moved), channel_id=1, replica_groups={{0,1}}, to_apply=%one
  ROOT %c = f32[64]{0} fusion(%sum), kind=kLoop, calls=%one, backend_config={"estimated_cycles":"7"}
}
"""


def test_the_clock_counts_rounds_of_loops_and_lists_what_has_no_estimate():
    program = hlo.parse(CLOCKED)
    assert clock.cycles(program) == 3 * 100 + 7
    assert clock.unrated(program) == [
        {"kind": "Pick", "times": 1, "bytes": 2 * 64 * 4, "beside": False},
        {"kind": "copy-start", "times": 1, "bytes": 64 * 4, "beside": True},
    ]


@pytest.mark.parametrize(("kind", "hours"), [("v3", [2.0, 2.0]), ("v5e", [0.5, 2.0])])
def test_hours_are_a_range_from_the_roofline_where_a_chip_is_rated_too_slow(kind, hours):
    rating = topologies.CLOCKS[kind]._replace(ghz=307e-9 / 0.02)  # 20 ms of 307 cycles
    line = plan.by_clock(rating, hlo.parse(CLOCKED), {"roofline": {"step": 0.005}, "steps": 360000})
    assert line["step"] == pytest.approx(0.02)
    assert line["hours"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", ("data",)),
        ("replica_groups=[2,4]<=[8], x", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ("data",)),
        ("replica_groups=[1,8]<=[8], x", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x={1}", ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x={1}", ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x={1}", ("data",)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, x", ("fsdp",)),
    ],
)
def test_every_way_to_write_groups_gives_the_axes_of_the_mesh(text, axes):
    assert traffic.axes_of(traffic.groups(text, devices=8)[0], MESH) == axes


def test_a_loop_over_sharded_weights_of_a_real_program_gathers_each_once_per_pass():
    mesh = make_mesh(data=1, fsdp=8)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "fsdp"))
    rows = NamedSharding(mesh, P("fsdp"))

    def run(w, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(layer, x, w)[0].sum()

    compiled = (
        jax.jit(run, in_shardings=(split, rows), out_shardings=whole)
        .lower(jnp.zeros((5, 64, 64)), jnp.zeros((16, 64)))
        .compile()
    )
    collectives = traffic.collectives(hlo.parse(compiled.as_text()), mesh.shape)
    gathered = sum(c.payload for c in collectives if c.kind == "all-gather")
    assert gathered == 5 * 64 * 64 * 4
    assert {c.axes for c in collectives} == {("fsdp",)}


# A fusion reads and writes 64 numbers; the copy reads them (it writes elsewhere), and negate, too.
ONE_LAYER = """\
%layer (p: f32[24,64], i: s32[]) -> f32[64] {
  %p = f32[24,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%cut)
}

ENTRY %main (stack: f32[24,64], n: s32[]) -> f32[64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %one = f32[64]{0} fusion(%stack, %n), kind=kLoop, calls=%layer
  %near = f32[64]{0:T(128)S(1)} copy(%one)
  ROOT %out = f32[64]{0} negate(%near)
}
"""
# One fusion reads a row and writes one; the other reads all rows.
FUSIONS_IN_FUSIONS = """\
%cut (p: f32[24,64], i: s32[]) -> f32[1,64] {
  %p = f32[24,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
}

%whole (q: f32[24,64]) -> f32[] {
  %q = f32[24,64]{1,0} parameter(0)
  ROOT %first = f32[] custom-call(%q)
}

%layer (i: s32[], p: f32[24,64]) -> f32[1,64] {
  %i = s32[] parameter(0)
  %p = f32[24,64]{1,0} parameter(1)
  %row = f32[1,64]{1,0} fusion(%p, %i), kind=kLoop, calls=%cut
  ROOT %more = f32[1,64]{1,0} negate(%row)
}

%sum (p: f32[24,64]) -> f32[] {
  %p = f32[24,64]{1,0} parameter(0)
  ROOT %all = f32[] fusion(%p), kind=kLoop, calls=%whole
}

ENTRY %main (stack: f32[24,64], n: s32[]) -> f32[1,64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %total = f32[]{:S(6)} fusion(%stack), kind=kLoop, calls=%sum
  ROOT %one = f32[1,64]{1,0} fusion(%n, %stack), kind=kLoop, calls=%layer
}
"""
# Rows: read and written by the fusion, by the slice, and read by what copies them elsewhere.
BESIDE_OTHER_WORK = """\
%layer (p: f32[24,64]) -> f32[64] {
  %p = f32[24,64]{1,0} parameter(0)
  %cut = f32[1,64]{1,0} slice(%p), slice={[7:8], [0:64]}
  %flat = f32[64]{0} bitcast(%cut)
  ROOT %out = f32[64]{0} negate(%flat)
}

ENTRY %main (stack: f32[24,64]) -> f32[64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %one = f32[64]{0} fusion(%stack), kind=kLoop, calls=%layer
  %part = f32[2,64]{1,0} slice(%stack), slice={[0:2], [0:64]}
  %begun = ((f32[24,64]{1,0}), f32[4,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[0:4]}
  %near = f32[4,64]{1,0:S(1)} slice-done(%begun)
  %moving = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%one)
  ROOT %moved = f32[64]{0:S(1)} copy-done(%moving)
}
"""


@pytest.mark.parametrize(
    ("program", "rows"),
    [(ONE_LAYER, 2 + 1 + 1), (FUSIONS_IN_FUSIONS, 1 + 1 + 24), (BESIDE_OTHER_WORK, 2 + 4 + 4 + 1)],
    ids=["one layer", "fusions in fusions", "beside other work"],
)
def test_memory_traffic_counts_slices_that_are_read_and_not_their_arrays(program, rows):
    assert traffic.memory_bytes(hlo.parse(program)) == rows * 64 * 4


@pytest.mark.parametrize(
    ("moved", "sent", "slow", "step", "bound"),
    [(3e10, 1e10, 1e8, 0.05, "slices"), (6e10, 0, None, 0.06, "memory")],
)
def test_roofline_by_hand(moved, sent, slow, step, bound):
    chip = flops.Chip(tflops=100, hbm=16, hbm_rate=1000, link_rate=200, slow_rate=2)
    rows = [{"axes": "fsdp", "sent": sent}, {"axes": "slices", "sent": slow or 0}]
    result = {
        **dict(batch_size=80, devices=8, steps=7200, memory={"moved": moved}, collectives=rows),
        "gflops": {"step_per_image": 300.0, "step_per_device": 5000.0},
    }
    seconds = {"compute": 0.05, "memory": moved / 1e12, "links": sent / 2e11}
    assert plan.roofline(chip, result) == {
        "seconds": pytest.approx(seconds | {"slices": slow and 0.05}),
        "step": pytest.approx(step),
        "bound": bound,
        "hours": pytest.approx(2 * step),
        "mfu": pytest.approx(10 * 300e9 / 100e12 / step),
    }


def test_hours_at_an_assumed_mfu_by_hand():
    result = {
        "device_kind": "TPU v3",
        "devices": 128,
        "gflops": {"step_per_image": 120.0},
        "batch_size": 4096,
        "steps": 1000,
    }
    seconds = 120e9 * 4096 * 1000 / (128 * 61.5e12 * 0.5)
    assert plan.hours(result, 0.5) == pytest.approx(seconds / 3600)


@pytest.mark.parametrize(
    ("name", "chips", "cloud", "device_kind"),
    [
        ("v3:8x8", 64, "v3-128", "TPU v3"),
        ("v4:4x4x4", 64, "v4-128", "TPU v4"),
        ("v5e:4x4", 16, "v5litepod-16", "TPU v5 lite"),
        ("v5p:4x4x4", 64, "v5p-128", "TPU v5"),
        ("v6e:16x16", 256, "v6e-256", "TPU v6 lite"),
        ("h100:8", 8, "", "NVIDIA H100"),
        ("cpu:8", 8, "", ""),
    ],
)
def test_topologies_and_their_names_in_the_cloud_and_in_jax(name, chips, cloud, device_kind):
    topology = topologies.parse(name)
    assert (topology.chips, topology.cloud, topology.device_kind) == (chips, cloud, device_kind)


@pytest.mark.parametrize(("limit", "largest"), [(800, 96), (7, 0), (10**9, 8192)])
def test_the_largest_batch_is_found_within_a_quarter(limit, largest):
    config = tiny_config(batch_size=64)

    def plan_for(trial):
        return {"mesh": MESH, "fits": trial.batch_size <= limit}

    assert command.largest_batch(config, plan_for, plan_for(config), examples=100_000) == largest


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function: arguments -> status, the plan, and what was printed."""

    def run(*argv):
        file = tmp_path / "plan.json"
        status = command.main([*argv, f"--json={file}"])
        (result,) = json.loads(file.read_text())
        return status, result, capsys.readouterr().out

    return run


def summed(result):
    """Return the bytes that a data-parallel step sums over devices: nothing else is exchanged."""
    assert {(row["kind"], row["axes"]) for row in result["collectives"]} == {("all-reduce", "data")}
    return sum(row["bytes"] for row in result["collectives"])


def test_a_plan_for_cpu_devices_sums_every_gradient_once(run):
    status, result, _ = run(*TINY, "--topology=cpu:8")
    assert status == 0
    assert result["fits"] is None  # nobody knows the memory of a simulated device
    assert result["memory"]["parameters"] == 4 * result["parameters"]
    assert result["steps"] == 800 * (1281167 // 64)
    assert summed(result) == pytest.approx(4 * result["parameters"], rel=0.01)


def test_a_gpu_that_is_not_there_is_planned_without_a_program_and_says_so(run):
    status, result, printed = run(*TINY, "--topology=h100:8")
    assert (status, result["compiled"], result["fits"]) == (0, False, None)
    assert "temporary" not in result["memory"]
    assert result["memory"]["optimizer"] > 2 * result["memory"]["parameters"]
    assert "not compiled: there is no such GPU here" in printed
    _, other, _ = run(*TINY, "--topology=h100:8", "--config.mask_ratio=0.5")
    assert other["gflops"]["forward_per_image"] > result["gflops"]["forward_per_image"]


def test_the_mesh_of_a_config_file_is_planned_for(run, tmp_path):
    file = tmp_path / "fork.py"
    file.write_text(
        "from configs.pretrain import get_config as recipe\n\n\n"
        "def get_config(arg=None):\n"
        "    config = recipe(arg)\n    config.mesh.fsdp = 4\n    return config\n"
    )
    config = f"--config={file}:image_size=32,batch_size=64"
    _, result, _ = run(config, *TINY[1:], "--topology=h100:8")  # which alone would take fsdp=8
    assert result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_the_compiler_for_tpus_is_installed():
    assert importlib.util.find_spec("libtpu"), (
        "run bash launch/test.sh, or"
        f" pip install --target=DIR libtpu=={topologies.LIBTPU} with DIR on PYTHONPATH"
    )


def test_the_step_compiles_for_a_tpu_and_what_cannot_fit_is_said(run):
    status, result, printed = run(*TINY, "--topology=v5e:2x2")
    assert (status, result["fits"], result["device_kind"]) == (0, True, "TPU v5 lite")
    assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert [other["mesh"]["fsdp"] for other in result["compared"]] == [4, 1]
    assert all(other["clock"]["step"] > 0 for other in result["compared"])
    assert "images/s" in printed and "reading cores per host" in printed
    memory = result["memory"]
    assert memory["total"] < memory["chip"] == 16 * 2**30
    assert memory["total"] > memory["parameters"] + memory["optimizer"] + memory["batch"]
    line = result["roofline"]
    assert line["step"] == max(seconds for seconds in line["seconds"].values() if seconds)
    assert "v5litepod-4" in printed

    # Gradients of matrix products are summed in the type of the products: half the bytes.
    _, result, _ = run(*TINY, "--topology=v5e:2x2", "--config.mesh.data=4")
    assert 2 * result["parameters"] <= summed(result) < 4 * result["parameters"]

    too_large = ["--config.batch_size=1048576", "--config.mesh.fsdp=1"]
    status, result, printed = run(*TINY, "--topology=v5e:2x2", *too_large)
    assert (status, result["fits"]) == (1, False)
    assert result["memory"]["total"] > result["memory"]["chip"]
    for way in ("remat=True", "fewer than 262144 images per chip", "--config.mesh.fsdp=4"):
        assert way in " ".join(printed.split())


def test_a_state_that_is_too_large_for_every_mesh_is_not_compiled(run):
    config = "--config=pretrain:variant=6.5B/14,batch_size=64"
    status, result, printed = run(config, "--topology=v5e:2x2")
    assert (status, result["fits"], result["compiled"]) == (1, False, False)
    assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert "not compiled: the state alone takes more memory than there is" in printed


def test_slices_are_outermost_on_the_data_axis():
    # Devices of two slices of 2x2 chips, as the compiler describes them.
    devices = [
        SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(x, y, 0),
            core_on_chip=0,
            process_index=0,
            slice_index=index,
            id=4 * index + 2 * y + x,
        )
        for index, y, x in itertools.product(range(2), repeat=3)
    ]
    slice_of = np.vectorize(lambda device: device.slice_index)
    mesh = arrange({"data": 2, "fsdp": 4, "tensor": 1}, devices)
    np.testing.assert_array_equal(slice_of(mesh)[:, 0, 0], [0, 1])
    assert (slice_of(mesh) == slice_of(mesh)[:, :1]).all()
    with pytest.raises(ValueError, match="cannot be cut into 2 slices"):
        arrange({"data": 1, "fsdp": 1, "tensor": 8}, devices)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:4x", "nearest: v5e:4x"),
        ("v7:4x4", "nearest: v"),
        ("v4:4x4", "nearest: v4:"),
        ("v5litepod-16", "its chips are v5e:4x4"),
        ("cpu:none", "cpu:8"),
        ("v5e:4xx4", "nearest: v5e:4x"),
        ("v5e:x4x4", "nearest: v5e:4x"),
    ],
)
def test_an_unknown_topology_is_answered_with_the_nearest(topology, message):
    with pytest.raises(UserError, match=message):
        topologies.parse(topology)


def test_without_the_compiler_for_tpus_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install libtpu=={topologies.LIBTPU}"):
        topologies.devices(topologies.parse("v5e:2x2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "multiple of 3 devices, there are 8"),
        (["--topology=cpu:8", "--config.batch_size=20"], "not divisible by data x fsdp"),
        (["--topology=cpu:8", "--mfu=40"], "--mfu=40"),
        (["--topology=cpu:8", "--num_slices=2"], "more than one of TPUs only"),
        (["--topology=cpu:8", "--workdir=here"], "Unknown command line flag 'workdir'"),
        (["--topology=cpu:8", "--json=nowhere/plan.json"], "there is no such folder"),
        ([], "--topology=NAME is missing"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(flags, message):
    with pytest.raises(UserError, match=message):
        command.main([*TINY, *flags])


def test_a_dataset_that_is_not_there_needs_its_number_of_examples(tmp_path):
    config = tiny_config()
    missing = dict(source="imagenet2012:5.1.0", split="train", data_dir=str(tmp_path))
    config.data.update(missing)
    with pytest.raises(UserError, match="--num_examples=N"):
        recipes.without_data(config, None, None)
    recipes.without_data(config, 1000, 10)
    assert len(tasks.build(config).examples) == 1000
    config.data.update(missing, source="imagenet2012")
    assert recipes.without_data(config, None, 21841) == 1281167
    assert config.data.source == "counted:1281167:21841"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--topology=h100:8", "--search_batch"), "--search_batch on h100:8: .* TPUs only"),
        (("--topology=cpu:2", "--search_batch"), "--search_batch on cpu:2"),
        (("--topology=cpu:2", "--json=."), "--json=. is a folder: name a file"),
        (("--topology=cpu:2", "--num_examples=0"), "num_examples"),
        (("--topology=cpu:2", "--config=folder"), "--config is given twice"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(flags, words):
    with pytest.raises(UserError, match=words):
        command.main(["--config=pretrain", *flags])
