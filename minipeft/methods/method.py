"""What every PEFT method is made of: a configuration that says what a user trains, and an actor that applies it.

    configuration   Method: a frozen dataclass, the user's own. Parameters and their shapes, start values, counts
    actor           Actor: the method's side of a bank. Views of the bank's rows, by the site they act at

A method never runs over users. It says where in the base each of its parameters acts and how (Actor's tables); a pass
(acting.py) collects the tables of all banks and calls one batched op per site for all users and all methods.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank, Layout
from minipeft.errors import InputError
from minipeft.models.hooks import Sites
from minipeft.models.rows import Rows
from minipeft.randomness import generator
from minipeft_kernels.backend import backend
from minipeft_kernels.bottleneck import BottleneckTensors
from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segment_lora import Lora
from minipeft_kernels.segments import Segments, to_device
from minipeft_kernels.wgrad import num_squares

Draw = Callable[..., np.random.Generator]  # what for, e.g. a site -> a generator that belongs to (seed, user, method)


@dataclass(frozen=True)
class Method:
    """One user's configuration of a method. Subclasses are frozen dataclasses of plain values."""

    name: ClassVar[str]  # as on the command line
    summary: ClassVar[str]  # one line: what is trained

    def check(self, base: Sites) -> None:
        """Raises InputError if this configuration cannot act on this base."""
        raise NotImplementedError

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """Parameter -> its shape, in the order of the user's row. Bigger than trained where a class is padded."""
        raise NotImplementedError

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        """A new user's parameters, as `tensors` gives them."""
        raise NotImplementedError

    def actor(self, bank: Bank, base: Sites) -> "Actor":
        """How all users of a bank of this kind are applied."""
        raise NotImplementedError

    def actors(self, bank: Bank, base: Sites) -> "tuple[Actor, ...]":
        return (self.actor(bank, base),)

    @property
    def parts(self) -> "tuple[Method, ...]":
        """The methods that act together, of each of `actors`: a stack has several (stack.py)."""
        return (self,)

    @property
    def title(self) -> str:
        """What people call it: "lora", or "lora+head" of methods that act together."""
        return "+".join(part.name for part in self.parts)

    def kind(self, base: Sites) -> tuple:
        """Users of equal kinds share a bank. A function of this configuration and the base alone."""
        return (self,)

    def virtual(self, base: Sites) -> tuple[int, int]:
        """Virtual tokens before each sequence, and before each input of an encoder-decoder."""
        return 0, 0

    def layout(self, base: Sites) -> Layout:
        return Layout(self.shapes(base))

    def initial_row(self, base: Sites, seed: int, user: str) -> Tensor:
        """A new user's row [P], fp32: a function of (seed, user, method, site) alone."""
        return self.row(self.start(base, lambda *purpose: generator(seed, user, self.name, *purpose)), base)

    def tensors(self, row: Tensor, base: Sites) -> dict[str, Tensor]:
        """A row [P] as files have it: parameter -> what is trained of it, contiguous."""
        return {name: tensor.contiguous() for name, tensor in self.layout(base).tensors(row).items()}

    def row(self, tensors: dict[str, Tensor], base: Sites) -> Tensor:
        """Undoes `tensors`.

        Raises:
            InputError: a tensor is missing, left over, or of a shape that this base has not.
        """
        row = torch.zeros(self.layout(base).row_size)
        self.check_tensors(tensors, self.tensors(row, base))
        return self.layout(base).row(tensors)

    def check_tensors(self, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, tensor in expected.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                came = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise InputError(f"{name} is {came}, this base needs {tuple(tensor.shape)}; was it trained on another "
                                 "base?")  # fmt: skip
        if left := sorted(tensors.keys() - expected.keys()):
            raise InputError(f"{left[0]} is no site of this base; was it trained on another base?")

    def count(self, base: Sites) -> int:
        """Trained numbers of one user."""
        return sum(math.prod(shape) for shape in self.shapes(base).values())

    def flops(self, base: Sites) -> int:
        """FLOPs that it adds to the forward pass for one token, at every site once; on a T5 one token of each side.

        What virtual tokens cost is not in it: each is one more row that runs through the base.
        """
        raise NotImplementedError

    def described(self) -> dict:
        """As plain values, for files. `method_from` undoes it."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_described(cls, values: dict) -> "Method":
        """From the fields' plain values. Raises InputError for one that is no field."""
        known = {f.name for f in fields(cls)}
        if left := sorted(values.keys() - known):
            raise InputError(f"method {cls.name} has no option {left[0]!r}; it has {', '.join(sorted(known))}")
        return cls(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value):
    """Lists, which is what JSON makes of tuples, as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class IfThere(tuple):
    """Names of sites that a base may lack: a method's defaults, which `on_base` cuts to what there is.

    A plain tuple is somebody's choice: where a base lacks one of it, that is an error.
    """

    def on_base(self, places: dict) -> tuple[str, ...]:
        return tuple(name for name in self if any(picks(name, place) for place in places))


def choose(method: str, names: tuple[str, ...], places: dict) -> dict:
    """The places whose name is one of these, or ends with one of these words: "q", "attn.q" or "layers.3.attn.q".

    Raises:
        InputError: no name, or one that is nowhere in this base; says what there is.
    """
    return {place: places[place] for place in _chosen(method, tuple(names), tuple(places))}


@lru_cache(1024)  # every user who is admitted asks several times
def _chosen(method: str, names: tuple[str, ...], places: tuple[str, ...]) -> list[str]:
    if not names:
        raise InputError(f"{method}: no sites, so nothing would be trained; name at least one, e.g. "
                         f"{next(iter(places), 'q').rsplit('.', 1)[-1]}")
    for name in names:
        if not any(picks(name, place) for place in places):
            kinds = sorted({place.rsplit(".", 1)[-1] for place in places}) or ["none that it could act at"]
            raise InputError(f"{method}: no site of this base is called {name!r}; it has {', '.join(kinds)}")
    return [place for place in places if any(picks(name, place) for name in names)]


def picks(name: str, place: str) -> bool:
    """Whether a name chosen by people means this place."""
    return place == name or place.endswith("." + name)


# ---- Bank side -----------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """A parameter of all slots and where its gradient goes: [U, ...] each, views of the bank or of a Derived."""

    values: Tensor
    grads: Tensor


class Bottlenecks(NamedTuple):
    """Bottleneck adapters of all slots at a block, as bottleneck_rows takes them.

    reads: "output": the block's output; "sum": that and the stream, normalised where the base does; "input".
    """

    weights: BottleneckTensors
    grads: BottleneckTensors
    activation: str
    reads: str
    scale: Tensor | None
    widths: Tensor | None


@dataclass(frozen=True)
class Share:
    """One bank's part of a pass: rows first_row .. first_row + segments.num_rows - 1.

    prompts: where the users' virtual tokens stand among all rows of the pass; None: nowhere.
    keys:    [S] uint64 on the host, of each segment's user. steps: [S] int64, each user's number of steps so far; None
             where nobody trains.
    tile:    see lora_linear.
    anchor:  any tensor that requires grad: see the kernels' *_rows ops.
    """

    residents: "Residents"
    first_row: int
    segments: Segments
    prompts: PromptPlan | None
    keys: np.ndarray
    steps: np.ndarray | None
    tile: int | None
    anchor: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.segments.num_rows)


class Actor:
    """What a bank's users do, by site. Subclasses fill in the tables they need.

    input_scales: linear site -> what its input is multiplied with, [U, K].
    scales:       linear site -> what its output is multiplied with, bias included, [U, N].
    gains:        norm site -> weights in place of the base's, whose bias is dropped too, [U, width].
    shifts:       linear or norm site -> what is added to its output, last of all.
    deltas:       linear site -> what is added to its output where that is no LoRA: a function of (its input's rows of
                  the share [T_g, K], share) -> [T_g, N].
    bottlenecks:  block site.
    prompts:      "embed", or an attention's "<site>.k" and "<site>.v" -> rows of the virtual tokens, [U, V, width].
    embeds:       "embed", or an encoder-decoder's "targets" -> what is added to embedded tokens: a function of
                  (tokens [T_g], share) -> [T_g, width].
    tail:         what a T5's stream becomes after its encoder's last layer: a function of (the share's rows of it
                  [T_g, width], the pass's rows, share) -> [T_g, width]; or None.
    derived:      parameters that are functions of trained ones, and second uses of some.
    """

    def __init__(self):
        self.input_scales: dict[str, Vectors] = {}
        self.scales: dict[str, Vectors] = {}
        self.gains: dict[str, Vectors] = {}
        self.shifts: dict[str, Vectors] = {}
        self.deltas: dict[str, Callable[[Tensor, Share], Tensor]] = {}
        self.bottlenecks: dict[str, Bottlenecks] = {}
        self.prompts: dict[str, Vectors] = {}
        self.embeds: dict[str, Callable[[Tensor, Share], Tensor]] = {}
        self.tail: Callable[[Tensor, Rows, Share], Tensor] | None = None
        self.derived: list[Derived | SecondUse] = []
        self.loras: dict[tuple[str, ...], dict] = {}  # sites that share an input -> fields of a kernel's `Lora`

    def admit(self, slot: int, method: Method) -> None:
        """Note what is the user's own besides the row: a scale, a rank."""

    def loras_of(self, share: Share) -> dict[tuple[str, ...], Lora]:
        """A share's LoRA of a pass, by the sites it acts at: at each by itself, and at those that can go at once."""
        return {sites: Lora(segments=share.segments, ranks=None, **view) for sites, view in self.loras.items()}


class Residents:
    """All resident users of one kind: their rows and what they do.

    bank: [U, P] buffers. keys: [U] uint64 on the host, each user's own key for dropout.
    squares: on a GPU, if the bank is all LoRA, [U, Q] fp32: sums of squares that the backward pass leaves for the
             gradient's norm. Zero it before a pass: which columns are written depends on which sites share launches.
    """

    def __init__(self, method: Method, base: Sites, num_slots: int, device: torch.device | str, dtype: torch.dtype):
        self.bank = Bank(method.layout(base), num_slots, device, dtype)
        self.actors = method.actors(self.bank, base)
        self.virtual = method.virtual(base)
        self.keys = np.zeros(num_slots, dtype=np.uint64)
        self.squares: Tensor | None = None
        tables = ("input_scales", "scales", "gains", "shifts", "deltas", "bottlenecks", "prompts", "embeds", "tail")
        if backend(device) == "triton" and not any(getattr(actor, t) for actor in self.actors for t in tables):
            self._make_room_for_squares(num_slots, device)

    def _make_room_for_squares(self, num_slots: int, device: torch.device | str) -> None:
        """Columns of its own for every gradient of every view, whichever of them a pass writes."""
        itemsize = self.bank.compute.itemsize
        views = [view for actor in self.actors for view in actor.loras.values()]
        matrices = [(view["grad_A"], *view["grad_Bts"]) for view in views]
        counts = [[num_squares(M.shape[1], M.shape[2], itemsize) if M._is_view() else 0 for M in of] for of in matrices]
        self.squares = torch.zeros(num_slots, sum(map(sum, counts)), device=device)
        columns = iter(self.squares.split([n for of_view in counts for n in of_view], dim=1))
        for view, of_view in zip(views, counts):
            view["squares"] = tuple(part if part.shape[1] else None for part in (next(columns) for _ in of_view))

    @property
    def at_head(self) -> bool:
        """Whether they act at the head."""
        return any(("head",) in actor.loras for actor in self.actors)

    def admit(self, user: str, method: Method, row: Tensor, key: int) -> int:
        """Put a user's row [P] into a free slot and return the slot."""
        slot = self.bank.admit(user, row)
        self.keys[slot] = key
        for actor, part in zip(self.actors, method.parts):
            actor.admit(slot, part)
        return slot

    def begin(self, slots: np.ndarray, training: bool) -> None:
        """Before a pass with these slots."""
        if self.squares is not None:
            self.squares.zero_()
        for derived, on_device in self._derived(slots):
            derived.begin(on_device, training)

    def end(self, slots: np.ndarray) -> None:
        """After the backward of that pass."""
        for derived, on_device in self._derived(slots):
            derived.end(on_device)

    def _derived(self, slots: np.ndarray) -> "list[tuple[Derived | SecondUse, Tensor]]":
        """What is derived, and with each these slots on the device, copied there once; [] where nothing is."""
        found = [derived for actor in self.actors for derived in actor.derived]
        on_device = to_device(slots, self.bank.weights.device) if found else None
        return [(derived, on_device) for derived in found]


def vectors(bank: Bank, name: str) -> Vectors:
    """The bank's parameter `name` of all slots."""
    return Vectors(bank.layout.view(bank.compute, name), bank.layout.view(bank.grads, name))


class Derived:
    """Parameters that a pass uses and nobody trains: functions of trained ones, of all slots in the pass at once.

        values[u] = f(the trained parameters of u)          before a pass
        grads of the trained ones, by autograd through f    after it, from what the pass left in `grads`

    Args:
        bank:   whose rows the trained parameters are.
        names:  the trained parameters f reads.
        shapes: name -> shape of each parameter that f gives, for one user.
        f:      ({name: [S, ...] fp32}, slots [S]) -> {name: [S, ...]}; batched over users, no loop.
    """

    def __init__(self, bank: Bank, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]],
                 f: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]):  # fmt: skip
        self.bank, self.names, self.f = bank, names, f
        U, compute = len(bank.weights), bank.compute
        self.values = {name: compute.new_zeros(U, *shape) for name, shape in shapes.items()}
        self.grads = {name: bank.grads.new_zeros(U, *shape) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Vectors:
        return Vectors(self.values[name], self.grads[name])

    def begin(self, slots: Tensor, training: bool) -> None:
        view, slots = self.bank.layout.view, self._at_least_two(slots)
        with torch.set_grad_enabled(training):
            self._trained = {name: view(self.bank.weights, name)[slots].requires_grad_(training) for name in self.names}
            self._made = self.f(self._trained, slots)
        for name, made in self._made.items():
            self.values[name][slots] = made.detach().to(self.values[name].dtype)
            self.grads[name][slots] = 0.0

    @staticmethod
    def _at_least_two(slots: Tensor) -> Tensor:
        """A user alone is computed twice: products of one matrix go another way than of several, to other last bits."""
        return slots if len(slots) > 1 else slots.repeat(2)

    def end(self, slots: Tensor) -> None:
        slots = self._at_least_two(slots)
        made, left = list(self._made.values()), [self.grads[name][slots].to(m.dtype) for name, m in self._made.items()]
        grads = torch.autograd.grad(made, list(self._trained.values()), left, allow_unused=True)
        for name, grad in zip(self._trained, grads):
            if grad is not None:  # f may read a parameter without passing gradients on: DoRA's norm does
                self.bank.layout.view(self.bank.grads, name)[slots] = grad
        self._trained = self._made = None


class SecondUse:
    """A parameter's second use in a pass: ops store gradients, so this one's go beside the first's and are added after.

    Both uses store gradients of the same slots, all that are in the pass.
    """

    def __init__(self, first: Vectors):
        self._first = first
        self.vectors = Vectors(first.values, torch.zeros_like(first.grads))

    def begin(self, slots: Tensor, training: bool) -> None:
        """Nothing to do before a pass."""

    def end(self, slots: Tensor) -> None:
        self._first.grads[slots] += self.vectors.grads[slots]


def method_from(described: dict) -> Method:
    """The method that `described` came from.

    Raises:
        InputError: no method of that name, or fields that it has not.
    """
    from minipeft.methods import METHODS  # they import this file

    values = dict(described)
    kind = METHODS.get(values.pop("name", None))
    if kind is None:
        raise InputError(f"no method is called {described.get('name')!r}; there are {', '.join(METHODS)}")
    return kind.from_described(values)
