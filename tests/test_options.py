"""Does every field of every method and of TrainConfig have a flag, and does each flag arrive where it belongs?"""

from dataclasses import fields

import pytest

from minipeft.console import OneLineParser
from minipeft.errors import InputError
from minipeft.methods import METHODS
from minipeft.methods.dora import DoRA
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.vera import VeRA
from minipeft.options import NAMES, add_options, flag, method_of, options, settings_of
from minipeft.schedule import TrainConfig

VALUES = {  # option -> another value than any default, as text and as the field has it
    "rank": ("3", 3), "alpha": ("2.5", 2.5), "sites": ("q, down", ("q", "down")), "dropout": ("0.25", 0.25),
    "scaling": ("rslora", "rslora"), "ranks": ("q=2,layers.0.attn.v=4", (("q", 2), ("layers.0.attn.v", 4))),
    "alphas": ("q=1.5", (("q", 1.5),)), "vera_seed": ("7", 7), "d_start": ("0.5", 0.5), "inputs": ("k", ("k",)),
    "norms": ("attn_norm", ("attn_norm",)), "reduction": ("2.5", 2.5), "activation": ("silu", "silu"),
    "blocks": ("attn", ("attn",)), "scale": ("2", 2.0), "tokens": ("5", 5), "start_from": ("text", "text"),
    "text": ("4,9", (4, 9)), "hidden": ("16", 16), "hf_compat": (None, True), "encoder": ("mlp", "mlp"),
    "layers": ("1", 1),
}  # fmt: skip


def parse(*argv):
    parser = OneLineParser(allow_abbrev=False)
    add_options(parser)
    return parser.parse_args([str(arg) for arg in argv])


def given(name):
    text, _ = VALUES[name]
    return [flag(name)] if text is None else [flag(name), text]


@pytest.mark.parametrize("method", NAMES)
def test_without_options_a_method_is_its_dataclass(method):
    args = parse("--method", method)
    assert method_of(args) == METHODS[method]() and type(method_of(args)) is METHODS[method]
    assert TrainConfig(**settings_of(args)) == TrainConfig()


def test_every_field_of_every_method_has_an_option_that_reaches_it():
    assert options().keys() == VALUES.keys()
    reached = set()
    for name, by_method in options().items():
        for method, field in by_method.items():
            read = method_of(parse("--method", method, *given(name)))
            assert getattr(read, field.name) == VALUES[name][1] != field.default
            assert type(getattr(read, field.name)) is type(VALUES[name][1])
            others = [f.name for f in fields(read) if f.name != field.name]
            assert all(getattr(read, other) == getattr(METHODS[method](), other) for other in others)
            reached.add((method, field.name))
    assert reached == {(method, field.name) for method in NAMES for field in fields(METHODS[method])}


def test_an_option_that_the_method_has_not_is_named():
    for name, by_method in options().items():
        for method in set(NAMES) - set(by_method):
            with pytest.raises(InputError, match=f"^{flag(name)} is not an option of method {method}; it has "):
                method_of(parse("--method", method, *given(name)))
    with pytest.raises(InputError, match="--rank is not an option of method bitfit; it has none"):
        method_of(parse("--method", "bitfit", "--rank", 8))


def test_settings_of_training_are_the_fields_of_train_config():
    values = {"learning_rate": 0.5, "weight_decay": 0.25, "warmup": 0.5, "epochs": 3, "batch_size": 5, "patience": 4,
              "max_grad_norm": float("inf"), "beta1": 0.5, "beta2": 0.75, "eps": 0.125, "seed": 9}  # fmt: skip
    assert values.keys() == {field.name for field in fields(TrainConfig)} - {"method", "bf16_weights"}
    given = (x for name, value in values.items() for x in (flag(name), value))
    args = parse("--method", "vera", *given, "--bf16-weights")
    assert settings_of(args) == values | {"bf16_weights": True}
    assert method_of(args) == VeRA(), "TrainConfig's seed is not VeRA's"


def test_some_whole_lines():
    assert method_of(parse("--method", "lora", "--rank", 4, "--sites", "q,v", "--scaling", "rslora")) == LoRA(
        4, sites=("q", "v"), scaling="rslora")  # fmt: skip
    assert method_of(parse("--method", "dora", "--alpha", 8)) == DoRA(alpha=8.0)
    assert method_of(parse("--method", "prefix", "--hidden", 32, "--no-hf-compat")) == PrefixTuning(hidden=32)
    assert method_of(parse("--method", "prompt", "--start-from", "normal", "--tokens", 3)) == PromptTuning(3, "normal")


@pytest.mark.parametrize("argv", [["--rank", "many"], ["--ranks", "q"], ["--ranks", "q=x"], ["--text", "a,b"],
                                  ["--epochs", "1.5"], ["--learn", "1"]])  # fmt: skip
def test_a_value_that_cannot_be_read_names_its_option(argv):
    with pytest.raises(InputError, match=argv[0]):
        parse("--method", "lora", *argv)
