"""An adapter's folder: a file of options and one of tensors. All of it is used or refused by name, never ignored."""

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import read_file, write_file
from minipeft.models.checkpoint import one_line, read_json
from minipeft.models.fields import shown
from minipeft.schedule import Adapter

CONFIG = "adapter_config.json"
ANOTHER = "was it trained on another base?"
NEEDED = object()  # as a default: there is none


class Options:
    """A JSON object whose every entry has to be taken by somebody, or to be off.

    off: option -> the value that it has where it is not used, if that is not null, false or empty. 0 is a value.
    """

    def __init__(self, fields: dict, off: Mapping[str, object]):
        self._left, self._off = dict(fields), off

    def take(self, name: str, default, *kinds: type):
        """The option's value, or the default where it is null or not there.

        Raises:
            InputError: it is of none of these kinds, or needed and not there.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is NEEDED:
                raise InputError(f"option {name} is missing; it must be there")
            return default
        if type(value) not in kinds:
            raise InputError(f"option {name} is {shown(value)}, needed {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def names(self, name: str, default) -> list[str] | str:
        """The option's value, a list of names or one pattern."""
        value = self.take(name, default, list, str)
        if not all(isinstance(part, str) for part in value):
            raise InputError(f"option {name} is {shown(value)}, needed names")
        return value

    def must_be(self, name: str, *values, default, why: str) -> None:
        """Raises InputError if the option is none of these values."""
        value = self._left.pop(name, None)
        if (default if value is None else value) not in values:
            raise InputError(f"option {name} is {shown(value)}: {why}")

    def drop(self, *names: str) -> None:
        """These say nothing about what the adapter computes: who wrote it, or how training began."""
        for name in names:
            self._left.pop(name, None)

    def refuse_rest(self) -> None:
        """Raises InputError if something is left that is not off."""
        for name, value in self._left.items():
            unset = value is None or value is False or value in ("", [], {})
            if not unset and not (name in self._off and value == self._off[name]):
                raise InputError(f"option {name} is {shown(value)}: minipeft's method has no such option")


def check_alone(adapter: Adapter) -> None:
    """Raises InputError if the adapter acts over a shared one: a folder holds one adapter."""
    if adapter.under is not None:
        raise InputError(f"adapter of {adapter.user!r} acts over a shared one, and a folder holds one adapter; train "
                         "it without `under` to export it")


def write_folder(folder: Path, options: dict, weights: str, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all. The options come last: a folder that has them is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    (folder / CONFIG).unlink(missing_ok=True)
    write_file(folder / weights, save(dict(tensors), {"format": "pt"}))
    write_file(folder / CONFIG, (json.dumps(options, indent=2, sort_keys=True) + "\n").encode())


def read_options(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: not an adapter's folder, it has no {CONFIG}. Name the folder that holds one.")
    return read_json(path, prefix=f"{path}: ")


def read_tensors(folder: Path, weights: str, pickled: str) -> dict[str, Tensor]:
    """The tensors of a folder. Raises InputError: there are none, only pickled ones, or NaN or inf in one."""
    if (folder / weights).is_file():
        tensors = read_file(folder / weights)[1]
        for key, tensor in tensors.items():
            if num_bad := int((~tensor.isfinite()).sum()):
                raise InputError(f"{folder}: {one_line(key)} has {num_bad} values of {tensor.numel()} that are NaN or "
                                 "infinite; its training diverged, train it again at a lower learning rate")
        return tensors
    if (folder / pickled).is_file():
        raise InputError(
            f"{folder}: only pickled weights ({pickled}), which can run code. Write them as safetensors: cd "
            f"{shlex.quote(str(folder))} && python -c \"import torch; from safetensors.torch import save_file; "
            f"save_file({{k: v.contiguous().clone() for k, v in torch.load('{pickled}', weights_only=True).items()}}, "
            f"'{weights}', {{'format': 'pt'}})\""
        )
    raise InputError(f"{folder}: no weights, {weights} is not there. Copy the whole folder.")


def check_tensors(
    tensors: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], may: Collection[str] = ()
) -> None:
    """The tensors are the needed ones, in these shapes, and none besides. may: those that can be there as well."""
    for key, shape in needed.items():
        if key not in tensors:
            raise InputError(f"{key} is missing, this base needs {shape}; {ANOTHER}")
        if (came := tuple(tensors[key].shape)) != shape:
            raise InputError(f"{key} is {came}, this base needs {shape}; {ANOTHER}")
    if left := [key for key in tensors if key not in needed and key not in may]:
        raise InputError(f"{one_line(left[0])} {tuple(tensors[left[0]].shape)} is in the file, but neither this base "
                         f"nor {CONFIG} has a place for it; {ANOTHER}")  # fmt: skip
