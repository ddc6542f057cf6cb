"""Ctrl-C and SIGTERM: a long training notes them, and stops where nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what was under way is saved. signum: which of the two."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


class Stop:
    """Whether somebody asked to stop: signum, 0 if nobody did."""

    signum = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM only make a note, for the next pass boundary; the second one acts as ever.

    Signals that are ignored stay so (a command in the background), and threads other than the main one get none.
    """
    stop, before = Stop(), {}

    def note(signum, frame) -> None:
        stop.signum = signum
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
