"""Reading config.json: one field at a time, each with what it must be. A wrong field is an InputError that names it."""

from minipeft.errors import InputError

MOST = 2**28  # of anything a base has; a larger number is a damaged file
LARGEST = 2.0**127  # a real number; so its fp32 is finite


def shown(value: object) -> str:
    """A field's value for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def whole(fields: dict, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
    """fields[name], a whole number from least to most; without a default it is needed."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"the field {name!r} is missing. Take config.json from the model's own folder.")
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {shown(value)}, needed a whole number of at least {least} and at most {most}.")
    return value


def num_layers(fields: dict, name: str) -> int:
    """fields[name], how many layers."""
    return whole(fields, name, most=10_000)


def real(fields: dict, name: str, default: float | None = None) -> float:
    """fields[name], a positive number; without a default it is needed."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"the field {name!r} is missing. Take config.json from the model's own folder.")
    if type(value) not in (int, float) or not 0 < value <= LARGEST:
        raise InputError(f"{name} is {shown(value)}, needed a positive number.")
    return float(value)


def flag(fields: dict, name: str, default: bool = False) -> bool:
    """fields[name], true or false."""
    value = fields.get(name)
    if value not in (None, True, False):
        raise InputError(f"{name} is {shown(value)}, needed true or false.")
    return default if value is None else bool(value)


def choice(fields: dict, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
    """fields[name], one of these words; without a default it is needed."""
    value = default if fields.get(name) is None else fields[name]
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}; supported are {', '.join(map(repr, choices))}. "
                         "Choose another base.")  # fmt: skip
    return value


def rope(fields: dict, partial: bool = False) -> tuple[float, dict]:
    """(theta, scaling of rotary.py) from rope_theta and rope_scaling, or from rope_parameters (transformers 5).

    partial: whether the base may rotate a part of each head; its own reader looks at partial_rotary_factor then.
    """
    known = {  # rope type -> the fields rope_frequencies reads
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    found = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise InputError(f"rope_scaling or rope_parameters is {shown(found)}; supported is one flat object for all "
                         "layers.")  # fmt: skip
    kind = found.get("rope_type", found.get("type", "default"))
    if str(kind) not in known:
        raise InputError(f"rope type is {shown(kind)}; supported are {', '.join(known)}. Choose another base.")
    for place in (found, fields):
        if not partial and place.get("partial_rotary_factor", 1) not in (1, None):
            raise InputError(f"partial_rotary_factor is {shown(place['partial_rotary_factor'])}; supported is 1.")
    theta = real(fields if found.get("rope_theta") is None else found, "rope_theta", default=10000.0)
    if kind == "default":
        return theta, {}
    found = {"original_max_position_embeddings": fields.get("original_max_position_embeddings")} | found  # of old files
    scaling = {name: real(found, name) for name in known[str(kind)]}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"low_freq_factor must be below high_freq_factor; rope_scaling is {shown(found)}.")
    return theta, {"rope_type": kind, **scaling}
