"""Hugging Face's config.json and keys of Llama, Mistral, Qwen2 and Qwen3 <-> a Decoder (decoder.py); Phi-3's are read.

Phi-3 is a Llama whose file keeps q, k, v in one tensor, and gate, up in one. Saved, it is a Llama or a Mistral.
"""

import math

from torch import nn

from minipeft.errors import InputError
from minipeft.models.checkpoint import Family, Part, Source
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.fields import choice, flag, num_layers, real, rope, shown, whole

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # of these write() finds one
DEFAULTS = {  # family -> transformers' num_key_value_heads and head_dim (None: see `heads`), rms_norm_eps, positions
    "llama": (None, None, 1e-6, 2048), "mistral": (8, None, 1e-6, 131_072), "qwen2": (32, None, 1e-6, 32_768),
    "qwen3": (32, 128, 1e-6, 32_768), "phi3": (None, None, 1e-5, 4096),
}  # fmt: skip
KEY_PARTS = {  # our name of a module -> Hugging Face's
    "embed": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip


def read(fields: dict) -> DecoderConfig:
    """Our config from config.json's fields."""
    family = choice(fields, "model_type", (*FAMILIES, "phi3"))
    choice(fields, "hidden_act", ("silu",), default="silu")
    width, layers = whole(fields, "hidden_size"), num_layers(fields, "num_hidden_layers")
    kv_heads, head_dim, norm_eps, positions = DEFAULTS[family]
    num_heads, num_kv_heads, head_dim = heads(fields, kv_heads, head_dim)
    rope_theta, rope_scaling = rope(fields)
    if family == "phi3" and rope_scaling:
        raise InputError(f"rope type is {rope_scaling['rope_type']!r}; phi3 has none but 'default' here.")
    bias = family in ("llama", "qwen3") and flag(fields, "attention_bias")
    return DecoderConfig(
        vocab_size=whole(fields, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=whole(fields, "intermediate_size"),
        norm_eps=real(fields, "rms_norm_eps", default=norm_eps),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=flag(fields, "tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and flag(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        windows=windows(fields, family, layers),
        max_positions=whole(fields, "max_position_embeddings", default=positions),
    )


def heads(fields: dict, num_kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int, int]:
    """How many heads, heads of k and v, and features of a head, by default all heads and the width's share of each."""
    width, num_heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    num_kv_heads = whole(fields, "num_key_value_heads", default=num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise InputError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}.")
    if fields.get("head_dim") is None and head_dim is None and width % num_heads:
        raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}; give head_dim.")
    head_dim = whole(fields, "head_dim", default=head_dim or width // num_heads)
    if head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; rotary positions need an even number.")
    return num_heads, num_kv_heads, head_dim


def windows(fields: dict, family: str, num_layers: int) -> tuple[int | None, ...]:
    """DecoderConfig.windows: every layer of Mistral and Phi-3, Qwen's from max_window_layers on or by layer_types."""
    window, first = None, num_layers  # layers from `first` on see `window` rows
    if family == "mistral":
        window, first = fields.get("sliding_window", 4096), 0
    elif family == "phi3":
        window, first = fields.get("sliding_window"), 0
    elif family != "llama" and flag(fields, "use_sliding_window"):
        window, first = fields.get("sliding_window", 4096), whole(fields, "max_window_layers", default=28, least=0)
    if window is None:
        first = num_layers
    else:
        whole({"sliding_window": window}, "sliding_window")
    slides = [layer >= first for layer in range(num_layers)]
    given = sliding_layers(fields, slides)
    if given != slides and (family in ("llama", "mistral", "phi3") or window is None):
        raise InputError(f"layer_types {shown(fields['layer_types'])} does not go with {family}'s sliding_window "
                         f"{window}.")  # fmt: skip
    return tuple(window if slide else None for slide in given) if any(given) else ()


def sliding_layers(fields: dict, default: list[bool]) -> list[bool]:
    """Which layers have a window: as layer_types says (transformers 5), by default these."""
    layer_types = fields.get("layer_types")
    if layer_types is None:
        return default
    names = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or [name in names for name in layer_types] != [True] * len(default):
        raise InputError(f"layer_types is {shown(layer_types)}; needed {len(default)} names, each one of {names}.")
    return [name == "sliding_attention" for name in layer_types]


def write(model: nn.Module) -> dict:
    """config.json in transformers 4's spelling, which 5 reads too: the inverse of `read`."""
    if not isinstance(model, Decoder):
        raise InputError(f"save_model: writes {', '.join(FAMILIES)}, not {type(model).__name__}. Copy its own folder.")
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


def key_of(name: str, parts: dict[str, str] = KEY_PARTS) -> str:
    """Our parameter name -> Hugging Face's: "layers.3.attn.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name == "head_linear.weight":
        return "lm_head.weight"
    return "model." + ".".join(parts.get(part, part) for part in name.split("."))


def phi3_sources(model: Decoder) -> dict[str, Source]:
    """Where each parameter lies: q, k, v are the rows of one tensor from top to bottom, and so are gate, up."""
    sources = FAMILY.sources(model)
    for i, layer in enumerate(model.layers):
        attn, mlp = layer.attn, layer.mlp
        for key, maps in (("self_attn.qkv_proj", (attn.q, attn.k, attn.v)), ("mlp.gate_up_proj", (mlp.gate, mlp.up))):
            shape, first = (sum(linear.weight.shape[0] for linear in maps), model.config.width), 0
            for linear in maps:
                part = Part(first, linear.weight.numel(), math.prod(shape))
                sources[f"{linear.site}.weight"] = Source(f"model.layers.{i}.{key}.weight", shape, part)
                first += part.length
    return sources


FAMILY = Family(
    config=read,
    model=Decoder,
    sources=lambda model: {name: Source(key_of(name)) for name, _ in model.named_parameters()},
    aliases=lambda model: {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied_head else {},
    prefix="model.",
    unused=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # in old files; rope_theta says it
)
PHI3 = FAMILY._replace(sources=phi3_sources)
