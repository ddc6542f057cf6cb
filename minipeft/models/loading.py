"""Hugging Face model folders, in and out: config.json, safetensors weights and tokenizer.json <-> a frozen base.

    load_model(folder) = the architecture that config.json names, with every weight of the folder, and none left over

Nothing is guessed. A setting the base does not have, a key that is missing, left over or of another shape, a damaged
file: an InputError of one line that names it. Pickled weights (.bin, .pt, ...) are never opened: they can run code.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode

from minipeft.errors import InputError
from minipeft.models import bert, decoder_files, gemma2, gpt2, gpt_neox, t5
from minipeft.models.checkpoint import Checkpoint, Family, one_line, read_json, sync
from minipeft.models.decoder import Decoder
from minipeft.models.fields import shown

FAMILIES: dict[str, Family] = {  # model_type of config.json -> how it is read
    **dict.fromkeys(decoder_files.FAMILIES, decoder_files.FAMILY),
    "phi3": decoder_files.PHI3,
    "gemma2": gemma2.FAMILY,
    "bert": bert.BERT,
    "roberta": bert.ROBERTA,
    "xlm-roberta": bert.ROBERTA,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "t5": t5.FAMILY,
}
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*")
SHORT_IDS = {  # whose the hub's ids without an organisation are: gpt2-medium is openai-community/gpt2-medium
    "gpt2": "openai-community", "bert": "google-bert", "roberta": "FacebookAI", "xlm-roberta": "FacebookAI",
    "t5": "google-t5",
}  # fmt: skip
NOT_SIZES = ("max_positions", "max_distance")  # settings that may be larger than all weights
QUICK_LAYERS = 100  # built before their keys are looked at; more must be in the file first: each takes milliseconds
TENSORS_PER_LAYER = 6  # at the least, of any family
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """The frozen base of a Hugging Face folder or hub id, all keys and shapes checked before the first weight is read.

    Weights are read and converted piece by piece into their final place, so memory holds each once, also one that is
    cut out of a larger tensor or transposed. A file changed later cannot move the base. NaN and infinite weights are
    kept, with a warning that counts them. An encoder's checkpoint may hold heads: they are left out, with a warning.

    Args:
        name: see `find_folder`.
    Raises:
        InputError: the folder, a setting or a file cannot be used, see `read_config`.
        ValueError: dtype is none of fp32, bf16 and fp64, or the device is not there.
    """
    if dtype not in COMPUTE_DTYPES:
        instead = "; fp16 passes its range in many bases, take bf16" if dtype == torch.float16 else ""
        raise ValueError(f"load_model: dtype is {dtype}, needed one of {', '.join(map(str, COMPUTE_DTYPES))}{instead}.")
    _check_device(device)
    folder, asked_for = find_folder(name), os.path.basename(os.path.abspath(name))
    if not os.path.isdir(name) and not list(folder.glob("*.safetensors")):
        repo = str(name).partition("@")[0]
        raise InputError(f"{name}: the hub has no safetensors weights for it, at the most pickled ones, which can run "
                         f"code. `hf download {repo} --local-dir FOLDER`, then load FOLDER: the error says how to "
                         "write them as safetensors.")  # fmt: skip
    family, config = read_config(folder)
    checkpoint = Checkpoint(folder)
    heads = checkpoint.prepare(family)
    check_sizes(config, checkpoint)
    model = _unset(family, family.complete(config, checkpoint.keys), folder)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    sources = family.sources(model)
    checkpoint.check({source.key: source.shape or shapes[name] for name, source in sources.items()},
                     family.aliases(model))  # fmt: skip

    meta = dict(model.named_parameters(remove_duplicate=False))
    places: dict[int, list[str]] = {}  # a tied weight has several names
    for name, weight in meta.items():
        places.setdefault(id(weight), []).append(name)
    bad = {}  # key -> how many NaN or infinite numbers
    for name, source in sources.items():
        weight = nn.Parameter(torch.empty(shapes[name], dtype=dtype, device=device), requires_grad=False)
        if num_bad := checkpoint.read_(source, weight):
            bad[source.key] = bad.get(source.key, 0) + num_bad
        for place in places[id(meta[name])]:
            module, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(module), leaf, weight)
    if bad:
        warnings.warn(f"{folder}: {sum(bad.values())} numbers in {len(bad)} tensors are NaN or infinite in {dtype}, "
                      f"the first in {next(iter(bad))}. Download the model again.", stacklevel=2)  # fmt: skip
    if heads:
        kinds = ", ".join(sorted({key.partition(".")[0] for key in heads}))
        warnings.warn(f"{folder}: {len(heads)} tensors of heads are not used ({one_line(kinds)}): the base is the "
                      "encoder alone.", stacklevel=2)  # fmt: skip
    model.family = family
    if hasattr(model, "stop_tokens"):
        model.stop_tokens = _stop_tokens(folder)
    model.origin = Origin(folder.absolute(), asked_for, model)
    return model


def _check_device(device: torch.device | str) -> None:
    try:
        there = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise ValueError(f"load_model: device is {str(device)!r}, none of PyTorch's ({one_line(error)}).") from None
    if not there:
        raise ValueError(f"load_model: device is {str(device)!r}, but this PyTorch sees no GPU; use \"cpu\", or "
                         "install PyTorch for the GPU.")  # fmt: skip


def load_shape(name: str | Path) -> nn.Module:
    """The base that a folder's config.json describes, on the meta device: all sizes and no numbers. For counting.

    Raises:
        InputError: as `load_model`, of the folder and its config.json.
    """
    folder = find_folder(name)
    return _unset(*read_config(folder), folder)


def _unset(family: Family, config: object, folder: Path) -> nn.Module:
    """The base of this config, on the meta device."""
    try:
        with torch.device("meta"), _NoStartValues():
            return family.model(config)
    except RuntimeError as error:  # a weight of 2**63 bytes
        raise InputError(f"{folder / 'config.json'}: no such model can be made ({one_line(error)}). "
                         "Download it again.") from None  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a base came from, and who it is.

    name: the last part of the folder or hub id that was asked for.
    """

    folder: Path
    name: str
    model: nn.Module

    @cached_property
    def fingerprint(self) -> str:
        """`fingerprint` of the base, which never moves: taken once."""
        return fingerprint(self.model)


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, or else of config.json: one number, several, or none."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.is_file():
            ids = read_json(path, prefix=f"{path}: ").get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if any(type(token) is not int or token < 0 for token in ids):
                raise InputError(f"{path}: eos_token_id is {shown(ids)}, needed token ids. Download it again.")
            if ids:
                return tuple(ids)
    return ()


class _NoStartValues(TorchFunctionMode):
    """Inside, nn.Embedding draws no numbers: to draw none of "meta" PyTorch would import 800 modules, 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs or {})


def find_folder(name: str | Path) -> Path:
    """A model folder by its path, or by its hub id "org/name" or "org/name@revision". What is a folder is a folder.

    A hub id's files are downloaded into huggingface_hub's cache unless they are there; HF_HUB_OFFLINE=1 keeps it off
    the network.
    """
    if os.path.isdir(name):
        return Path(name)
    for start, org in SHORT_IDS.items():
        if re.fullmatch(rf"{start}(-[\w.-]+)?", str(name)):
            raise InputError(f"{name}: no such folder. On the hub it is {org}/{name}: give that name.")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\S+)?", str(name)):
        raise InputError(f"{name}: no such folder. Download the model: `hf download NAME --local-dir {name}`; "
                         "or give a hub id as org/name. Of a short id the hub's page shows the whole one.")  # fmt: skip
    from huggingface_hub import snapshot_download  # slow to import, and a folder does not need it

    repo, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(HUB_FILES),
                                      ignore_patterns=["*/*", "consolidated*"]))  # fmt: skip
    except Exception as error:  # the hub's, its HTTP library's or the disk's
        raise InputError(
            f"{name}: no such folder, and not found as a hub id ({one_line(error)}). Without network, name a folder: "
            f"`hf download {repo} --local-dir FOLDER` makes one elsewhere."
        ) from None


def check_sizes(config: object, checkpoint: Checkpoint) -> None:
    """config.json asks for nothing larger than the weights are, before anything is made in that size, or InputError."""
    tensors, numbers = len(checkpoint.keys), checkpoint.num_numbers
    numbered = {int(part) for key in checkpoint.keys for part in key.split(".") if part.isdecimal()}
    for name, value in vars(config).items():
        if name in NOT_SIZES or type(value) is not int:
            continue
        if "layers" in name and value > QUICK_LAYERS and not (
            value * TENSORS_PER_LAYER <= tensors and numbered.issuperset(range(value))
        ):
            raise InputError(f"{checkpoint.folder}: config.json says {value} layers but the weights have only "
                             f"{tensors} tensors. Take both from the same model.")  # fmt: skip
        if value > numbers:
            raise InputError(f"{checkpoint.folder}: config.json says {name} is {value} but the weights are only "
                             f"{numbers} numbers. Take both from the same model.")  # fmt: skip


def read_config(folder: str | Path) -> tuple[Family, object]:
    """How the folder's base is read, and its config, from config.json as transformers 4 or 5 writes it.

    Defaults are transformers'.

    Raises:
        InputError: no config.json, broken JSON, another architecture, a needed field missing or of
            the wrong kind, or a setting the base does not have (rope type, activation, quantised weights).
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder, it has no config.json. Name the folder that holds one.")
    try:
        fields = read_json(path)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputError(f"model_type is {shown(kind)}; supported are {', '.join(FAMILIES)}. Choose a base of "
                             "these.")  # fmt: skip
        if fields.get("quantization_config") is not None:
            raise InputError("the weights are quantised (quantization_config); use the model's plain fp32 or bf16 "
                             "folder.")  # fmt: skip
        return FAMILIES[kind], FAMILIES[kind].config(fields)
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be a model's. Download it again.") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder or hub id; set to neither cut nor pad: rows are packed, cuts are counted."""
    path = find_folder(name) / "tokenizer.json"
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
