"""Checkpoints: whole or passed over, on any mesh, never lost."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import checkpoint, distributed, provenance

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
    """Shapes on a mesh of the first devices, with the leading axis split where it can be."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",), axis_types=(AxisType.Auto,))

    def placed(x):
        spec = P("fsdp") if x.ndim and x.shape[0] % devices == 0 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(lambda: init(width=width)))


def state_of(step, devices=8):
    return jax.device_put(init(step), jax.tree.map(lambda x: x.sharding, target(devices)))


def open_run(workdir, keep=9, keep_every=0):
    return checkpoint.Checkpointer(workdir, keep, keep_every)


def run_of(workdir, *steps, **kwargs):
    """A finished run with checkpoints of these steps."""
    run = open_run(workdir, **kwargs)
    for step in steps:
        run.save(step, state_of(step))
    run.close()


def config(**changes):
    return ConfigDict(dict(resume="", init_from="", seed=0) | changes)


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def data_files(workdir, step):
    """The files with the arrays' bytes, largest first."""
    files = (Path(workdir) / "checkpoints" / str(step) / "state").glob("**/d/*")
    return sorted(files, key=lambda f: -f.stat().st_size)


# ---- what is saved comes back -----------------------------------------------------------------


def test_a_state_comes_back_on_any_number_of_devices(tmp_path):
    for before, after in ((8, 1), (1, 4), (4, 8)):
        run = open_run(tmp_path)
        run.save(before, state_of(before, before))
        run.wait()
        step, state = run.restore(target(after))
        assert step == before
        assert_equal(state, init(before))
        assert len(state.params["dense"]["kernel"].sharding.device_set) == after
        run.close()
        shutil.rmtree(tmp_path / "checkpoints")


def test_a_save_compiles_nothing(tmp_path):
    """What all devices hold is written by one of them, not sliced for each, a program a slice."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    state = jax.device_put(init(3), NamedSharding(mesh, P()))
    run, compiled = open_run(tmp_path), []

    def heard(event: str, seconds: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        jax.jit(lambda x: x + len(compiled))(1)
        assert compiled, "compiling is heard of"
        compiled.clear()
        run.save(3, state)
        run.close()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert not compiled


def test_what_is_saved_is_the_moment_of_the_save(tmp_path):
    """The buffers are donated to the next update while the save goes on in the background."""
    run = open_run(tmp_path)
    state = state_of(3)
    run.save(3, state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(3):
        state = update(state)
    run.wait()
    assert_equal(run.restore(target())[1], init(3))
    run.close()


def test_a_workdir_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    provenance.prepare_workdir("run", config())
    run_of("run", 1)
    assert_equal(start("run")[0], init(1))
    assert_equal(start("other", resume="run")[0], init(1))


def test_the_newest_n_and_every_kth_are_kept(tmp_path):
    run_of(tmp_path, *range(1, 14), keep=2, keep_every=5)
    run = open_run(tmp_path, keep=2, keep_every=5)
    assert run.all_steps() == [5, 10, 12, 13]
    assert run.latest_step() == 13
    run.close()
    with pytest.raises(ValueError, match=r"checkpoint\.keep=0"):
        open_run(tmp_path, keep=0)


def test_a_step_is_never_saved_twice(tmp_path):
    run = open_run(tmp_path)
    run.save(1, state_of(1))
    with pytest.raises(ValueError, match=r"there is a checkpoint .*checkpoints/1 already"):
        run.save(1, state_of(2))
    run.close()


# ---- damage -----------------------------------------------------------------------------------


def truncate(workdir):
    file = data_files(workdir, 20)[0]
    os.truncate(file, file.stat().st_size - 1)


def empty(workdir):
    os.truncate(data_files(workdir, 20)[0], 0)


def remove(workdir):
    data_files(workdir, 20)[0].unlink()


def remove_all(workdir):
    shutil.rmtree(workdir / "checkpoints/20")
    (workdir / "checkpoints/20").mkdir()


def flip(workdir):
    file = data_files(workdir, 20)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate_digests(workdir):
    os.truncate(workdir / "checkpoints/20" / checkpoint.DIGESTS, 50)


def remove_metadata(workdir):
    (workdir / "checkpoints/20/state/_METADATA").unlink()


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        (truncate, "bytes"),
        (empty, "has 0 of"),
        (remove, "is missing"),
        (remove_all, "has no digests.json"),
        (flip, "other contents"),
        (truncate_digests, "digests.json cannot be read"),
        (remove_metadata, "_METADATA is missing"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, capsys, hurt, reason):
    run_of(tmp_path, 10, 20)
    hurt(tmp_path)
    run = open_run(tmp_path)
    state, line = checkpoint.restore_or_init(run, config(), target(), lambda: init())
    assert_equal(state, init(10))
    assert line == f"resumed at step 10 from {tmp_path}/checkpoints/10"
    said = [text for text in capsys.readouterr().out.splitlines() if reason in text]
    assert len(said) == 1
    assert said[0].startswith("checkpoint 20 is damaged: ")
    assert said[0].endswith("using checkpoint 10 instead")

    # The run goes on to the same step, and what was damaged is kept beside it.
    run.save(20, state_of(20))
    run.close()
    assert checkpoint.damage(run.root / "20") is None
    assert (tmp_path / "damaged-20").is_dir()


def test_only_the_files_of_the_state_are_needed(tmp_path):
    """What Orbax keeps beside them, which no digest covers, may be damaged or gone."""
    run_of(tmp_path, 10)
    directory = tmp_path / "checkpoints/10"
    beside = sorted(p.name for p in directory.iterdir() if p.name not in ("state", "digests.json"))
    assert beside == ["_CHECKPOINT_METADATA", "commit_success.txt"]
    (directory / beside[0]).write_text("{")
    (directory / beside[1]).unlink()
    assert_equal(start(tmp_path)[0], init(10))


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path, capsys):
    run_of(tmp_path, 10, 20)
    (tmp_path / "checkpoints/20").rename(tmp_path / "checkpoints/20.orbax-checkpoint-tmp")
    run = open_run(tmp_path)
    assert run.restore(target())[0] == 10
    run.save(20, state_of(20))
    run.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]
    assert "checkpoint 20: its save was interrupted" in capsys.readouterr().out


def test_without_any_intact_checkpoint_nothing_starts_over_silently(tmp_path):
    run_of(tmp_path, 20)
    flip(tmp_path)
    run = open_run(tmp_path)
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is intact: checkpoint 20 is damaged"
    ):
        checkpoint.restore_or_init(run, config(), target(), lambda: init())
    run.close()
    assert (tmp_path / "checkpoints/20").is_dir()


def test_digests_are_there_before_a_checkpoint_has_its_name(tmp_path):
    """No moment exists at which a kill leaves a checkpoint without them."""
    run = open_run(tmp_path)
    for step in range(1, 6):
        run.save(step, state_of(step))
        final = tmp_path / "checkpoints" / str(step)
        while not final.exists():
            pass
        assert (final / checkpoint.DIGESTS).exists()
        assert checkpoint.damage(run.root / str(step)) is None
    run.close()


# ---- a checkpoint that does not fit -----------------------------------------------------------


def test_another_config_is_an_error_and_not_damage(tmp_path):
    run_of(tmp_path, 10, 20)
    run = open_run(tmp_path)
    with pytest.raises(ValueError, match="does not fit this config") as raised:
        run.restore(target(width=32))
    said = str(raised.value)
    assert "params/dense/kernel: float32[8, 16] in the checkpoint, float32[8, 32] by" in said
    assert "opt_state/0/mu/dense/bias: float32[16] in the checkpoint, float32[32] by" in said
    bigger = target().replace(params={**target().params, "head": target().params["dense"]})
    with pytest.raises(
        ValueError, match=r"params/head/bias: none in the checkpoint, float32\[16\]"
    ):
        run.restore(bigger)
    with pytest.raises(ValueError, match=r"extra/seen: int32\[4\] in the checkpoint, none by"):
        run.restore(target().replace(extra={}))
    halves = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), target().params)
    with pytest.raises(ValueError, match=r"bias: float32\[16\] in the checkpoint, bfloat16\[16\]"):
        run.restore(target().replace(params=halves))
    run.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


# ---- where a run starts -----------------------------------------------------------------------


def start(workdir, **changes):
    run = open_run(workdir)
    state, line = checkpoint.restore_or_init(run, config(**changes), target(), lambda: init(-1))
    run.close()
    return state, line


def test_own_workdir_before_resume_before_init_from_before_scratch(tmp_path):
    own, other, third = tmp_path / "own", tmp_path / "other", tmp_path / "third"
    run_of(other, 30, 40)
    run_of(third, 50)

    state, line = start(own)
    assert line == "from scratch"
    assert_equal(state, init(-1))

    state, line = start(own, init_from=str(third))
    assert line == f"step 0, parameters of {third}/checkpoints/50 (config.init_from)"
    assert_equal(state, init(-1).replace(params=init(50).params))

    state, line = start(own, init_from=str(third), resume=str(other))
    assert line == f"resumed at step 40 from {other}/checkpoints/40 (config.resume)"
    assert_equal(state, init(40))

    for form in (other / "checkpoints", other / "checkpoints/30"):
        assert (
            f"/{30 if form.name == '30' else 40} (config.resume)" in start(own, resume=str(form))[1]
        )

    run_of(own, 5)
    state, line = start(own, init_from=str(third), resume=str(other))
    assert line == f"resumed at step 5 from {own}/checkpoints/5"
    assert_equal(state, init(5))


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for key in ("resume", "init_from"):
        with pytest.raises(
            ValueError, match=rf"config\.{key}='.*empty' holds no checkpoint: looked"
        ):
            start(tmp_path / "own", **{key: str(tmp_path / "empty")})


def test_damage_in_another_run_is_passed_over_and_left_there(tmp_path, capsys):
    run_of(tmp_path / "other", 10, 20)
    flip(tmp_path / "other")
    state, _ = start(tmp_path / "own", resume=str(tmp_path / "other"))
    assert_equal(state, init(10))
    assert "using checkpoint 10 instead" in capsys.readouterr().out
    assert (tmp_path / "other/checkpoints/20").is_dir()


def test_parameters_of_another_model_are_refused(tmp_path):
    run_of(tmp_path / "other", 10)
    run = open_run(tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"params/dense/bias: float32\[16\] in the checkpoint, .*32"
    ):
        checkpoint.restore_or_init(
            run, config(init_from=str(tmp_path / "other")), target(width=32), init
        )
    run.close()


# ---- errors in the background -----------------------------------------------------------------


FULL_DISK = """
    import os, resource, sys, time
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import numpy as np, jax, jax.numpy as jnp
    from test_checkpoint import State
    from mae_jax import checkpoint

    workdir, limit = sys.argv[1], int(sys.argv[2])
    state = State(jnp.int32(0), {"a": jnp.ones(8)}, {}, {})
    run = checkpoint.Checkpointer(workdir, keep=1)
    run.save(1, state)
    run.wait()
    noise = np.random.default_rng(0).standard_normal(2**20)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run.save(2, state.replace(params={"a": jnp.asarray(noise, jnp.float32)}))
    try:
        for _ in range(6000):  # steps of a training loop
            run.check()
            time.sleep(0.01)
    except OSError as error:
        print("SAID", error)
        print("LEFT", checkpoint.damage(run.root / "1"), sorted(p.name for p in run.root.iterdir()))
"""
# A disk of 3 MiB where this user can mount one; else files of at most 1 MiB, which needs no right.
MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
CAN_MOUNT = (
    subprocess.run(
        [*MOUNT, "mount -t tmpfs -o size=1m none /tmp"], capture_output=True, check=False
    ).returncode
    == 0
    if shutil.which("unshare")
    else False
)


@pytest.mark.parametrize("limit", ["file size", *(["disk size"] if CAN_MOUNT else [])])
def test_a_full_disk_surfaces_at_the_next_check_and_older_checkpoints_stay(tmp_path, limit):
    """With keep=1 too: the older one is deleted when the newer one is whole, and not before."""
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    if limit == "disk size":
        mount = f'mount -t tmpfs -o size=3m none "{tmp_path}" && exec "$@"'
        command = [*MOUNT, mount, "sh", *command, "0"]
    else:
        command.append(str(2**20))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = [line for line in done.stdout.splitlines() if line.startswith(("SAID", "LEFT"))]
    assert len(said) == 2, done.stdout + done.stderr
    assert said[0].startswith(f"SAID checkpoint 2 could not be written to {tmp_path}/checkpoints")
    assert "it takes up to 4.0 MiB, and" in said[0]
    assert "Earlier checkpoints, intact: 1" in said[0]
    assert said[1] == "LEFT None ['1']"


# ---- being asked to stop ----------------------------------------------------------------------


def test_sigterm_is_heard_and_does_not_kill():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop_requested = distributed.preemption()
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
    finally:
        signal.signal(signal.SIGTERM, before)


ASKED_TO_STOP = """
    import os, signal, sys, time
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import hosts, jax.numpy as jnp
    from test_checkpoint import State
    from mae_jax import checkpoint, distributed

    workdir, when = sys.argv[1:]
    distributed.join(f"localhost:{hosts.free_port()}", 1, 0)
    stop_requested = distributed.preemption()
    if when == "a save ends":
        run = checkpoint.Checkpointer(workdir)
        assert not stop_requested()
        run.save(12, State(jnp.int32(12), {"a": jnp.ones(8)}, {}, {}))
        assert not stop_requested()
        run.wait()  # it ends when the loop is a step further
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # the service looks once a second
    print("MISSED", next((call for call in range(30) if stop_requested()), "for ever"))
"""


@pytest.mark.parametrize("when", ["a save ends", "it compiles"])
def test_hosts_that_are_asked_to_stop_stop_at_the_next_step(tmp_path, when):
    command = [sys.executable, "-c", textwrap.dedent(ASKED_TO_STOP), str(tmp_path), when]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "MISSED 0" in done.stdout.splitlines(), done.stdout + done.stderr


def test_preempted_ends_a_process_with_its_own_exit_status():
    code = "from mae_jax import distributed; raise distributed.Preempted('saved step 3')"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=300)
    assert done.returncode == distributed.PREEMPTED == 75
    assert str(distributed.Preempted("saved step 3")) == "saved step 3"
