"""A model folder's weights: safetensors files, one or several with an index, and which parameter lies where in them.

Every key is accounted for: one that is missing, left over or of another shape is an InputError that names it. Pickled
weights (.bin) are never opened: they can run code.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minipeft.errors import InputError

FILE_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a checkpoint: a part of the tensor `key`.

    shape: of that whole tensor; None: the parameter's own. part: from the whole tensor to the parameter; None: all.
    """

    key: str
    shape: tuple[int, ...] | None = None
    part: Callable[[Tensor], Tensor] | None = None


class Family(NamedTuple):
    """How bases of one architecture are read. Each file of an architecture ends with its own.

    config:  config.json's fields -> our config, which has num_layers. Raises InputError.
    model:   our config -> the module, weights unset.
    sources: module -> for each of its parameters, by name, where it lies. A parameter of two names is listed once.
    aliases: module -> key -> the key whose numbers it may repeat: a tied head that was saved all the same.
    prefix:  what all keys but the heads' begin with. Checkpoints of the headless model lack it.
    unused:  keys that may be there and are not read: heads for other purposes, tables that can be computed.
    """

    config: Callable[[dict], object]
    model: Callable[[object], nn.Module]
    sources: Callable[[nn.Module], dict[str, Source]]
    aliases: Callable[[nn.Module], dict[str, str]] = lambda model: {}
    prefix: str = ""
    unused: str = r"(?!)"  # matches nothing


class Checkpoint:
    """The weights of a folder, memory-mapped: `with Checkpoint(folder) as files`.

    Raises:
        InputError: no weights, only pickled ones, a file that is damaged, or files and index that disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> "Checkpoint":
        try:
            self._files = _open_files(self.folder, self._stack)
        except BaseException:
            self._stack.close()
            raise
        self._slices = {key: file.get_slice(key) for key, file in self._files.items()}
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def prepare(self, family: Family) -> None:
        """Forget unused keys, and give every key the prefix it lacks if this is the headless model's checkpoint."""
        if family.prefix and not any(key.startswith(family.prefix) for key in self._slices):
            self._files = {family.prefix + key: file for key, file in self._files.items()}
            self._slices = {family.prefix + key: value for key, value in self._slices.items()}
            self._names = {key: key.removeprefix(family.prefix) for key in self._slices}
        else:
            self._names = {key: key for key in self._slices}
        self._slices = {key: value for key, value in self._slices.items() if not re.fullmatch(family.unused, key)}

    def __len__(self) -> int:
        return len(self._slices)

    def read(self, key: str) -> Tensor:
        return self._files[key].get_tensor(self._names[key])

    def check(self, needed: dict[str, tuple[int, ...]], aliases: dict[str, str]) -> None:
        """The checkpoint has every needed key, in its shape and a plain dtype, and nothing else but true aliases."""
        needed = {key: list(shape) for key, shape in needed.items()}
        aliases = {key: other for key, other in aliases.items() if key in self._slices and key not in needed}
        needed |= {key: needed[other] for key, other in aliases.items()}
        problems = [f"{key} is missing, needed {shape}" for key, shape in needed.items() if key not in self._slices]
        for key, value in self._slices.items():
            if key not in needed:
                problems.append(f"{key} {value.get_shape()} is unexpected")
            elif value.get_shape() != needed[key]:
                problems.append(f"{key} is {value.get_shape()}, needed {needed[key]}")
            elif value.get_dtype() not in FILE_DTYPES:
                problems.append(f"{key} is {value.get_dtype()}, needed one of {', '.join(FILE_DTYPES)}")
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise InputError(f"{self.folder}: weights and config.json disagree: {'; '.join(problems[:4])}{more}.")
        for key, other in aliases.items():
            if not torch.equal(self.read(key), self.read(other)):
                raise InputError(f"{self.folder}: tie_word_embeddings is true but {key} differs from {other}. "
                                 "If the head is its own, set tie_word_embeddings to false.")  # fmt: skip


def _open_files(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Key -> the memory-mapped file that holds it, of model.safetensors or of all shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    where = None  # key -> shard, as the index says
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        where = read_json(index, prefix=f"{index}: ").get("weight_map")
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
            raise InputError(f"{path}: damaged or cut short ({one_line(error)}). Download it again.") from None
        for key in file.keys():
            if where is not None and where.get(key) != name:
                raise InputError(f"{path}: holds {key} but {index.name} says {where.get(key)}. Download both again.")
            files[key] = file
    for key in where or ():
        if key not in files:
            raise InputError(f"{folder / where[key]}: {index.name} says it holds {key}. Download both again.")
    return files


def read_json(path: Path, prefix: str = "") -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{prefix}cannot be read as JSON ({one_line(error)}). Download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{prefix}needed a JSON object, got {type(value).__name__}. Download it again.")
    return value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
