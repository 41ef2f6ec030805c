"""Two real processes, joined by jax.distributed: they save, restore and stop as one."""

import signal
import socket
import subprocess
import sys
import textwrap
import threading

import test_checkpoint as single

from mae_jax import checkpoint

SAVE_RESTORE_STOP = """
    import os, sys
    workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, process)

    import time
    import numpy as np
    from jax.experimental import multihost_utils
    import test_checkpoint as single
    from mae_jax import distributed, provenance

    assert jax.device_count() == 4
    provenance.prepare_workdir(workdir, single.config())

    def state_of(step):
        host = jax.device_get(single.init(step))
        def place(x, like):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])
        return jax.tree.map(place, host, single.target(4))

    run = single.open_run(workdir)
    for step in (10, 20):
        run.save(step, state_of(step))
    run.wait()
    if process == 0:
        single.flip(run.root.parent)
    multihost_utils.sync_global_devices("damaged")
    step, state = run.restore(single.target(4))
    print("RESTORED", step, run.all_steps(), flush=True)

    stop_requested = distributed.preemption()
    step = 20
    while not stop_requested():
        # The processes wait for each other here, as they do for each other's gradients.
        multihost_utils.sync_global_devices("step")
        step += 1
        time.sleep(0.01)
    run.save(step, state_of(step))
    run.close()
    print("STOPPED", step, flush=True)
"""


def read_to(stream, start):
    """The lines up to the one with this start, that line included."""
    lines = []
    for line in stream:
        lines.append(line.rstrip())
        if line.startswith(start):
            return lines
    raise EOFError(lines)


def test_two_processes_agree_on_damage_and_on_when_to_stop(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(SAVE_RESTORE_STOP)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(port), str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    too_long = threading.Timer(240, lambda: [process.kill() for process in processes])
    too_long.start()
    try:
        said = [read_to(process.stdout, "RESTORED") for process in processes]
        assert [lines[-1] for lines in said] == ["RESTORED 10 [10]"] * 2
        assert [sum("20 is damaged" in line for line in lines) for lines in said] == [1, 0]
        processes[1].send_signal(signal.SIGTERM)  # only one host is told
        rest = [process.communicate()[0].splitlines() for process in processes]
    finally:
        too_long.cancel()
        for process in processes:
            process.kill()
    stopped = [lines[-1] for lines in rest]
    assert stopped[0] == stopped[1]
    assert [process.returncode for process in processes] == [0, 0]

    last = int(stopped[0].removeprefix("STOPPED "))
    run = single.open_run(tmp_path)
    assert run.all_steps() == [10, last]
    assert checkpoint.damage(run.root / str(last)) is None
    step, state = run.restore(single.target(8))
    run.close()
    assert step == last
    single.assert_equal(state, single.init(last))
