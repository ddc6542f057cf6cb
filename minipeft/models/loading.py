"""Hugging Face model folders, in and out: config.json, safetensors weights and tokenizer.json <-> a Decoder.

    load_model(folder) = Decoder(read_config(folder)) with every weight of the folder, and no weight left over

Nothing is guessed. A setting the decoder does not have, a key that is missing, left over or of another shape, a
damaged file: an InputError of one line that names it. Pickled weights (.bin) are never opened: they can run code.
"""

import hashlib
import json
import math
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from minipeft.errors import InputError
from minipeft.models.decoder import Decoder, DecoderConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_FIELDS = {  # rope type -> the fields rope_frequencies reads
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
KEY_PARTS = {  # our name of a module -> Hugging Face's
    "embed": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip
DERIVED_KEY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # in old files; rope_theta says it
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FILE_DTYPES = ("F32", "F16", "BF16", "F64")


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The frozen decoder of a Hugging Face folder, all keys and shapes checked before the first weight is read.

    Weights are memory-mapped and converted one by one into their final place, so memory holds each once. They are
    copied out of the map even if nothing is converted: a file changed later cannot move the base.

    Raises:
        InputError: the folder, a setting or a file cannot be used, see `read_config`.
        ValueError: dtype is none of fp32, bf16 and fp64.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"load_model: dtype is {dtype}, needed one of {', '.join(map(str, COMPUTE_DTYPES))}.")
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    with ExitStack() as stack:
        files = _open_checkpoint(folder, stack)
        _check_keys(folder, model, files)
        for name, _ in list(model.named_parameters()):  # a tied head is the embedding, listed once
            module, _, leaf = name.rpartition(".")
            key = _checkpoint_key(name)
            weight = files[key].get_tensor(key).to(device=device, dtype=dtype, copy=True)
            setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
    if config.tied_head:
        model.head_linear.weight = model.embed.weight
    model.rope = model.rope.to(device)
    return model


def read_config(folder: str | Path) -> DecoderConfig:
    """config.json of Llama, Mistral, Qwen2 or Qwen3, as transformers 4 or 5 writes it. Defaults are transformers'.

    Raises:
        InputError: no such folder, no config.json, broken JSON, another architecture, a needed field missing or of
            the wrong kind, or a setting the decoder does not have (rope type, activation, quantised weights).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Download the model: `hf download NAME --local-dir {folder}`.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder, it has no config.json. Name the folder that holds one.")
    try:
        return _decoder_config(_read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, set to neither cut nor pad: packed rows need no padding, cuts are counted."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file. Save the model's fast tokenizer there: tokenizer.save_pretrained().")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: broken ({_one_line(error)}). Download it again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model: Decoder) -> None:
    """Every token id has a row in the model's embedding, or InputError. More rows than tokens are usual."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if largest >= model.config.vocab_size:
        raise InputError(
            f"tokenizer.json: token {token!r} has id {largest} but the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}. Use the tokenizer that came with this model."
        )


def save_model(model: Decoder, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a Hugging Face folder that `load_model` and transformers 4 and 5 load: all of it appears, or nothing.

    Written under a temporary name beside `folder`, synced to disk, renamed. An existing folder is never replaced.

    Raises:
        InputError: folder exists and is not empty; no family of FAMILIES has the model's settings; the tokenizer
            has more tokens than the model.
    """
    folder = Path(folder).absolute()
    check_vocabulary(tokenizer, model)
    fields = _config_fields(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already. Choose another name or delete it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        weights = {_checkpoint_key(name): weight.detach().contiguous() for name, weight in model.named_parameters()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # safetensors makes it 0600
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder.parent)


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and bytes of all weights: equal if and only if no bit of the base moved."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


# config.json


def _decoder_config(fields: dict) -> DecoderConfig:
    """Our config from config.json's fields."""
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"model_type is {family!r}; supported are {', '.join(FAMILIES)}. Choose a base of these.")
    if fields.get("quantization_config") is not None:
        raise InputError("the weights are quantised (quantization_config); use the model's plain fp32 or bf16 folder.")
    if fields.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act is {fields['hidden_act']!r}; supported is 'silu'. Choose another base.")

    width, num_layers = _whole(fields, "hidden_size"), _whole(fields, "num_hidden_layers")
    num_heads = _whole(fields, "num_attention_heads")
    num_kv_heads = _whole(fields, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise InputError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}.")
    if fields.get("head_dim") is None and width % num_heads:
        raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}; give head_dim.")
    head_dim = _whole(fields, "head_dim", default=width // num_heads)
    if head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; rotary positions need an even number.")

    rope_theta, rope_scaling = _rope(fields)
    bias = family in ("llama", "qwen3") and _flag(fields, "attention_bias")
    return DecoderConfig(
        vocab_size=_whole(fields, "vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=_whole(fields, "intermediate_size"),
        norm_eps=_real(fields, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=_flag(fields, "tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and _flag(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        windows=_windows(fields, family, num_layers),
        max_positions=_whole(fields, "max_position_embeddings", default=2048),
    )


def _rope(fields: dict) -> tuple[float, dict]:
    """(rope_theta, DecoderConfig.rope_scaling) from rope_theta and rope_scaling, or from rope_parameters."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"rope_scaling or rope_parameters is {rope!r}; supported is one flat object for all layers.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if str(kind) not in ROPE_FIELDS:
        raise InputError(f"rope type is {kind!r}; supported are {', '.join(ROPE_FIELDS)}. Choose another base.")
    for place in (rope, fields):
        if place.get("partial_rotary_factor", 1) not in (1, None):
            raise InputError(f"partial_rotary_factor is {place['partial_rotary_factor']!r}; supported is 1.")
    theta = _real(fields if rope.get("rope_theta") is None else rope, "rope_theta", default=10000.0)
    if kind == "default":
        return theta, {}
    scaling = {name: _real(rope, name) for name in ROPE_FIELDS[kind]}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"low_freq_factor must be below high_freq_factor; rope_scaling is {rope!r}.")
    return theta, {"rope_type": kind, **scaling}


def _windows(fields: dict, family: str, num_layers: int) -> tuple[int | None, ...]:
    """DecoderConfig.windows: every layer of Mistral, Qwen's from max_window_layers on or as layer_types says."""
    window, first = None, num_layers  # layers from `first` on see `window` rows
    if family == "mistral":
        window, first = fields.get("sliding_window", 4096), 0
    elif family != "llama" and _flag(fields, "use_sliding_window"):
        window, first = fields.get("sliding_window", 4096), _whole(fields, "max_window_layers", default=28, least=0)
    if window is None:
        first = num_layers
    else:
        _whole({"sliding_window": window}, "sliding_window")
    slides = [layer >= first for layer in range(num_layers)]

    layer_types = fields.get("layer_types")
    if layer_types is not None:
        names = ("full_attention", "sliding_attention")
        if not isinstance(layer_types, list) or [name in names for name in layer_types] != [True] * num_layers:
            raise InputError(f"layer_types is {layer_types!r}; needed {num_layers} names, each one of {names}.")
        given = [name == "sliding_attention" for name in layer_types]
        if given != slides and (family in ("llama", "mistral") or window is None):
            raise InputError(f"layer_types {layer_types} does not go with {family}'s sliding_window {window}.")
        slides = given
    return tuple(window if slide else None for slide in slides) if any(slides) else ()


def _config_fields(model: Decoder) -> dict:
    """config.json in transformers 4's spelling, which 5 reads too: the inverse of _decoder_config."""
    config = model.config
    windows = config.windows or (None,) * config.num_layers
    sizes = {window for window in windows if window is not None}
    if config.qk_norm:
        family, fits = "qwen3", config.qkv_bias == config.o_bias and not config.mlp_bias
    elif config.qkv_bias and not config.o_bias:
        family, fits = "qwen2", not config.mlp_bias
    elif sizes:
        family, fits = "mistral", None not in windows and not (config.o_bias or config.mlp_bias)
    else:
        family, fits = "llama", config.qkv_bias == config.o_bias
    if not fits or len(sizes) > 1:
        raise InputError(f"save_model: none of {', '.join(FAMILIES)} has the biases and windows of {config}.")

    fields = {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
                          + "ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling or None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,  # transformers would take ids 1 and 2 if these were absent
        "eos_token_id": None,
    }  # fmt: skip
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        fields["sliding_window"] = next(iter(sizes))
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = bool(sizes)
        fields["sliding_window"] = next(iter(sizes), None)
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return fields


def _whole(fields: dict, name: str, default: int | None = None, least: int = 1) -> int:
    """fields[name], a whole number of at least `least`; without a default it is needed."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"the field {name!r} is missing. Take config.json from the model's own folder.")
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}, needed a whole number of at least {least}.")
    return value


def _real(fields: dict, name: str, default: float | None = None) -> float:
    """fields[name], a positive number; without a default it is needed."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"the field {name!r} is missing. Take config.json from the model's own folder.")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}, needed a positive number.")
    return value


def _flag(fields: dict, name: str) -> bool:
    """fields[name], true or false; false where absent."""
    value = fields.get(name)
    if value not in (None, True, False):
        raise InputError(f"{name} is {value!r}, needed true or false.")
    return bool(value)


# weights


def _checkpoint_key(name: str) -> str:
    """Our parameter name -> Hugging Face's: "layers.3.attn.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name == "head_linear.weight":
        return "lm_head.weight"
    return "model." + ".".join(KEY_PARTS.get(part, part) for part in name.split("."))


def _open_checkpoint(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Key -> the memory-mapped file that holds it, of model.safetensors or of all shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    where = None  # key -> shard, as the index says
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        where = _read_json(index, prefix=f"{index}: ").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{index}: weight_map must say which file holds each key. Download it again.")
        names = sorted(set(where.values()))
    elif list(folder.glob("*.bin")):
        raise InputError(f"{folder}: only pickled weights (.bin), which can run code. Save it again as safetensors: "
                         "transformers' model.save_pretrained().")  # fmt: skip
    else:
        raise InputError(f"{folder}: no weights, neither {single.name} nor {index.name}. Download them.")

    files = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{path}: named by {index.name} but no such file in the folder. Download it.")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or cut short ({_one_line(error)}). Download it again.") from None
        for key in file.keys():
            if where is not None and where.get(key) != name:
                raise InputError(f"{path}: holds {key} but {index.name} says {where.get(key)}. Download both again.")
            files[key] = file
    for key in where or ():
        if key not in files:
            raise InputError(f"{folder / where[key]}: {index.name} says it holds {key}. Download both again.")
    return files


def _check_keys(folder: Path, model: Decoder, files: dict[str, safe_open]) -> None:
    """The checkpoint has every weight of the model, in its shape and a plain dtype, and nothing else."""
    found = {key: file.get_slice(key) for key, file in files.items() if not DERIVED_KEY.fullmatch(key)}
    needed = {_checkpoint_key(name): list(weight.shape) for name, weight in model.named_parameters()}
    embed_key, head_key = "model.embed_tokens.weight", "lm_head.weight"
    head_repeated = model.config.tied_head and head_key in found
    if head_repeated:
        needed[head_key] = needed[embed_key]
    problems = [f"{key} is missing, needed {shape}" for key, shape in needed.items() if key not in found]
    for key, value in found.items():
        if key not in needed:
            problems.append(f"{key} {value.get_shape()} is unexpected")
        elif value.get_shape() != needed[key]:
            problems.append(f"{key} is {value.get_shape()}, needed {needed[key]}")
        elif value.get_dtype() not in FILE_DTYPES:
            problems.append(f"{key} is {value.get_dtype()}, needed one of {', '.join(FILE_DTYPES)}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{folder}: weights and config.json disagree: {'; '.join(problems[:4])}{more}.")
    if head_repeated and not torch.equal(files[head_key].get_tensor(head_key), files[embed_key].get_tensor(embed_key)):
        raise InputError(f"{folder}: tie_word_embeddings is true but {head_key} differs from {embed_key}. "
                         "If the head is its own, set tie_word_embeddings to false.")  # fmt: skip


# files


def _read_json(path: Path, prefix: str = "") -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{prefix}cannot be read as JSON ({_one_line(error)}). Download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{prefix}needed a JSON object, got {type(value).__name__}. Download it again.")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
