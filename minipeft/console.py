"""What the commands share: options and errors of one line, a progress bar."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from minipeft.errors import InputError
from minipeft.models.checkpoint import one_line
from minipeft_kernels.backend import backend

MINUTE = 60.0  # seconds between two lines where there is no terminal


class OneLineParser(argparse.ArgumentParser):
    """Bad options are one line, like all bad input."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the options")


def check_device(device: str) -> None:
    try:
        backend(device)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--device {device}: {error}") from None


@contextmanager
def plain_warnings(command: str) -> Iterator[None]:
    """Inside, a warning is one line on stderr, without the line of code that gave it."""

    def show(message: Warning | str, *_args, **_options) -> None:
        print(f"{command}: {one_line(message)}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; elsewhere a line a minute and one when done. Yields a function of (done, total)."""
    began = shown = time.perf_counter()
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    with tqdm(desc=title, disable=None, leave=False, bar_format=form) as bar:

        def update(done: int, total: int) -> None:
            nonlocal shown
            bar.total = total
            bar.update(done - bar.n)
            now = time.perf_counter()
            if bar.disable and now - shown > MINUTE and done:
                left = (now - began) * (total - done) / done
                print(f"{title}: {100 * done / total:.0f} %, {tqdm.format_interval(left)} left", flush=True)
                shown = now

        yield update
    print(f"{title}: {time.perf_counter() - began:.1f} s", flush=True)
