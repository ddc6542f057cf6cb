"""Hugging Face model folders, in and out: config.json, safetensors weights and tokenizer.json <-> a frozen base.

    load_model(folder) = the architecture that config.json names, with every weight of the folder, and none left over

Nothing is guessed. A setting the base does not have, a key that is missing, left over or of another shape, a damaged
file: an InputError of one line that names it. Pickled weights (.bin) are never opened: they can run code.
"""

import hashlib
import json
import shutil
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from minipeft.errors import InputError
from minipeft.models import decoder_files
from minipeft.models.checkpoint import Checkpoint, Family, one_line, read_json, sync
from minipeft.models.decoder import Decoder

FAMILIES: dict[str, Family] = {  # model_type of config.json -> how it is read
    **dict.fromkeys(decoder_files.FAMILIES, decoder_files.FAMILY),
}
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """The frozen base of a Hugging Face folder, all keys and shapes checked before the first weight is read.

    Weights are memory-mapped and converted one by one into their final place, so memory holds each once. They are
    copied out of the map even if nothing is converted: a file changed later cannot move the base.

    Raises:
        InputError: the folder, a setting or a file cannot be used, see `read_config`.
        ValueError: dtype is none of fp32, bf16 and fp64.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"load_model: dtype is {dtype}, needed one of {', '.join(map(str, COMPUTE_DTYPES))}.")
    folder = Path(folder)
    family, config = read_config(folder)
    with Checkpoint(folder) as checkpoint:
        checkpoint.prepare(family)
        if config.num_layers > len(checkpoint):
            raise InputError(f"{folder}: config.json says {config.num_layers} layers but the weights have only "
                             f"{len(checkpoint)} tensors. Download both again.")  # fmt: skip
        with torch.device("meta"):
            model = family.model(config)
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        sources = family.sources(model)
        checkpoint.check({source.key: source.shape or shapes[name] for name, source in sources.items()},
                         family.aliases(model))  # fmt: skip
        meta = dict(model.named_parameters(remove_duplicate=False))
        places: dict[int, list[str]] = {}  # a tied weight has several names
        for name, weight in meta.items():
            places.setdefault(id(weight), []).append(name)
        for name, source in sources.items():
            weight = checkpoint.read(source.key)
            weight = weight if source.part is None else source.part(weight)
            assert tuple(weight.shape) == shapes[name], f"{name}: {tuple(weight.shape)}, not {shapes[name]}"
            weight = weight.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
            weight = nn.Parameter(weight, requires_grad=False)
            for place in places[id(meta[name])]:
                module, _, leaf = place.rpartition(".")
                setattr(model.get_submodule(module), leaf, weight)
    return model.to(device)  # buffers


def read_config(folder: str | Path) -> tuple[Family, object]:
    """How the folder's base is read, and its config, from config.json as transformers 4 or 5 writes it.

    Defaults are transformers'.

    Raises:
        InputError: no such folder, no config.json, broken JSON, another architecture, a needed field missing or of
            the wrong kind, or a setting the base does not have (rope type, activation, quantised weights).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Download the model: `hf download NAME --local-dir {folder}`.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder, it has no config.json. Name the folder that holds one.")
    try:
        fields = read_json(path)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputError(f"model_type is {kind!r}; supported are {', '.join(FAMILIES)}. Choose a base of these.")
        if fields.get("quantization_config") is not None:
            raise InputError("the weights are quantised (quantization_config); use the model's plain fp32 or bf16 "
                             "folder.")  # fmt: skip
        return FAMILIES[kind], FAMILIES[kind].config(fields)
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
        raise InputError(f"{path}: broken ({one_line(error)}). Download it again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model: nn.Module) -> None:
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
        InputError: folder exists and is not empty; none of Llama, Mistral, Qwen2 and Qwen3 has the model's settings;
            the tokenizer has more tokens than the model.
    """
    folder = Path(folder).absolute()
    check_vocabulary(tokenizer, model)
    fields = decoder_files.write(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already. Choose another name or delete it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        weights = {decoder_files.key_of(name): w.detach().contiguous() for name, w in model.named_parameters()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # safetensors makes it 0600
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and bytes of all weights: equal if and only if no bit of the base moved."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
