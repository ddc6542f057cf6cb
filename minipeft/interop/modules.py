"""What Hugging Face calls the places of a base, and names that pick some of them."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.bert import Bert
from minipeft.models.checkpoint import Source
from minipeft.models.classifier import Classifier
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5


class Module(NamedTuple):
    """A module of the transformers model.

    path:       e.g. "model.layers.3.self_attn.q_proj".
    twins:      other modules that do the same: a T5's decoder reads the one embedding through a module of its own.
    outputs:    which of the module's outputs are this place's, [N] int64, where it is a part of a fused map as q of
                GPT-2's c_attn; None: all.
    transposed: whether that module keeps its matrix as [in, out]: GPT-2's Conv1D.
    """

    path: str
    outputs: Tensor | None = None
    transposed: bool = False
    twins: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.twins)


def plain(base: Sites) -> Sites:
    """The base that files know: an encoder without the classes that were put on it here."""
    return base.encoder if isinstance(base, Classifier) else base


def modules_of(base: Sites, headless: bool | None = None) -> dict[str, Module]:
    """Our name of a place -> its module: linear maps, the head, norms and embeddings.

    headless: whether paths are those of the model without a head (AutoModel); None: as export does, of encoders only.
    Raises:
        InputError: the base was not read from a Hugging Face folder.
    """
    base = plain(base)
    if base.family is None:
        raise InputError("this base was made here, not read from a Hugging Face folder, so its places have no names "
                         "there; write it with save_model and load that")
    prefix = base.family.prefix if (isinstance(base, Bert) if headless is None else headless) else ""
    sources = {name.removesuffix(".weight"): source for name, source in base.family.sources(base).items()
               if name.endswith(".weight")}  # fmt: skip
    modules = {}
    for name, source in sources.items():
        is_part = source.part is not None and name in base.sites  # RoBERTa's positions are a part as well
        outputs = outputs_of(source, base.sites[name][0]) if is_part else None
        modules[name] = Module(source.key.removesuffix(".weight").removeprefix(prefix), outputs, source.transposed)
    modules.pop("head_linear", None)  # there only where it is not tied
    modules |= {site: Module("lm_head") for site in base.heads}  # in files of GPT-NeoX "embed_out"
    if isinstance(base, T5):  # whose `shared` holds the weight and is never called
        modules["embed"] = Module("encoder.embed_tokens", twins=("decoder.embed_tokens",))
    return modules


def outputs_of(source: Source, K: int) -> Tensor:
    """Which outputs of a fused map are a part's, in the part's order: [N] int64. K: its inputs."""
    first, length, every = (n if source.transposed else n // K for n in source.part)
    starts = torch.arange(first, source.shape[source.transposed], every)
    return (starts[:, None] + torch.arange(length)).flatten()


def targeted(targets: list | str, modules: Mapping[str, Module]) -> list[str]:
    """The sites of these that target_modules means, as PEFT reads it: a list of last words or paths, or a pattern.

    Raises:
        InputError: a target that is none of these; says what there is.
    """
    words = ", ".join(sorted({module.path.rpartition(".")[2] for module in modules.values()}))
    if isinstance(targets, str):
        pattern = compiled("target_modules", targets)
        sites = [site for site, module in modules.items() if any(map(pattern.fullmatch, module.paths))]
        if not sites:
            raise InputError(f"target_modules {targets!r} matches no place of this base where the method acts; there "
                             f"are {words}")  # fmt: skip
    else:
        for target in targets:
            if not any(ends(path, target) for module in modules.values() for path in module.paths):
                raise InputError(f"target module {target!r} is no place of this base where the method acts; there are "
                                 f"{words}")  # fmt: skip
        sites = [site for site, module in modules.items()
                 if any(ends(path, target) for target in targets for path in module.paths)]  # fmt: skip
    return sites


def ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def compiled(option: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option}: {pattern!r} is no regular expression ({error})") from None


def shortest(chosen: Collection[str], kinds: Mapping[str, str]) -> list[str]:
    """Names that pick these and no others: a last word where that does, else the whole name.

    kinds: every name there is -> its last word as a site. A word that different kinds share ("dense") picks none of
           them: the transformers model may have more modules of that name than the base here.
    """
    names = []
    for name in chosen:
        word = name.rpartition(".")[2]
        alike = [other for other in kinds if other.endswith(word)]
        picks = set(alike) <= set(chosen) and len({kinds[other] for other in alike}) == 1
        names.append(word if picks else name)
    return list(dict.fromkeys(names))


def short_sites(sites: Collection[str], places: Collection[str]) -> tuple[str, ...]:
    """Names of sites as methods take them."""
    return tuple(shortest(sites, {site: site.rpartition(".")[2] for site in places}))


def own_numbers(
    values: Mapping[str, float], otherwise: float, places: Collection[str]
) -> tuple[tuple[str, float], ...]:
    """LoRA.ranks or LoRA.alphas: names of the sites that have another value than this, and the value."""
    return tuple((name, value) for value in dict.fromkeys(value for value in values.values() if value != otherwise)
                 for name in short_sites([site for site in values if values[site] == value], places))  # fmt: skip


def short_paths(sites: Collection[str], modules: Mapping[str, Module]) -> list[str]:
    """Names of these sites' modules as target_modules takes them."""
    kinds = {module.path: site.rpartition(".")[2] for site, module in modules.items()}
    return shortest([modules[site].path for site in sites], kinds)
