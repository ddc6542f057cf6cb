"""Hugging Face's config.json and keys of Llama, Mistral, Qwen2 and Qwen3 <-> a Decoder (decoder.py)."""

from minipeft.errors import InputError
from minipeft.models.checkpoint import Family, Source
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.fields import choice, flag, num_layers, real, rope, whole

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KEY_PARTS = {  # our name of a module -> Hugging Face's
    "embed": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip


def read(fields: dict) -> DecoderConfig:
    """Our config from config.json's fields."""
    family = choice(fields, "model_type", FAMILIES)
    choice(fields, "hidden_act", ("silu",), default="silu")
    width, layers = whole(fields, "hidden_size"), num_layers(fields, "num_hidden_layers")
    num_heads = whole(fields, "num_attention_heads")
    num_kv_heads = whole(fields, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise InputError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}.")
    if fields.get("head_dim") is None and width % num_heads:
        raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}; give head_dim.")
    head_dim = whole(fields, "head_dim", default=width // num_heads)
    if head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; rotary positions need an even number.")

    rope_theta, rope_scaling = rope(fields)
    bias = family in ("llama", "qwen3") and flag(fields, "attention_bias")
    return DecoderConfig(
        vocab_size=whole(fields, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=whole(fields, "intermediate_size"),
        norm_eps=real(fields, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=flag(fields, "tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and flag(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        windows=windows(fields, family, layers),
        max_positions=whole(fields, "max_position_embeddings", default=2048),
    )


def windows(fields: dict, family: str, num_layers: int) -> tuple[int | None, ...]:
    """DecoderConfig.windows: every layer of Mistral, Qwen's from max_window_layers on or as layer_types says."""
    window, first = None, num_layers  # layers from `first` on see `window` rows
    if family == "mistral":
        window, first = fields.get("sliding_window", 4096), 0
    elif family != "llama" and flag(fields, "use_sliding_window"):
        window, first = fields.get("sliding_window", 4096), whole(fields, "max_window_layers", default=28, least=0)
    if window is None:
        first = num_layers
    else:
        whole({"sliding_window": window}, "sliding_window")
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


def write(model: Decoder) -> dict:
    """config.json in transformers 4's spelling, which 5 reads too: the inverse of `read`."""
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


def key_of(name: str) -> str:
    """Our parameter name -> Hugging Face's: "layers.3.attn.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name == "head_linear.weight":
        return "lm_head.weight"
    return "model." + ".".join(KEY_PARTS.get(part, part) for part in name.split("."))


FAMILY = Family(
    config=read,
    model=Decoder,
    sources=lambda model: {name: Source(key_of(name)) for name, _ in model.named_parameters()},
    aliases=lambda model: {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied_head else {},
    prefix="model.",
    unused=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # in old files; rope_theta says it
)
