"""What is kept of an adapter: its row without the padding, and its metrics without what many users' have in common."""

import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from json.encoder import encode_basestring_ascii

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.methods.method import Method
from minipeft.models.fields import shown
from minipeft.models.hooks import Sites

KINDS = (bool, float, int, str, dict, list, tuple)  # what JSON can hold, beside None; a bool is an int too
INTEGERS = (("b", 1 << 7), ("h", 1 << 15), ("i", 1 << 31), ("q", 1 << 63))  # struct's code, the first too large for it


# ---- Rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How a method's rows on a base are kept: the numbers of a bank's row that are trained, in the order of the row."""

    method: Method
    base: Sites

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.method.shapes(self.base)

    @property
    def layout(self) -> str:
        """The row's parameters and their shapes, padding included, as JSON."""
        return json.dumps(self.shapes)

    @cached_property
    def num_numbers(self) -> int:
        """Trained ones. Takes no memory, so a description may be judged by it."""
        return self.method.count(self.base)

    @cached_property
    def row_size(self) -> int:
        return self.method.layout(self.base).row_size

    @cached_property
    def trained(self) -> Tensor | None:
        """[P] bool: which numbers of a row are no padding; None: all."""
        if self.num_numbers == self.row_size:
            return None
        tensors = self.method.tensors(torch.zeros(self.row_size), self.base)
        trained = self.method.row({name: torch.ones_like(x) for name, x in tensors.items()}, self.base) != 0
        assert trained.sum() == self.num_numbers, f"{self.method}: {trained.sum()} of {self.num_numbers} numbers"
        return trained

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Trained numbers of each parameter."""
        if self.trained is None:
            return tuple(map(math.prod, self.shapes.values()))
        return tuple(int(part.sum()) for part in self.method.layout(self.base).tensors(self.trained).values())

    def packed(self, row: Tensor) -> Tensor:
        """A row [P] -> its trained numbers, on the CPU.

        Raises:
            ValueError: it is no row of this method on this base.
        """
        if row.shape != (self.row_size,) or row.dtype != torch.float32:
            raise ValueError(f"Packing: a {self.method.name} row must be [{self.row_size}] fp32, got "
                             f"{tuple(row.shape)} {row.dtype}; was it trained on another base?")  # fmt: skip
        row = row.detach().cpu()
        return row.contiguous() if self.trained is None else row[self.trained]

    def row(self, numbers: Tensor) -> Tensor:
        """Undoes `packed`; where nothing is trained a row is 0. May return `numbers`."""
        if self.trained is None:
            return numbers
        row = torch.zeros(self.row_size)
        row[self.trained] = numbers
        return row


# ---- Metrics -------------------------------------------------------------------------------------------------------

_quoted = lru_cache(encode_basestring_ascii)  # metrics' names recur, user after user


def take_apart(metrics: dict) -> tuple[str, str, bytes]:
    """Metrics -> a skeleton that many users share, as JSON with 0 for each number; the numbers' codes; the numbers.

    Raises:
        InputError: something that JSON has not, or a whole number of more than 64 bits.
    """
    numbers: list[int | float] = []
    try:
        if not isinstance(metrics, dict):
            raise TypeError(f"{shown(metrics)} is no dict")
        skeleton = _skeleton(metrics, numbers)
        codes = "<" + "".join([_code(number) for number in numbers])
        return skeleton, codes, struct.pack(codes, *numbers)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metrics must be what JSON can hold: {error}") from None


def _skeleton(value: object, numbers: list[int | float]) -> str:
    """JSON of value, 0 for each number; these are added to numbers."""
    kind = type(value)
    if kind not in KINDS:  # of a kind's own: numpy's floats are floats
        kind = next((known for known in KINDS if isinstance(value, known)), kind)
    if kind is float or kind is int:
        numbers.append(value)
        return "0"
    if kind is bool:
        return "true" if value else "false"
    if kind is dict:
        return "{" + ", ".join([_quoted(name) + ": " + _skeleton(part, numbers) for name, part in value.items()]) + "}"
    if kind is list or kind is tuple:
        return "[" + ", ".join([_skeleton(part, numbers) for part in value]) + "]"
    return json.dumps(value)


def _code(number: int | float) -> str:
    """The shortest that holds it."""
    if isinstance(number, float):
        return "d"
    for code, end in INTEGERS:
        if -end <= number < end:
            return code
    raise ValueError(f"{number} has more than 64 bits")


def put_together(skeleton: str, codes: str, numbers: bytes) -> dict:
    """Undoes `take_apart`. Raises ValueError if the three do not belong together."""
    if not re.fullmatch("<[bhiqd]*", codes) or struct.calcsize(codes) != len(numbers):
        raise ValueError(f"{len(numbers)} bytes of numbers, which are not what their codes say")
    values = iter(struct.unpack(codes, numbers))

    def with_numbers(value):
        if isinstance(value, dict):
            return {name: with_numbers(part) for name, part in value.items()}
        if isinstance(value, list):
            return [with_numbers(part) for part in value]
        return next(values) if type(value) is int else value

    try:
        metrics = with_numbers(json.loads(skeleton))
    except (StopIteration, RecursionError):
        raise ValueError("fewer numbers than places for them, or places within places") from None
    if not isinstance(metrics, dict) or next(values, None) is not None:
        raise ValueError("metrics are no object, or have numbers left over")
    return metrics
