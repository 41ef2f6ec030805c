"""Two real processes, joined by jax.distributed: they save, restore and stop as one."""

import signal
import sys
import textwrap

import hosts
import states

from mae_jax import checkpoint, integrity

SAVE_RESTORE_STOP = """
    import contextlib, os, sys
    workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, process)

    import time
    import states
    from jax.experimental import multihost_utils
    from ml_collections import ConfigDict
    from mae_jax import checkpoint, distributed, provenance

    assert jax.device_count() == 4
    provenance.prepare_workdir(workdir, ConfigDict({"seed": 0}))

    run = checkpoint.Checkpointer(workdir, keep=9)
    for step in (10, 20):
        run.save(step, states.state_of(step, 4))
    run.wait()
    if process == 0:
        states.flip(run.root.parent)
    multihost_utils.sync_global_devices("damaged")
    step, state = run.restore(states.target(4))
    print("RESTORED", step, run.all_steps(), flush=True)

    stack = contextlib.ExitStack()
    stop_requested = stack.enter_context(distributed.listening())
    step = 20
    while not stop_requested():
        # The processes wait for each other here, as they do for each other's gradients.
        multihost_utils.sync_global_devices("step")
        step += 1
        time.sleep(0.01)
    run.save(step, states.state_of(step, 4))
    run.close()
    print("STOPPED", step, flush=True)
"""


def lines_of(run, word):
    """Return the line of each process that starts with a word."""
    return [line for lines in run.output for line in lines if line.startswith(word)]


def test_two_processes_agree_on_damage_and_on_when_to_stop(tmp_path):
    code, port = textwrap.dedent(SAVE_RESTORE_STOP), str(hosts.free_port())
    run = hosts.Processes(
        [[sys.executable, "-c", code, str(tmp_path), port, index] for index in "01"], devices=2
    )
    run.until(lambda: len(lines_of(run, "RESTORED")) == 2)
    assert lines_of(run, "RESTORED") == ["RESTORED 10 [10]"] * 2, run.text()
    assert [sum("20 is damaged" in line for line in lines) for lines in run.output] == [1, 0]
    run.processes[1].send_signal(signal.SIGTERM)  # to one host only
    assert run.end() == [0, 0], run.text()
    stopped = lines_of(run, "STOPPED")
    assert len(stopped) == 2 and stopped[0] == stopped[1]

    last = int(stopped[0].removeprefix("STOPPED "))
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert saved.all_steps() == [10, last]
        assert integrity.damage(saved.root / str(last)) is None
        step, state = saved.restore(states.target(8))
    assert step == last
    states.assert_equal(state, states.init(last))
