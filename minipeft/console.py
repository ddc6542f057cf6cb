"""What the commands share: options and errors of one line, a progress bar."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from minipeft.errors import InputError
from minipeft.models.checkpoint import one_line
from minipeft_kernels.backend import backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a base
RECOMPUTE = "keep each layer's input alone, compute the rest again: less memory, 1/3 more time; the same bits on a CPU"
POOLING = "on an encoder, what a user's head reads of a text: the mean of its hidden states, or the base's pooler"
MINUTE = 60.0  # seconds between two lines where there is no terminal


class OneLineParser(argparse.ArgumentParser):
    """Bad options are one line, like all bad input."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the options")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype, of the base: adapters are fp32 always."""

    def dtype(name: str) -> torch.dtype:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(DTYPES)}; fp16 passes its range in many "
                                             "bases, take bfloat16 in its place")  # fmt: skip
        return DTYPES[name]

    parser.add_argument("--dtype", type=dtype, default=torch.float32, metavar="|".join(DTYPES),
                        help="numbers of the frozen base (default: float32)")  # fmt: skip


def check_device(device: str) -> None:
    """Raises InputError if nothing can run there. A GPU with a number becomes the current one, where kernels launch."""
    try:
        named = torch.device(device)
        backend(named.type)
        if named.type == "cuda" and named.index is not None:
            if named.index >= (number := torch.cuda.device_count()):
                raise ValueError(f"this machine has {number} GPU{'s' * (number != 1)}, counted from cuda:0")
            torch.cuda.set_device(named)
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
            if bar.disable and now - shown > MINUTE:
                left = f", {tqdm.format_interval((now - began) * (total - done) / done)} left" if done else ""
                print(f"{title}: {100 * done / max(total, 1):.0f} %{left}", flush=True)
                shown = now

        yield update
    print(f"{title}: {time.perf_counter() - began:.1f} s", flush=True)
