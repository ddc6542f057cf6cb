"""A model folder's weights: safetensors files, one or several with an index, and which parameter lies where in them.

Every key is accounted for: one that is missing, left over or of another shape is an InputError that names it. Pickled
weights (PICKLED) are never opened: they can run code.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minipeft.errors import InputError

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PIECE = 2**18  # numbers read and converted at a time
MOST_JSON = 2**20  # bytes of a JSON file, and of a checkpoint's headers together; 1,138 tensors need about 0.15 MB
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")  # where weights usually are first
CONVERT = (  # a command to run in the folder, PATTERN replaced
    "python -c \"import glob, torch; from safetensors.torch import save_file; "
    "save_file({k: v.contiguous().clone() for f in glob.glob('PATTERN') "
    "for w in [torch.load(f, weights_only=True)] for k, v in w.get('state_dict', w).items()}, "  # Lightning nests them
    "'model.safetensors', {'format': 'pt'})\""
)


class Part(NamedTuple):
    """Some of a tensor's numbers, in the order of the file: of every `every` numbers, `length` from `first` on."""

    first: int
    length: int
    every: int


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a checkpoint: a part of the tensor `key`.

    shape: of that whole tensor; None: the parameter's own. part: which of its numbers; None: all.
    transposed: whether the file has them column by column of the parameter, as GPT-2's [in, out].
    """

    key: str
    shape: tuple[int, ...] | None = None
    part: Part | None = None
    transposed: bool = False


class Family(NamedTuple):
    """How bases of one architecture are read. Each file of an architecture ends with its own.

    config:  config.json's fields -> our config, which has num_layers. Raises InputError.
    model:   our config -> the module, weights unset.
    sources: module -> for each of its parameters, by name, where it lies. A parameter of two names is listed once.
    aliases: module -> key -> the key whose numbers it may repeat: a tied head that was saved all the same.
    prefix:  what all keys but the heads' begin with. Checkpoints of the headless model lack it.
    unused:  keys that may be there and are not read: tables that can be computed.
    heads:   keys that may be there and are not read either: heads for other purposes. load_model says so.
    rename:  a key of an old file -> as it is spelled today. Other keys stay as they are.
    complete: our config and the checkpoint's keys -> our config with what only keys say: which optional weights exist.
    """

    config: Callable[[dict], object]
    model: Callable[[object], nn.Module]
    sources: Callable[[nn.Module], dict[str, Source]]
    aliases: Callable[[nn.Module], dict[str, str]] = lambda model: {}
    prefix: str = ""
    unused: str = r"(?!)"  # matches nothing
    heads: str = r"(?!)"
    rename: Callable[[str], str] = lambda key: key
    complete: Callable[[object, Collection[str]], object] = lambda config, keys: config


class Stored(NamedTuple):
    """Where a tensor's numbers lie: from byte `start` of a file on, in a dtype that safetensors spells so."""

    path: Path
    start: int
    dtype: str
    shape: list[int]


class Checkpoint:
    """The weights of a folder: what there is, and reading it piece by piece.

    The safetensors library judges each file's header; the numbers are then read with plain reads, not through a memory
    map, whose pages would count as memory for as long as it is open.

    Raises:
        InputError: no weights, only pickled ones, a file that is damaged, or files and index that disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored = _find(folder)  # key -> Stored
        self._buffer = torch.empty(0, dtype=torch.uint8)  # of every piece: one each would leave holes between weights

    def prepare(self, family: Family) -> list[str]:
        """Forget unused keys, spell old ones as today, and give all the prefix they lack in a headless checkpoint.

        Returns:
            the keys of heads, which are forgotten too.
        """
        names = {key if (today := family.rename(key)) in self._stored else today: key for key in self._stored}
        prefix = "" if any(key.startswith(family.prefix) for key in names) else family.prefix
        found = {prefix + key: self._stored[name] for key, name in names.items()
                 if not re.fullmatch(family.unused, prefix + key)}  # fmt: skip
        heads = [key for key in found if re.fullmatch(family.heads, key)]
        self._stored = {key: stored for key, stored in found.items() if key not in heads}
        return heads

    @property
    def keys(self) -> Collection[str]:
        return self._stored.keys()

    @property
    def num_numbers(self) -> int:
        return sum(math.prod(stored.shape) for stored in self._stored.values())

    def read_(self, source: Source, weight: Tensor) -> int:
        """weight = what is at source, in weight's dtype and on its device. Returns how many are NaN or infinite then.

        Memory: one piece, the same for all weights.
        """
        rows = weight.t() if source.transposed else weight.view(-1)  # in the order of the file
        numbers, filled, bad = rows[:1].numel(), 0, 0  # in a row
        size = FILE_DTYPES[self._stored[source.key].dtype].itemsize * max(PIECE, numbers)
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        for piece in self._pieces(source.key, source.part, numbers, self._buffer):
            piece = piece.view(-1, *rows.shape[1:])
            place = rows[filled : filled + len(piece)].copy_(piece)
            filled += len(piece)
            if not place.sum().isfinite():  # or the sum alone passes the dtype's range
                bad += int((~place.isfinite()).sum())
        assert filled == len(rows), f"{source}: {filled} of {len(rows)} rows"
        return bad

    def _pieces(
        self, key: str, part: Part | None = None, row: int = 1, buffer: Tensor | None = None
    ) -> Iterator[Tensor]:
        """A tensor's numbers or a part of them, in the order of the file: about PIECE at a time, in whole rows.

        buffer: bytes for PIECE numbers or a row; each piece takes the place of the one before.
        """
        path, start, dtype, shape = self._stored[key]
        total, size = math.prod(shape), FILE_DTYPES[dtype].itemsize
        first, length, every = part or (0, total, total)
        wanted = total // every * length if total else 0
        step = max(PIECE // row, 1) * row
        if buffer is None:
            buffer = torch.empty(size * step, dtype=torch.uint8)
        with path.open("rb") as file:
            for begin in range(0, wanted, step):
                piece = buffer[: size * min(step, wanted - begin)].view(FILE_DTYPES[dtype])
                bytes_of_piece, filled = memoryview(piece.view(torch.uint8).numpy()), 0
                while filled < len(piece):  # a stretch of neighbours at a time
                    nth, skipped = divmod(begin + filled, length)
                    end = min(filled + length - skipped, len(piece))
                    file.seek(start + size * (nth * every + first + skipped))
                    if file.readinto(bytes_of_piece[size * filled : size * end]) < size * (end - filled):
                        raise InputError(f"{path}: became shorter while it was read. Load it again when it is whole.")
                    filled = end
                yield piece

    def check(self, needed: dict[str, tuple[int, ...]], aliases: dict[str, str]) -> None:
        """The checkpoint has every needed key, in its shape and a plain dtype, and nothing else but true aliases."""
        needed = {key: list(shape) for key, shape in needed.items()}
        aliases = {key: other for key, other in aliases.items() if key in self._stored and key not in needed}
        needed |= {key: needed[other] for key, other in aliases.items()}
        problems = [f"{key} is missing, needed {shape}" for key, shape in needed.items() if key not in self._stored]
        for key, (_, _, dtype, shape) in self._stored.items():
            if key not in needed:
                problems.append(f"{key} {shape} is unexpected")
            elif shape != needed[key]:
                problems.append(f"{key} is {shape}, needed {needed[key]}")
            elif dtype not in FILE_DTYPES:
                problems.append(f"{key} is {dtype}, needed one of {', '.join(FILE_DTYPES)}")
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            first = "; ".join(map(one_line, problems[:4]))
            raise InputError(f"{self.folder}: weights and config.json disagree: {first}{more}. Take both from the same "
                             "model.")  # fmt: skip
        for key, other in aliases.items():
            pairs = zip(self._pieces(key), self._pieces(other))
            if not all(torch.allclose(x.double(), y.double(), rtol=0, atol=0, equal_nan=True) for x, y in pairs):
                raise InputError(f"{self.folder}: tie_word_embeddings is true but {key} differs from {other}. "
                                 "If the head is its own, set tie_word_embeddings to false.")  # fmt: skip


def _find(folder: Path) -> dict[str, Stored]:
    """Key -> where it lies, of model.safetensors or of all shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    where = None  # key -> shard, as the index says
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        where = read_json(index, prefix=f"{index}: ").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{index}: weight_map must say which file holds each key. Download it again.")
        names = sorted(set(where.values()))
    elif pickled := [pattern for pattern in PICKLED if list(folder.glob(pattern))]:
        suffix, convert = Path(pickled[0]).suffix, CONVERT.replace("PATTERN", pickled[0])
        raise InputError(f"{folder}: only pickled weights ({suffix}), which can run code. Write them as safetensors: "
                         f"cd {shlex.quote(str(folder))} && {convert}")  # fmt: skip
    else:
        raise InputError(f"{folder}: no weights, neither {single.name} nor {index.name}. Download them.")

    found, most = {}, MOST_JSON  # bytes that headers may still have
    for name in names:
        path = folder / name
        if os.path.basename(name) != name or not os.path.isfile(path):
            raise InputError(f"{one_line(path)}: named by {index.name} but no such file in the folder. Download it.")
        header, length = _header(path, most)
        most -= length
        for key, stored in header.items():
            if where is not None and where.get(key) != name:
                raise InputError(f"{path}: holds {one_line(key)} but {index.name} says {one_line(where.get(key))}. "
                                 "Download both again.")  # fmt: skip
            found[key] = stored
    for key in where or ():
        if key not in found:
            raise InputError(f"{folder / where[key]}: {index.name} says it holds {one_line(key)}. Download both again.")
    return found


def _header(path: Path, most: int) -> tuple[dict[str, Stored], int]:
    """What a safetensors file says it holds: 8 bytes for the header's length, the header in JSON, then the numbers.

    Returns:
        key -> where it lies, and the header's length, at most `most` bytes: parsed it is 26 times as large.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if most < length <= path.stat().st_size:  # longer ones the library refuses unread
            raise ValueError(f"a header of {length} bytes; a model's have at most {MOST_JSON} together")
        with safe_open(path, framework="pt"):  # raises unless sizes, offsets and the file's length agree
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:].decode())
        header.pop("__metadata__", None)
        return {key: Stored(path, 8 + length + tensor["data_offsets"][0], tensor["dtype"], tensor["shape"])
                for key, tensor in header.items()}, length  # fmt: skip
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged or cut short ({one_line(error)}). Download it again.") from None


def read_json(path: Path, prefix: str = "") -> dict:
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"{size} bytes, needed at most {MOST_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{prefix}cannot be read as JSON ({one_line(error)}). Download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{prefix}needed a JSON object, got {type(value).__name__}. Download it again.")
    return value


def one_line(what: object) -> str:
    """For a message: at most 300 printable characters and no line break, whatever a damaged file holds."""
    text = "".join(c if c.isprintable() else " " for c in str(what)[:1000])
    return " ".join(text.split())[:300]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
