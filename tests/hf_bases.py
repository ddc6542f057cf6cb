"""What tests of file formats share: small bases of every shape, and what ours and theirs say with an adapter."""

import functools
import tempfile

import numpy as np
import torch
import transformers

from minipeft.acting import Acting
from minipeft.batch import groups_of
from minipeft.methods import LoRA
from minipeft.methods.method import Residents, Share
from minipeft.models.attention import Packed
from minipeft.models.loading import load_model
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5
from minipeft.schedule import Adapter

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}  # fmt: skip
T5_SIZES = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3,
            "decoder_start_token_id": 0}  # fmt: skip
ENCODER_SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                 "num_attention_heads": 6, "max_position_embeddings": 64}  # fmt: skip
NEOX_SIZES = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | {"rotary_pct": 0.5}
FAMILIES = {
    "llama": lambda: causal("llama", **SIZES), "qwen2": lambda: causal("qwen2", **SIZES, tie_word_embeddings=True),
    "gpt2": lambda: causal("gpt2", vocab_size=61, n_embd=24, n_head=6, n_layer=2, n_positions=64),
    "phi3": lambda: causal("phi3", **SIZES), "gemma2": lambda: causal("gemma2", **SIZES, head_dim=4),
    "gpt_neox": lambda: causal("gpt_neox", **NEOX_SIZES),
    "gpt_neox tied": lambda: causal("gpt_neox", **NEOX_SIZES, tie_word_embeddings=True),
    "wide": lambda: causal("llama", **SIZES | {"hidden_size": 30, "head_dim": 4}),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES)),
    "t5 gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5_SIZES | {"num_decoder_layers": 3}, feed_forward_proj="gated-gelu")),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**ENCODER_SIZES)),
    "bert, no pooler": lambda: transformers.BertModel(
        transformers.BertConfig(**ENCODER_SIZES), add_pooling_layer=False),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**ENCODER_SIZES, pad_token_id=1)),
}  # fmt: skip
LENGTHS = [3, 17, 1, 9]
WRITTEN = [4, 1, 9, 2]


def causal(family, **fields):
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields))


@functools.cache
def base_of(family):
    """(transformers' model, ours), with weights far from their start values. Tests leave both as they are."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            size = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(size * noise + (weight.ndim == 1 and not name.endswith("bias")))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, load_model(folder)


def sequences(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 61, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def ours(base, adapter=None):
    """Our base's logits, or an encoder's last hidden states, of every sequence, with an adapter or alone."""
    if adapter is None:
        adapter = Adapter("nobody", LoRA(1, sites=("q",)), torch.zeros(LoRA(1, sites=("q",)).layout(base).row_size))
    method = adapter.method
    residents = Residents(method, base, 1, "cpu", torch.float32)
    residents.admit(adapter.user, method, adapter.row, 0)
    residents.begin(np.zeros(1, dtype=np.int64), training=False)
    own, inputs = method.virtual(base)

    def pack(texts, virtual, causal):
        rows = Rows.pack([[0] * virtual + text for text in texts], "cpu", causal, virtual=[virtual] * len(texts))
        starts = (np.zeros(len(texts), int), np.cumsum(rows.lengths) - rows.lengths, [virtual] * len(texts))
        (group,) = groups_of([(0, 0)], [int(rows.lengths.sum())], "cpu", starts)
        share = Share(residents, 0, group.segments, group.prompts, residents.keys, None, None, anchor)
        return rows, Acting([share], [], anchor, None)

    def texts_of(rows, y, virtual):
        return [part[virtual:] for part in rows.split(y)]

    anchor, texts = torch.zeros(()), sequences(LENGTHS)
    if isinstance(base, T5):
        read, reading = pack(texts, inputs, False)
        write, writing = pack(sequences(WRITTEN, 2), own, True)
        cross = Packed.plan(write.lengths, False, "cpu", k_lengths=read.lengths)
        keys = base.cross_keys(base.encode_rows(read, reading), reading)
        return texts_of(write, base.head(base.decode_rows(write, keys, cross, writing), writing), own)
    decoder = hasattr(base, "head_linear")
    rows, hooks = pack(texts, own, decoder)
    hidden = base.hidden(rows, hooks)
    return texts_of(rows, base.head(hidden, hooks) if decoder else hidden, own)


@torch.no_grad()
def theirs(model):
    """The same of a transformers or PEFT model."""
    outputs = []
    for text, written in zip(sequences(LENGTHS), sequences(WRITTEN, 2)):
        if model.config.is_encoder_decoder:
            outputs.append(model(input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([written])).logits[0])
        else:
            out = model(input_ids=torch.tensor([text]))
            y = out.logits if hasattr(out, "logits") else out.last_hidden_state
            outputs.append(y[0, -len(text) :])
    return outputs


def assert_same(one, other):
    largest = max(y.abs().max() for y in other).item()
    for x, y in zip(one, other, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max().item() <= 1e-5 * largest


def assert_differ(one, other):
    assert max((x - y).abs().max().item() for x, y in zip(one, other)) > 0.01


def random_adapter(method, base, seed=0):
    """An adapter of which every number acts."""
    method.check(base)
    torch.manual_seed(seed)
    tensors = method.tensors(method.initial_row(base, 0, "ann"), base)
    row = method.row({name: t + 0.3 * torch.randn(t.shape) for name, t in tensors.items()}, base)
    return Adapter("ann", method, row)
