"""The embedded default: a small base made on the spot, so that everything runs without a download.

A decoder of about a million numbers and a byte-level BPE tokenizer, both trained on the pooled training examples of
one task and on nothing else: it is the honest "one model for all". It is written as a Hugging Face folder into the
user's cache, under the hash of what it was made from, and loaded like any other base.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minipeft.batch import Part, Read, pack
from minipeft.errors import InputError
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.hooks import Linear
from minipeft.models.loading import save_model
from minipeft.prompts import ANSWER, encode_task, label_token
from minipeft.randomness import generator
from minipeft.tasks.task import Task

VOCAB_SIZE = 2048  # at most; fewer where the texts have fewer words
SHAPE = dict(width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384, max_positions=512)
STEPS = 260
TOKENS_PER_STEP = 1536
LEARNING_RATE = 3e-3  # peak, AdamW
TEXT_WEIGHT = 0.2  # of the loss of predicting the text itself, beside the label's
TEXT_EVERY = 4  # one example in so many also trains on its text: most of the effect for a fraction of the head's cost
RECALL_WEIGHT = 1.0  # of the loss of recalling the text's words at the answer


def default_base(task: Task, seed: int = 0, on_step: Callable[[int, int], None] | None = None) -> Path:
    """The folder of the base for this task's training split, made now if the cache does not hold it.

    Args:
        on_step: called with (steps done, steps in all) while it trains.
    """
    recipe = [SHAPE, VOCAB_SIZE, STEPS, TOKENS_PER_STEP, LEARNING_RATE, TEXT_WEIGHT, TEXT_EVERY, RECALL_WEIGHT,
              seed, task.labels]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for example in task.pooled("train"):
        digest.update(json.dumps([example.text, example.label]).encode())
    folder = cache_folder() / "bases" / digest.hexdigest()[:32]
    if not (folder / "config.json").exists():
        _check_writable(folder.parent)
        tokenizer = train_tokenizer(task)
        model = train_decoder(task, tokenizer, seed, on_step)
        try:
            save_model(model, tokenizer, folder)
        except InputError:
            if not (folder / "config.json").exists():  # unless another process made the same base meanwhile
                raise
    return folder


def _check_writable(folder: Path) -> None:
    """Find out before a minute of training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"the cache folder {folder} cannot be written ({error.strerror}); "
                         "set MINIPEFT_CACHE to a folder that can") from None


def cache_folder() -> Path:
    """$MINIPEFT_CACHE, else minipeft in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if "MINIPEFT_CACHE" in os.environ:
        return Path(os.environ["MINIPEFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minipeft"


def train_tokenizer(task: Task) -> Tokenizer:
    """A byte-level BPE tokenizer of the training texts, with one token for "answer" and one per label."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[ANSWER, *map(label_token, task.labels)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = dict.fromkeys(example.text for example in task.pooled("train"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_decoder(
    task: Task, tokenizer: Tokenizer, seed: int, on_step: Callable[[int, int], None] | None = None
) -> Decoder:
    """A decoder trained from scratch on everybody's training examples, shuffled together.

    loss = -log p(label) + TEXT_WEIGHT * (mean over text tokens of -log p(token))
           + RECALL_WEIGHT * (mean over text tokens of -log r(token | state at the answer)),

    each averaged over the batch. The last term, through a linear map r that is thrown away afterwards, makes the state
    from which the label is read remember what was said and not only what most people think of it. A large language
    model's states do so by themselves; a million numbers trained for a minute need to be asked.
    """
    config = DecoderConfig(vocab_size=tokenizer.get_vocab_size(), tied_head=True, **SHAPE)
    model = initialise(Decoder(config), seed).requires_grad_(True)
    encoded = encode_task(task, tokenizer, config.max_positions)
    questions = [question for user in task.users for question in encoded.train[user]]
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    recall = torch.nn.Linear(config.width, config.vocab_size, bias=False)
    torch.nn.init.zeros_(recall.weight)
    optimizer = torch.optim.AdamW(
        [{"params": [*decayed, recall.weight], "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.98),
    )
    batches = _batches([len(q.prompt) for q in questions], generator(seed, "", "default base", "order"))
    for step in range(STEPS):
        lr = LEARNING_RATE * min((step + 1) / (0.1 * STEPS), (STEPS - step) / (0.9 * STEPS))
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = [questions[i] for i in next(batches)]
        reads = [Read(q.prompt, 1 if i % TEXT_EVERY else len(q.prompt)) for i, q in enumerate(chosen)]
        batch = pack([Part(0, 0, reads)])
        targets = [torch.tensor([*q.prompt[1:], encoded.labels.labels[q.label][0]])[-read.num_read :]
                   for q, read in zip(chosen, reads)]
        at_label = torch.cat([torch.arange(len(t)) == len(t) - 1 for t in targets])
        hidden = model.hidden(batch.rows).index_select(0, batch.head_rows[batch.read])
        losses = F.cross_entropy(model.head(hidden), torch.cat(targets), reduction="none")
        loss = losses[at_label].mean() + TEXT_WEIGHT * losses[~at_label].mean()
        said = torch.zeros(len(chosen), config.vocab_size)  # [examples, vocab]: each text's tokens, evenly
        for row, q in zip(said, chosen):
            row[list(q.prompt[:-1])] = 1 / len(set(q.prompt[:-1]))
        loss = loss + RECALL_WEIGHT * F.cross_entropy(recall(hidden[at_label]), said)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, STEPS)
    return model.requires_grad_(False)


def initialise(model: Decoder, seed: int) -> Decoder:
    """Start values: linear maps normal with standard deviation 1/sqrt(K), those that write to the residual stream
    divided by sqrt(2 L) (Radford et al. 2019); embeddings 0.02; norms 1. A function of the seed alone."""
    L = model.config.num_layers
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear) and module.weight is not model.embed.weight:
                std = module.weight.shape[1] ** -0.5 / (math.sqrt(2 * L) if name.endswith((".o", ".down")) else 1)
            elif module is model.embed:
                std = 0.02
            else:
                continue
            draw = generator(seed, "", "default base", name).standard_normal(module.weight.shape, dtype=np.float32)
            module.weight.copy_(torch.from_numpy(draw) * std)
    return model


def _batches(lengths: list[int], rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless minibatches of example numbers, about TOKENS_PER_STEP tokens each, epoch after shuffled epoch."""
    batch, tokens = [], 0
    while True:
        for i in rng.permutation(len(lengths)).tolist():
            batch.append(i)
            tokens += lengths[i]
            if tokens >= TOKENS_PER_STEP:
                yield batch
                batch, tokens = [], 0
