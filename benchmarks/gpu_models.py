"""Whole models for gpu.py's part `train`: the shapes of published bases, random weights, nothing is downloaded. bf16.

    contenders   those of `python -m minipeft.bench train`, on a folder that is written here and that ours and peft load
    overhead     what all-linear LoRA adds to the frozen base's forward and backward, on a base made in memory

Contenders' rows and losses may differ by SAME_CHANGE (minipeft/contenders.py) of what training changed of them.
"""

import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from methods import ToEmbedded
from safetensors.torch import save_file
from torch import Tensor, nn

from minipeft import bench_train
from minipeft.batch import pack
from minipeft.bench_train import contenders_of, curve_work, details, line, measured, memory
from minipeft.contenders import SAME_CHANGE, Apart
from minipeft.engine import Engine
from minipeft.methods.lora import LoRA
from minipeft.models.loading import load_model, load_shape, read_config
from minipeft.models.top import Top
from minipeft.schedule import PassConfig
from minipeft.timing import Call, clock_of, side_by_side

if TYPE_CHECKING:
    from gpu import Report

DTYPE = torch.bfloat16
ALL_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
T5_BASE = {  # config.json of google/flan-t5-base, Qwen/Qwen2.5-1.5B and meta-llama/Llama-3.1-8B, what is read of it
    "model_type": "t5", "is_encoder_decoder": True, "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048,
    "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "use_sliding_window": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
TINY_T5 = T5_BASE | {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1,
                     "num_heads": 2}  # fmt: skip
TINY_DECODER = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """contenders: name -> config.json; `users` of `tokens` each in a step, `steps` of each, `turns` of each contender.
    overhead: config.json; `overhead_users` share `rows` rows, LoRA of `rank`; for about `timed_s` seconds."""

    contenders: dict[str, dict]
    overhead: dict
    users: int = 64
    tokens: int = 64
    steps: int = 5
    turns: int = 5
    overhead_users: int = 64
    rows: int = 16_384
    rank: int = 16
    timed_s: float = 10.0


REAL = Sizes({"flan-t5-base": T5_BASE, "qwen2.5-1.5b": QWEN}, LLAMA)
TINY = Sizes({"tiny t5": TINY_T5, "tiny qwen2": QWEN | TINY_DECODER}, LLAMA | TINY_DECODER, users=2, tokens=8, steps=2,
             turns=1, overhead_users=2, rows=32, rank=4, timed_s=0.0)  # fmt: skip


def contenders(name: str, sizes: Sizes, device: str, report: "Report") -> None:
    """One base: who trains how fast, in how much memory, and whether all train the same."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(sizes.contenders[name], Path(folder), device)
        base = load_model(folder, DTYPE, device)
        passes = PassConfig(slots=sizes.users, token_budget=2 * sizes.users * max(sizes.tokens, 64))  # all in one
        work = replace(curve_work(name, base, sizes.users, sizes.tokens), steps=sizes.steps, passes=passes,
                       published_steps=sizes.steps)  # fmt: skip
        peers, why = contenders_of(work)
        if why:
            report.leave_out(f"{name}: peft and the published protocol: {why}")
        bench_train.TURNS = sizes.turns
        try:
            entry = measured(work, ["fused", "one_by_one", *peers])
        except Apart as error:
            report.add(False, str(error), base=name)
            return
        if peers and device == "cuda":
            entry |= memory(work, [])
    report.add(True, "\n".join([line(entry), *details(entry)]), **entry, same_change=SAME_CHANGE)


def overhead(sizes: Sizes, device: str, report: "Report") -> None:
    """A training step of all users in one pass, AdamW included, beside the base's forward and backward on its rows.

    Both keep every activation; where memory does not hold that, both compute them again (PassConfig.recompute), and it
    is said.
    """
    base = in_memory(sizes.overhead, device)
    work = curve_work("overhead", base, sizes.overhead_users, sizes.rows // sizes.overhead_users)
    method = LoRA(rank=sizes.rank, alpha=2 * sizes.rank, sites=ALL_LINEAR)
    passes = PassConfig(slots=sizes.overhead_users, token_budget=2 * sizes.rows)
    engine, row = Engine(base, work.labels, passes), method.initial_row(base, 0, "")
    config = replace(work.jobs[0].config, method=method, epochs=10**6)
    runs = [engine.begin(replace(job, config=config, start=row)) for job in work.jobs]

    def frozen() -> None:
        """Gradients down to the embedded tokens, where the lowest LoRA needs none: what is added is not understated."""
        batch = pack([run.minibatch(work.labels) for run in runs], device, base.causal)
        base.recompute, hooks = engine.passes.recompute, ToEmbedded()
        logits = base.head(base.read(batch.rows, Top(batch.head_rows, batch.head_attend, hooks), hooks))
        work.labels.log_probs(logits)[:, 1].sum().backward()

    for recompute in (False, True):
        engine.passes = replace(passes, recompute=recompute)
        try:
            figures = timed(lambda: engine.train_step(runs), frozen, device, sizes.timed_s)
            break
        except torch.OutOfMemoryError:
            words = "nor without them" if recompute else "with every activation: both compute them again"
            report.add(not recompute, f"overhead: memory does not hold {sizes.rows} rows, {words}", recompute=recompute,
                       cannot="out of memory")  # fmt: skip
        release(device)
    else:
        return
    gradient = engine.gradients(runs[:1])
    ok = bool(gradient.isfinite().all() and gradient.any())
    added = 100 * (figures["ours_ms"] / figures["frozen_ms"] - 1)
    words = ", activations computed again" if recompute else ""
    report.add(ok, f"overhead: {sizes.overhead_users} users, {sizes.rows} rows{words}: a step with LoRA of rank "
               f"{sizes.rank} at all linear maps {figures['ours_ms']:.1f} ms, frozen forward and backward "
               f"{figures['frozen_ms']:.1f} ms, {added:.1f} % added", users=sizes.overhead_users, rows=sizes.rows,
               rank=sizes.rank, numbers=method.count(base), recompute=recompute, added_percent=added,
               **figures)  # fmt: skip


def timed(ours: Call, frozen: Call, device: str, timed_s: float) -> dict[str, float]:
    """Median milliseconds of both in turns, warm, and the GPU's memory at its fullest, in GiB."""
    for call in (ours, frozen):
        call()
    ms = side_by_side({"ours_ms": ours, "frozen_ms": frozen}, clock_of(device), timed_s)
    return ms | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


def release(device: str) -> None:
    """Memory that nobody has any more goes back to the GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- Bases of random weights ---------------------------------------------------------------------------------------


def random_weights(base: nn.Module, device: str) -> Iterator[tuple[str, Tensor]]:
    """(name, numbers) of each parameter: matrices normal with standard deviation 1 / (2 sqrt(K)), norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in base.named_parameters():
        numbers = torch.full(weight.shape, float(not name.endswith("bias")), dtype=DTYPE, device=device)
        if weight.ndim == 2:
            numbers.normal_(0.0, 0.5 * weight.shape[1] ** -0.5, generator=generator)
        yield name, numbers


def save_random(fields: dict, folder: Path, device: str) -> None:
    """A model folder with this config.json, drawn on the device; for families that store each parameter by itself."""
    (folder / "config.json").write_text(json.dumps(fields | {"torch_dtype": str(DTYPE).removeprefix("torch.")}))
    base, (family, _) = load_shape(folder), read_config(folder)
    sources = family.sources(base)
    weights = {sources[name].key: numbers.cpu() for name, numbers in random_weights(base, device)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def in_memory(fields: dict, device: str) -> nn.Module:
    """The base of this config.json on the device, no weight on any disk; its head is its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        base = load_shape(folder)
    for name, numbers in random_weights(base, device):
        place, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(place), leaf, nn.Parameter(numbers, requires_grad=False))
    return base
