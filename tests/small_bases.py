"""Tiny model folders of every kind, as people have them, for tests of whole commands."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minipeft.default_base import initialise, train_tokenizer
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import save_model

POSITIONS = 96


def make_tokenizer(task):
    """Byte-level BPE of the task's texts that puts "<s>" before a text and "</s>" after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([example.text for example in task.pooled("train")], trainer)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def make_decoder(task, folder, seed=0):
    """A Llama that knows this task's labels, as the default base does."""
    tokenizer = train_tokenizer(task)
    config = DecoderConfig(tokenizer.get_vocab_size(), 32, 2, 2, 2, 16, 48, tied_head=True, max_positions=POSITIONS)
    save_model(initialise(Decoder(config), seed), tokenizer, folder)
    return folder


def make_gpt2(task, folder):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS, vocab_size=400)
    return _saved(transformers.GPT2LMHeadModel(config), task, folder)


def make_t5(task, folder):
    config = transformers.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2,
                                   feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
    return _saved(transformers.T5ForConditionalGeneration(config), task, folder)


def make_bert(task, folder):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                                     max_position_embeddings=POSITIONS, vocab_size=400)  # fmt: skip
    return _saved(transformers.BertModel(config), task, folder)


def _saved(model, task, folder):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer(task).save(str(folder / "tokenizer.json"))
    return folder


MAKERS = {"decoder": make_decoder, "gpt2": make_gpt2, "t5": make_t5, "bert": make_bert}
