"""Hugging Face PEFT's adapter_config.json <-> a method. Names and meanings are those of peft 0.21.

Every option is read here, or off: Options.refuse_rest.
"""

from collections.abc import Collection, Mapping

from minipeft.errors import InputError
from minipeft.interop.folders import ANOTHER, NEEDED, Options
from minipeft.interop.fused import check_fused, rank_and_alpha
from minipeft.interop.modules import (
    Module,
    compiled,
    modules_of,
    own_numbers,
    short_paths,
    short_sites,
    targeted,
)
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.methods.norms import LayerNormTuning
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.ptuning import PTuning
from minipeft.methods.vera import VeRA
from minipeft.models.causal import Causal
from minipeft.models.fields import shown
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5

OFF = {  # values of options nobody uses
    "bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16, "vera_dropout": 0.0,
}  # fmt: skip
ABOUT = ("task_type", "inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping")
KEEPS_BASE = (True, False, "gaussian", "orthogonal")  # starts of LoRA that leave the frozen weights as they are
MANY = 10_000  # virtual tokens, layers: more is a damaged file


def option_values(method: Method, base: Sites, base_name: str | None) -> dict:
    """The contents of adapter_config.json.

    Raises:
        InputError: PEFT has no such method, or cannot say what this one does on this base.
    """
    task = "CAUSAL_LM" if isinstance(base, Causal) else "SEQ_2_SEQ_LM" if isinstance(base, T5) else "FEATURE_EXTRACTION"
    about = {"task_type": task, "inference_mode": True, "base_model_name_or_path": base_name}
    if isinstance(method, LoRA | VeRA | IA3 | LayerNormTuning):
        modules, sites = modules_of(base), list(method.chosen(base))
        check_fused(method, sites, modules)
        about |= {"target_modules": short_paths(sites, modules), "modules_to_save": None}
        if not isinstance(method, LayerNormTuning):
            about["fan_in_fan_out"] = any(modules[site].transposed for site in sites)
    match method:
        case LoRA():
            return about | {"peft_type": "LORA", "use_dora": isinstance(method, DoRA)} | _lora_values(method, base)
        case VeRA():
            return about | {"peft_type": "VERA", "r": method.rank, "projection_prng_key": method.seed,
                            "save_projection": True, "d_initial": method.d_start, "bias": "none"}  # fmt: skip
        case IA3():
            inputs = [site for site in sites if method.at_input(site)]
            outputs = [site for site in sites if not method.at_input(site)]
            inputs = short_paths(inputs, modules)  # PEFT wants them among the targets, spelled alike
            return about | {"peft_type": "IA3", "feedforward_modules": inputs,
                            "target_modules": short_paths(outputs, modules) + inputs}  # fmt: skip
        case LayerNormTuning():
            return about | {"peft_type": "LN_TUNING"}
        case PrefixTuning():
            H, D = next(iter(base.attentions.values()))
            return about | {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": method.tokens, "token_dim": H * D,
                            "num_attention_heads": H, "num_layers": num_pairs(method, base),
                            "num_transformer_submodules": _submodules(base),
                            "prefix_projection": False}  # fmt: skip
        case PromptTuning() | PTuning():
            about |= {"num_virtual_tokens": method.tokens, "token_dim": base.embed.weight.shape[1],
                      "num_transformer_submodules": 1}  # fmt: skip
            if isinstance(method, PromptTuning):
                return about | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
            return about | {"peft_type": "P_TUNING", "encoder_reparameterization_type": method.encoder.upper(),
                            "encoder_hidden_size": method.hidden, "encoder_num_layers": method.layers}  # fmt: skip
    raise InputError(f"PEFT has no {method.title}; it has lora, dora, vera, ia3, layernorm, prompt, ptuning and prefix"
                     ". AdapterHub has houlsby, pfeiffer and parallel: export_adapterhub")  # fmt: skip


def _lora_values(method: LoRA, base: Sites) -> dict:
    modules, sites = modules_of(base), method.chosen(base)

    of_path: dict[str, list[str]] = {}
    for site in sites:
        for path in modules[site].paths:
            of_path.setdefault(path, []).append(site)
    numbers = {path: rank_and_alpha(method, own) for path, own in of_path.items()}
    return {"r": method.rank, "lora_alpha": method.alpha, "lora_dropout": method.dropout,
            "rank_pattern": {path: rank for path, (rank, _) in numbers.items() if rank != method.rank},
            "alpha_pattern": {path: alpha for path, (_, alpha) in numbers.items() if alpha != method.alpha},
            "use_rslora": method.scaling == "rslora", "bias": "none", "init_lora_weights": True}  # fmt: skip


def method_of(fields: dict, base: Sites, modules: Mapping[str, Module]) -> Method:
    """The method that adapter_config.json describes, not yet checked on this base.

    At the parts of a fused map the rank is the map's: fused.narrowed.

    Raises:
        InputError: a method, a target or an option that minipeft has not: it is named.
    """
    options = Options(fields, OFF)
    options.drop(*ABOUT)
    kind = options.take("peft_type", NEEDED, str)
    if kind not in READERS:
        raise InputError(f"peft_type is {kind!r}; supported are {', '.join(READERS)}")
    method = READERS[kind](options, base, modules)
    options.refuse_rest()
    if isinstance(method, VeRA | IA3):
        check_fused(method, list(method.chosen(base)), modules)
    return method


def _targets(options: Options, modules: Mapping[str, Module], places: Collection[str]) -> list[str]:
    """The sites among these places that target_modules means."""
    options.take("fan_in_fan_out", False, bool)  # how the base keeps its weights; PEFT itself corrects a wrong one
    return targeted(options.names("target_modules", NEEDED), {site: modules[site] for site in places})


def _lora(options: Options, base: Sites, modules: Mapping[str, Module]) -> LoRA:
    places = LoRA.places(base)
    sites = _targets(options, modules, places)
    options.must_be("init_lora_weights", *KEEPS_BASE, default=True,
                    why="this start changes the base's own weights; save the adapter converted to plain LoRA: "
                        "save_pretrained(..., path_initial_model_for_weight_conversion=...)")  # fmt: skip
    rank, alpha = options.take("r", 8, int), options.take("lora_alpha", 8, int, float)

    def by_site(option: str, otherwise: float, *kinds: type) -> tuple[tuple[str, float], ...]:
        """PEFT's pattern -> value, the first that matches, as pairs of a site and its value."""
        given = options.take(option, {}, dict)
        if wrong := [value for value in given.values() if type(value) not in kinds]:
            raise InputError(f"option {option} has the value {shown(wrong[0])}, needed numbers")
        patterns = [(compiled(option, rf"(.*\.)?({pattern})$"), value) for pattern, value in given.items()]
        values = {}
        for site in sites:
            values[site], *others = (next((v for pattern, v in patterns if pattern.match(path)), otherwise)
                                     for path in modules[site].paths)  # fmt: skip
            if any(other != values[site] for other in others):
                raise InputError(f"option {option} gives {' and '.join(modules[site].paths)} different numbers; here "
                                 "they are one place")  # fmt: skip
        return own_numbers(values, otherwise, places)

    return (DoRA if options.take("use_dora", False, bool) else LoRA)(
        rank=rank, alpha=float(alpha), sites=short_sites(sites, places),
        dropout=options.take("lora_dropout", 0.0, int, float),
        scaling="rslora" if options.take("use_rslora", False, bool) else "lora",
        ranks=by_site("rank_pattern", rank, int), alphas=by_site("alpha_pattern", alpha, int, float),
    )  # fmt: skip


def _vera(options: Options, base: Sites, modules: Mapping[str, Module]) -> VeRA:
    options.drop("init_weights", "save_projection")
    sites = _targets(options, modules, base.sites)
    return VeRA(options.take("r", 256, int), short_sites(sites, base.sites),
                options.take("projection_prng_key", 0, int), options.take("d_initial", 0.1, int, float))


def _ia3(options: Options, base: Sites, modules: Mapping[str, Module]) -> IA3:
    options.drop("init_ia3_weights")
    sites = _targets(options, modules, base.sites)
    feedforward = options.names("feedforward_modules", [])
    if isinstance(feedforward, str):
        pattern = compiled("feedforward_modules", feedforward)
        inputs = [site for site in sites if pattern.fullmatch(modules[site].path)]
    else:
        inputs = [site for site in sites if modules[site].path.endswith(tuple(feedforward))]
    return IA3(short_sites(sites, base.sites), short_sites(inputs, base.sites))


def _layernorm(options: Options, base: Sites, modules: Mapping[str, Module]) -> LayerNormTuning:
    sites = _targets(options, modules, base.norms)
    return LayerNormTuning(() if len(sites) == len(base.norms) else short_sites(sites, base.norms))


def _virtual_tokens(options: Options) -> int:
    tokens = options.take("num_virtual_tokens", NEEDED, int)
    if not 1 <= tokens <= MANY:
        raise InputError(f"option num_virtual_tokens is {tokens}, needed 1 to {MANY}")
    return tokens


def _must_equal(options: Options, name: str, needed: int) -> None:
    if (came := options.take(name, needed, int)) != needed:
        raise InputError(f"option {name} is {came}, this base has {needed}; {ANOTHER}")


def _submodules(base: Sites) -> int:
    """num_transformer_submodules where the file is silent, and what reaches a T5's decoder in prefix tuning."""
    return 2 if isinstance(base, T5) else 1


def _prompt(options: Options, base: Sites, modules: Mapping[str, Module]) -> PromptTuning:
    """Of P-tuning PEFT stores the virtual tokens alone, without what wrote them: prompt tuning goes on from there."""
    options.drop("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                 "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
                 "num_layers", "num_attention_heads")  # fmt: skip
    _must_equal(options, "token_dim", base.embed.weight.shape[1])
    options.must_be("num_transformer_submodules", 1, default=_submodules(base),
                    why="needed 1, virtual tokens before the encoder's input; a T5's decoder takes none here")
    return PromptTuning(_virtual_tokens(options))


def _prefix(options: Options, base: Sites, modules: Mapping[str, Module]) -> PrefixTuning:
    """PEFT stores what its MLP computed (prefix_projection), not the MLP."""
    H, D = next(iter(base.attentions.values()))
    options.drop("prefix_projection", "encoder_hidden_size", "init_weights", "num_layers")
    _must_equal(options, "num_attention_heads", H)
    _must_equal(options, "token_dim", H * D)
    options.must_be("num_transformer_submodules", _submodules(base), default=_submodules(base),
                    why=f"needed {_submodules(base)}; on a T5 with 1 the decoder's prefix gets into cross-attention")
    return PrefixTuning(_virtual_tokens(options), hf_compat=isinstance(base, T5))


def num_pairs(method: PrefixTuning, base: Sites) -> int:
    """PEFT's num_layers for our prefixes: how many pairs of keys and values its file holds; see `pair_of`.

    Raises:
        InputError: prefixes at places that PEFT does not reach.
    """
    if isinstance(base, T5):
        if not method.hf_compat:
            raise InputError("prefix: on a T5 PEFT reaches the decoder's own attention alone, and this adapter has "
                             "prefixes in the encoder and in cross-attention; train with hf_compat=True to export it")
        return 2 * base.config.num_decoder_layers
    return len(base.attentions)


def pair_of(layer: int, num_pairs: int, base: Sites) -> int:
    """Which of the file's pairs a layer's attention gets.

    On a T5 PEFT lays two copies end to end and deals them out by twos, the second of which it then drops: layers 0, 1,
    2, ... get pairs 0, 2, 4, ..., and after the end from the start again. So with num_layers as PEFT itself sets it, an
    even number, half of the pairs act, each at two layers; with twice as many each layer has its own.
    """
    return 2 * layer % num_pairs if isinstance(base, T5) else layer


READERS = {"LORA": _lora, "VERA": _vera, "IA3": _ia3, "LN_TUNING": _layernorm, "PROMPT_TUNING": _prompt,
           "P_TUNING": _prompt, "PREFIX_TUNING": _prefix}  # fmt: skip
