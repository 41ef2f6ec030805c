"""Set up worker processes: the signals that they ignore, and when they end."""

import multiprocessing
import os
import signal
import threading


def follow_parent(*ignored: signal.Signals) -> None:
    """Make this worker process ignore some signals, and end when its parent ends, even by SIGKILL.

    A signal from a terminal reaches parent and workers alike; what workers ignore is the parent's
    to handle. Without its parent, a worker would wait for ever.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()
