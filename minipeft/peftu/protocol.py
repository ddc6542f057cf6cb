"""How a run follows PEFT-U: what the published code does and what we do, one switch for each difference.

`paper` reproduces the published prompts, hyper-parameters and scoring; `fixed`, the default, is the honest version.
Read in the published code (github.com/ChrisIsKing/Parameter-Efficient-Personalization).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from minipeft.errors import InputError
from minipeft.methods import METHODS
from minipeft.methods.bottleneck import BottleneckMethod, Houlsby
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.ptuning import PTuning
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5
from minipeft.prompts import ANSWER_TOKENS
from minipeft.schedule import TrainConfig

STEP = 3  # between neighbouring learning rates of a grid
GRID = (-1, 0, 1)  # steps from a method's own rate: what is tried of every method first
MOST_RATES = 5  # of a method, those beyond the ends included
RATES = {  # where each method's grid begins; others: OTHER_RATE
    "shared": 7e-4, "shared_user": 7e-4, "lora": 7e-4, "dora": 7e-4, "houlsby": 7e-4, "pfeiffer": 7e-4,
    "parallel": 7e-4, "ia3": 5e-3, "vera": 1e-2, "bitfit": 3e-3, "layernorm": 3e-3, "prompt": 1e-2, "prefix": 1e-2,
    "ptuning": 1e-3, "head": 1e-2,
}  # fmt: skip
OTHER_RATE = 2e-3
ADAPTER_ANSWER_TOKENS = 16  # at most, of a bottleneck adapter's decoded answer, as published; of others ANSWER_TOKENS


@dataclass(frozen=True)
class Protocol:
    """Each switch is one thing that the published code does; `fixed` has them all off.

    one_rate:             one learning rate for every method, so that prompt, prefix and IA3 hardly train; None: every
                          method's best of a small grid on validation, which goes on where the best lies at its end.
    bf16_weights:         adapters are rounded to bf16 after every step, so that small steps are lost.
    decoded:              the answer is decoded text, read by the published scorer (scoring.py), where the base is a T5;
                          else the label of the highest likelihood. Both accuracies are always reported.
    any_hit:              of several labels one right one is enough; else Jaccard.
    own_example:          a training example may stand in its own prompt, with its label.
    first_labels_only:    one example of each label is drawn, in alphabetical order, then cut to `examples`; else
                          balanced.
    cut_query:            a prompt that is too long loses its end, which is the query; else examples go first, then the
                          text is shortened.
    hf_prefix:            prefix tuning reaches a T5's decoder self-attention only.
    start_by_place:       a user's start depends on their place among the users; else on (seed, user).
    zero_shot_examples:   the baseline called zero-shot has the user's own examples in its prompt.
    examples:             the user's own examples in every prompt, in training too; 0: none. Few-shot has its own.
    epochs_in_full:       nobody stops early; the best epoch by validation loss is taken all the same.
    max_grad_norm:        of a user's gradient.
    """

    one_rate: float | None = None
    bf16_weights: bool = False
    decoded: bool = False
    any_hit: bool = False
    own_example: bool = False
    first_labels_only: bool = False
    cut_query: bool = False
    hf_prefix: bool = False
    start_by_place: bool = False
    zero_shot_examples: bool = False
    examples: int = 0
    epochs_in_full: bool = False
    max_grad_norm: float = 1.0

    def methods(self) -> dict[str, Method]:
        """The methods by name, as this protocol configures them."""
        ours = {name: kind() for name, kind in METHODS.items() if name != "stack"}
        return ours | (PUBLISHED if self.one_rate else {})

    def for_base(self, method: Method, base: Sites) -> Method:
        if isinstance(method, PrefixTuning) and self.hf_prefix and isinstance(base, T5):
            return replace(method, hf_compat=True)
        return method

    def config(self, method: Method, rate: float, seed: int, epochs: int) -> TrainConfig:
        """How a user trains by this method; the rest is TrainConfig's own."""
        warmup = 0.01 if self.one_rate and method.parts[0].name in ("houlsby", "ia3") else TrainConfig.warmup
        patience = epochs if self.epochs_in_full else TrainConfig.patience
        return TrainConfig(method, rate, warmup=warmup, epochs=epochs, patience=patience, seed=seed,
                           max_grad_norm=self.max_grad_norm, bf16_weights=self.bf16_weights)  # fmt: skip

    def rates(self, name: str) -> list[float]:
        """The learning rates that are tried of a method first: as many of each."""
        return [self.one_rate] if self.one_rate else [grid_rate(name, steps) for steps in GRID]

    def beyond(self, name: str, losses: Mapping[float, float]) -> float | None:
        """The rate to try next of a method, given the validation loss at each of `rates(name)` and whatever came of
        this since: one step past the end at which the best lies, and down where all are infinite. None: enough."""
        if self.one_rate or len(losses) == MOST_RATES:
            return None
        reach = range(GRID[0] - MOST_RATES, GRID[-1] + MOST_RATES + 1)
        steps = {rate: number for number in reach if (rate := grid_rate(name, number)) in losses}
        best = steps[min(sorted(losses), key=losses.get)]
        if best == min(steps.values()):
            return grid_rate(name, best - 1)
        return grid_rate(name, best + 1) if best == max(steps.values()) else None


def grid_rate(name: str, steps: int) -> float:
    """A method's learning rate so many steps from where its grid begins."""
    return float(f"{RATES.get(name, OTHER_RATE) * STEP**steps:.2g}")


def answer_tokens(method: Method) -> int:
    """How long an answer may be that is decoded, for the published scoring, in either mode."""
    return ADAPTER_ANSWER_TOKENS if isinstance(method, BottleneckMethod) else ANSWER_TOKENS


PUBLISHED: dict[str, Method] = {  # where the published configuration is not our default
    "lora": LoRA(rank=8, alpha=32, sites=("q", "v"), dropout=26 / 256),  # 0.1 in steps of 1/256
    "houlsby": Houlsby(reduction=16),
    "prefix": PrefixTuning(tokens=20),
    "ptuning": PTuning(tokens=20, hidden=128, layers=2),
    "prompt": PromptTuning(tokens=20, start_from="normal"),
    "ia3": IA3(sites=("k", "v", "up"), inputs=()),
}
FIXED = Protocol()
PAPER = Protocol(
    one_rate=2e-5, bf16_weights=True, decoded=True, any_hit=True, own_example=True, first_labels_only=True,
    cut_query=True, hf_prefix=True, start_by_place=True, zero_shot_examples=True, examples=3, epochs_in_full=True,
    max_grad_norm=float("inf"),
)  # fmt: skip
PROTOCOLS = {"fixed": FIXED, "paper": PAPER}


# ---- Equal sizes ---------------------------------------------------------------------------------------------------

SIZES = {"lora": "rank", "dora": "rank", "houlsby": "reduction", "pfeiffer": "reduction", "parallel": "reduction",
         "prompt": "tokens", "prefix": "tokens", "ptuning": "hidden", "vera": "rank"}  # each one's knob
LARGEST = 1024


def equal_size(method: Method, base: Sites, numbers: int) -> Method:
    """The method at the size whose trained numbers come nearest to `numbers`; as it is if it has no size.

    LoRA keeps alpha / rank. P-tuning gets one layer, as in the published ablation.
    """
    knob = SIZES.get(method.name)
    if knob is None:
        return method
    if isinstance(method, PTuning):
        method = replace(method, layers=1)

    def sized(size: int) -> Method:
        scaled = {"alpha": method.alpha / method.rank * size} if "alpha" in {f.name for f in fields(method)} else {}
        return replace(method, **{knob: size}, **scaled)

    def distance(size: int) -> float:
        try:
            sized(size).check(base)
        except InputError:  # too large for the base, or a bottleneck of no feature
            return math.inf
        return abs(sized(size).count(base) - numbers)

    return sized(min(range(1, LARGEST + 1), key=distance))
