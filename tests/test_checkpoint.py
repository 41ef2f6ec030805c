"""Checkpoints: whole or passed over, on any mesh, never lost."""

import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from states import assert_equal, data_files, flip, init, save_steps, state_of, target

from mae_jax import integrity
from mae_jax.checkpoint import PARAMS, Checkpointer, FolderGone, restore, restore_or_init


def load_params(path, state):
    return state.replace(params=restore(path, state.params, PARAMS))


def start(workdir, **changes):
    with Checkpointer(workdir) as run:
        return restore_or_init(run, target(), lambda: init(-1), load_params, **changes)


def test_a_state_comes_back_on_any_number_of_devices(tmp_path):
    for before, after in ((8, 1), (1, 4), (4, 8)):
        with Checkpointer(tmp_path) as run:
            run.save(before, state_of(before, before))
            run.wait()
            step, state = run.restore(target(after))
        assert step == before
        assert_equal(state, init(before))
        assert len(state.params["dense"]["kernel"].sharding.device_set) == after
        shutil.rmtree(tmp_path / "checkpoints")


def test_a_save_compiles_nothing(tmp_path):
    """One device writes a replicated array; slicing it for each would compile a program a slice."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = jax.device_put(init(3), NamedSharding(mesh, P()))
    compiled = []

    def count(event: str, seconds: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x + len(compiled))(1)
        assert compiled, "the listener notices a compilation"
        compiled.clear()
        with Checkpointer(tmp_path) as run:
            run.save(3, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


def test_what_is_saved_is_the_moment_of_the_save(tmp_path):
    """The buffers are donated to the next update while the save goes on in the background."""
    state = state_of(3)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as run:
        run.save(3, state)
        for _ in range(3):
            state = update(state)
        run.wait()
        assert_equal(run.restore(target())[1], init(3))


def test_a_workdir_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("run", 1)
    assert_equal(start("run")[0], init(1))
    assert_equal(start("other", resume="run")[0], init(1))


def test_the_newest_n_and_every_kth_are_kept(tmp_path):
    save_steps(tmp_path, *range(1, 14), keep=2, keep_every=5)
    with Checkpointer(tmp_path, keep=2, keep_every=5) as run:
        assert run.all_steps() == [5, 10, 12, 13]
        assert run.latest_step() == 13
    with pytest.raises(ValueError, match=r"checkpoint\.keep=0"):
        Checkpointer(tmp_path, keep=0)


@pytest.mark.parametrize("made_again", [False, True])
def test_a_folder_that_is_moved_ends_the_run_even_if_a_save_made_it_again(tmp_path, made_again):
    workdir = tmp_path / "run"
    with Checkpointer(workdir, keep=2) as saver:
        (workdir / "config.json").write_text("{}")
        saver.save(1, init())
        saver.wait()
        workdir.rename(tmp_path / "elsewhere")
        if made_again:
            shutil.copytree(tmp_path / "elsewhere" / "checkpoints", workdir / "checkpoints")
        with pytest.raises(FolderGone, match="checkpoint 2 was not written"):
            saver.save(2, init())
    assert not (workdir / "checkpoints" / "2").exists()


def test_a_step_is_never_saved_twice(tmp_path):
    with Checkpointer(tmp_path) as run:
        run.save(1, state_of(1))
        with pytest.raises(OSError, match="already exists"):
            run.save(1, state_of(2))
        assert_equal(run.restore(target())[1], init(1))


def empty_step(workdir):
    shutil.rmtree(workdir / "checkpoints/20")
    (workdir / "checkpoints/20").mkdir()


DAMAGE = {
    "bytes": lambda run: os.truncate(file := data_files(run, 20)[0], file.stat().st_size - 1),
    "has 0 of": lambda run: os.truncate(data_files(run, 20)[0], 0),
    "is missing": lambda run: data_files(run, 20)[0].unlink(),
    "has no digests.json": empty_step,
    "other contents": flip,
    "digests.json cannot be read": lambda run: os.truncate(
        run / "checkpoints/20" / integrity.DIGESTS, 50
    ),
    "_METADATA is missing": lambda run: (run / "checkpoints/20/state/_METADATA").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, capsys, reason):
    save_steps(tmp_path, 10, 20)
    DAMAGE[reason](tmp_path)
    with Checkpointer(tmp_path) as run:
        state, line = restore_or_init(run, target(), init, load_params)
        assert_equal(state, init(10))
        assert line == f"resumed at step 10 from {tmp_path}/checkpoints/10"
        (warning,) = [text for text in capsys.readouterr().out.splitlines() if reason in text]
        assert warning.startswith("checkpoint 20 is damaged: ")
        assert warning.endswith("using checkpoint 10 instead")

        # The run reaches the same step again, and the damaged checkpoint is kept beside it.
        run.save(20, state_of(20))
    assert integrity.damage(run.root / "20") is None
    assert (tmp_path / "damaged-20").is_dir()


def test_only_the_files_of_the_state_are_needed(tmp_path):
    """What Orbax keeps beside them, which no digest covers, may be damaged or gone."""
    save_steps(tmp_path, 10)
    directory = tmp_path / "checkpoints/10"
    beside = sorted(p.name for p in directory.iterdir() if p.name not in ("state", "digests.json"))
    assert beside == ["_CHECKPOINT_METADATA", "commit_success.txt"]
    (directory / beside[0]).write_text("{")
    (directory / beside[1]).unlink()
    assert_equal(start(tmp_path)[0], init(10))


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "checkpoints/20").rename(tmp_path / "checkpoints/20.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path) as run:
        assert run.restore(target())[0] == 10
        run.save(20, state_of(20))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


def test_without_any_intact_checkpoint_nothing_starts_over_silently(tmp_path):
    save_steps(tmp_path, 20)
    flip(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .* is intact: checkpoint 20 is damaged"):
        start(tmp_path)
    assert (tmp_path / "checkpoints/20").is_dir()


def test_digests_are_there_before_a_checkpoint_has_its_name(tmp_path):
    """No moment exists at which a kill leaves a checkpoint without them."""
    run = Checkpointer(tmp_path)
    for step in range(1, 6):
        run.save(step, state_of(step))
        final = tmp_path / "checkpoints" / str(step)
        while not final.exists():
            pass
        assert (final / integrity.DIGESTS).exists()
        assert integrity.damage(run.root / str(step)) is None
    run.close()


def test_another_config_is_an_error_and_not_damage(tmp_path):
    save_steps(tmp_path, 10, 20)
    run = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="does not fit this config") as raised:
        run.restore(target(width=32))
    message = str(raised.value)
    assert "params/dense/kernel: float32[8, 16] in the checkpoint, float32[8, 32] by" in message
    assert "opt_state/0/mu/dense/bias: float32[16] in the checkpoint, float32[32] by" in message
    bigger = target().replace(params={**target().params, "head": target().params["dense"]})
    with pytest.raises(ValueError, match=r"head/bias: none in the checkpoint, float32\[16\]"):
        run.restore(bigger)
    with pytest.raises(ValueError, match=r"extra/seen: int32\[4\] in the checkpoint, none by"):
        run.restore(target().replace(extra={}))
    halves = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), target().params)
    with pytest.raises(ValueError, match=r"bias: float32\[16\] in the checkpoint, bfloat16\[16\]"):
        run.restore(target().replace(params=halves))
    run.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


def test_own_workdir_before_resume_before_init_from_before_scratch(tmp_path):
    own, other, third = tmp_path / "own", tmp_path / "other", tmp_path / "third"
    save_steps(other, 30, 40)
    save_steps(third, 50)

    state, line = start(own)
    assert line == "from scratch"
    assert_equal(state, init(-1))

    state, line = start(own, init_from=str(third))
    assert line == f"step 0, weights of {third}/checkpoints/50 (config.init_from)"
    assert_equal(state, init(-1).replace(params=init(50).params))

    state, line = start(own, init_from=str(third), resume=str(other))
    assert line == f"resumed at step 40 from {other}/checkpoints/40 (config.resume)"
    assert_equal(state, init(40))

    for path, step in ((other / "checkpoints", 40), (other / "checkpoints/30", 30)):
        assert f"/{step} (config.resume)" in start(own, resume=str(path))[1]

    save_steps(own, 5)
    state, line = start(own, init_from=str(third), resume=str(other))
    assert line == f"resumed at step 5 from {own}/checkpoints/5"
    assert_equal(state, init(5))


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for key in ("resume", "init_from"):
        with pytest.raises(ValueError, match=f"config.{key}='.*empty' holds no checkpoint: looked"):
            start(tmp_path / "own", **{key: str(tmp_path / "empty")})


def test_damage_in_another_run_is_passed_over_and_left_there(tmp_path, capsys):
    save_steps(tmp_path / "other", 10, 20)
    flip(tmp_path / "other")
    state, _ = start(tmp_path / "own", resume=str(tmp_path / "other"))
    assert_equal(state, init(10))
    assert "using checkpoint 10 instead" in capsys.readouterr().out
    assert (tmp_path / "other/checkpoints/20").is_dir()


def test_parameters_of_another_model_are_refused(tmp_path):
    save_steps(tmp_path / "other", 10)
    path = str(tmp_path / "other")
    with Checkpointer(tmp_path / "own") as run, pytest.raises(ValueError, match=r"bias: .*\[16\]"):
        restore_or_init(run, target(width=32), lambda: init(width=32), load_params, init_from=path)


FULL_DISK = """
    import os, resource, sys, time
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import numpy as np, jax, jax.numpy as jnp
    from states import State
    from mae_jax import checkpoint, integrity

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
        print("ERROR", error)
        whole = [p.name for p in run.root.iterdir() if p.name.isdigit()]
        print("KEPT", integrity.damage(run.root / "1"), whole)
"""
# A disk of 3 MiB where this user can mount one; else files of at most 1 MiB, which needs no right.
MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
TRY_MOUNT = [*MOUNT, "mount -t tmpfs -o size=1m none /tmp"]
CAN_MOUNT = (
    shutil.which("unshare") and not subprocess.run(TRY_MOUNT, capture_output=True).returncode
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
    printed = [line for line in done.stdout.splitlines() if line.startswith(("ERROR", "KEPT"))]
    assert len(printed) == 2, done.stdout + done.stderr
    assert printed[0].startswith(f"ERROR checkpoint 2 could not be written to {tmp_path}/")
    assert printed[0].endswith("It takes up to 4.0 MiB. Earlier checkpoints, intact: 1")
    assert printed[1] == "KEPT None ['1']"
