"""Methods and training settings as command-line options: one flag for each field, so that a default exists once."""

import argparse
from collections.abc import Callable
from dataclasses import Field, fields, replace
from typing import Any, get_args, get_origin

from minipeft.errors import InputError
from minipeft.lanes import lanes_on
from minipeft.methods import METHODS
from minipeft.methods.method import Method
from minipeft.models.classifier import Base
from minipeft.models.hooks import Sites
from minipeft.running import for_base
from minipeft.schedule import PassConfig, TrainConfig

NAMES = [name for name in METHODS if name != "stack"]  # what people choose from
SETTINGS = [field for field in fields(TrainConfig) if field.name != "method"]
AUTO = {"slots": "; auto: this and the token budget from the memory that is free"}
DEFAULTS = {"lanes": "one for each core, as many as passes of 1,024 rows each fill; one if deterministic"}
SHAPES = {int: "N", float: "X", str: "NAME"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--method, every setting of TrainConfig and every method's own options.

    What is not given stays out of the namespace: `method_of` and `settings_of` read what is there.
    """
    parser.add_argument("--method", required=True, choices=NAMES, metavar="NAME", help="one of those listed below")
    training = parser.add_argument_group("how each user trains")
    for field in SETTINGS:
        training.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS,
                              help=f"default {field.default}", **_reading(field.type))  # fmt: skip
    own = parser.add_argument_group("options of methods", "with the methods that have them and their defaults")
    for name, by_method in options().items():
        defaults: dict[str, list[str]] = {}
        for method, field in by_method.items():
            defaults.setdefault(_shown(field.default), []).append(method)
        own.add_argument(flag(name), dest=_dest(name), default=argparse.SUPPRESS,
                         help="; ".join(f"{', '.join(methods)}: {value}" for value, methods in defaults.items()),
                         **_reading(next(iter(by_method.values())).type))  # fmt: skip


def add_pass_options(parser: argparse.ArgumentParser) -> None:
    """--slots, --token-budget...: every field of PassConfig."""
    together = parser.add_argument_group("how users share passes: no user's adapter depends on it, but for rounding")
    for field in fields(PassConfig):
        reading = {"type": _number_or_auto, "metavar": "N"} if field.name == "slots" else _reading(field.type)
        together.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS,
                              help=f"default {DEFAULTS.get(field.name, field.default)}{AUTO.get(field.name, '')}",
                              **reading)  # fmt: skip


def passes_of(args: argparse.Namespace) -> PassConfig:
    """What `add_pass_options` read, for a command that has --device."""
    passes = PassConfig(**{field.name: getattr(args, field.name) for field in fields(PassConfig) if field.name in args})
    if "lanes" in args or passes.deterministic:  # how many cores divide a product may change its last bits
        return passes
    return replace(passes, lanes=lanes_on(args.device, passes.token_budget))


def options() -> dict[str, dict[str, Field]]:
    """Option -> method -> that method's field. One that TrainConfig has too has the method's name before it."""
    taken, found = {field.name for field in SETTINGS}, {}
    for method in NAMES:
        for field in fields(METHODS[method]):
            name = f"{method}_{field.name}" if field.name in taken else field.name
            found.setdefault(name, {})[method] = field
    return found


def method_of(args: argparse.Namespace) -> Method:
    """The method that the options ask for. Raises InputError for an option that it has not."""
    known, values = options(), {}
    for name, by_method in known.items():
        if _dest(name) not in args:
            continue
        if args.method not in by_method:
            own = ", ".join(flag(other) for other, methods in known.items() if args.method in methods) or "none"
            raise InputError(f"{flag(name)} is not an option of method {args.method}; it has {own}")
        values[by_method[args.method].name] = getattr(args, _dest(name))
    return METHODS[args.method](**values)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that were given."""
    return {field.name: getattr(args, field.name) for field in SETTINGS if field.name in args}


def described_methods(base: Base | None) -> str:
    """One line for each method: what it trains and, on this base, how many numbers that is at its defaults."""
    counts = {} if base is None else {told["name"]: told["count"] for told in counted(base)}
    shown = {name: "" if base is None else f"{'-' if counts[name] is None else f'{counts[name]:,}':>12}  "
             for name in NAMES}  # fmt: skip
    return "\n".join(f"  {name:<10} {shown[name]}{METHODS[name].summary}" for name in NAMES)


def counted(base: Base) -> list[dict]:
    """Every method at its defaults on this base, without the head that an encoder puts beside it.

    count: numbers that one user trains. flops_per_token: Method.flops. flops_per_text: an encoder's head's instead,
    as it runs once for a text; 0 for others. virtual_tokens: rows more for every text. sites: where it acts. why_not:
    None, or why it does not apply; then all numbers are None.
    """
    found = []
    for name in NAMES:
        method = for_base(METHODS[name](), base)
        try:
            method.check(base)
        except InputError as error:
            found.append({"name": name, "count": None, "flops_per_token": None, "flops_per_text": None,
                          "virtual_tokens": None, "sites": [], "why_not": str(error)})  # fmt: skip
            continue
        own = method.parts[0]
        flops, per_text = own.flops(base), name == "head" and base.head_size is not None
        found.append({"name": name, "count": own.count(base), "flops_per_token": 0 if per_text else flops,
                      "flops_per_text": flops if per_text else 0, "virtual_tokens": sum(own.virtual(base)),
                      "sites": sites_of(own, base),
                      "why_not": None})  # fmt: skip
    return found


def sites_of(method: Method, base: Sites) -> list[str]:
    """Where a method acts, by the last words of the sites' names, in forward order."""
    sites = base.sites | base.heads | base.norms | base.blocks | base.embeddings
    places = [name.rpartition(".")[0] for name in method.shapes(base)]
    kinds = dict.fromkeys(place.rpartition(".")[2] for place in places if place in sites)
    return list(kinds) or ["embed" if any(method.virtual(base)) else "head"]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _dest(name: str) -> str:
    return f"option_{name}"


def _reading(kind: Any) -> dict:
    """How argparse reads a value of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is not tuple:
        return {"type": kind, "metavar": SHAPES[kind]}
    item = get_args(kind)[0]
    if get_origin(item) is not tuple:
        return _several(item, f"{SHAPES[item]},...")
    number = get_args(item)[1]
    return _several(_pair(number), f"SITE={SHAPES[number]},...")


def _several(item: Callable[[str], Any], shape: str) -> dict:
    def values(text: str) -> tuple:
        try:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"needed {shape}, got {text!r}") from None

    return {"type": values, "metavar": shape}


def _pair(number: Callable[[str], Any]) -> Callable[[str], tuple]:
    def pair(text: str) -> tuple:
        site, _, value = text.partition("=")
        return site.strip(), number(value)

    return pair


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "-"
    return str(default)
