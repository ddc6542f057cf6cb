"""What only a GPU can tell: are the compiled kernels right, do they stay right, which configurations are best, and how
fast is training? Run by gpu.sh, one part per process:

    check   every op against fp64; isolation; the same bits again, alone, and reordered; memory full of NaN beforehand;
            both ways of attention
    soak    thousands of runs over block configurations and ranks, looking for NaN and for bits that change
    sweep   time over block configurations at three shapes: which is best, and how far is ours from it?
    layer   what LoRA adds to a Llama-3.1-8B layer; every method's gradients in the engine against the CPU's; then
            `python -m minipeft.bench quick` on the GPU
    train   whole models of random weights (gpu_models.py): the contenders of `python -m minipeft.bench train` on
            Flan-T5-base's and Qwen2.5-1.5B's shapes; what LoRA adds to Llama-3.1-8B's forward and backward

Each part writes <out>/<part>.json after every item, so a part that is stopped leaves what it has. No item starts later
than LIMIT_S. The exit code says how it went: 0 all of it, and well; 1 an item failed; 3 something was left out.
--rehearse runs the same lines on a CPU in Triton's interpreter (gpu.sh sets TRITON_INTERPRET=1), tiny.

It needs torch, NumPy and Triton; only the engine needs the rest of what minipeft needs, and is left out without it; so
are transformers and peft.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType

try:
    import numpy as np
    import torch
    import triton
    from torch import Tensor
    from triton.errors import TritonError
except ImportError as error:
    print(f"gpu.sh: {error.name} is not installed; torch, NumPy and Triton are needed", file=sys.stderr)
    sys.exit(2)

from minipeft import timing
from minipeft.kernel_cases import (
    Inputs,
    Op,
    Outputs,
    Point,
    exactly,
    make,
    pick,
    poisoned_memory,
    relative_error,
    run,
    tolerance,
)
from minipeft.kernel_ops import LORA_LINEAR, OPS, SEGMENT_MATMUL, SHRINK_EXPAND, VARIANTS, WGRAD
from minipeft.models.attention import Packed
from minipeft.timing import ceilings, clock_of, floor_ms, side_by_side
from minipeft_kernels import backend as backends
from minipeft_kernels import reference, shrink_expand, wgrad
from minipeft_kernels.backend import backend

PACKAGES = "it needs safetensors, tokenizers and tqdm"  # what models and tasks are read with
LIMIT_S = 420  # of a part
QUICK_S = MODEL_S = 120  # so much earlier the quick suite must begin, and a whole model: they take minutes
WIDEST = {torch.bfloat16: 1 << 30, torch.float32: 1024, torch.float16: 512}  # K to check in: each is compiled anew
LLAMA, QWEN, T5 = "llama-3.1-8b", "qwen2.5-1.5b", "flan-t5-base"


@dataclass(frozen=True)
class Attention:
    """Heads of q, heads of k and v, features of a head, and who sees whom; sequences of these lengths."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Sizes:
    """How much of everything. check: ops by default; check_joint: lora_linear, several sites of one input."""

    device: str
    check: tuple[Point, ...]
    check_joint: tuple[Point, ...]
    check_attention: tuple[Attention, ...]
    soak: Point
    soak_iterations: int
    soak_ranks: tuple[int, ...]
    soak_configurations: int  # of each kernel and rank
    sweep: tuple[Point, ...]
    sweep_ranks: tuple[int, ...]
    sweep_configurations: int
    layer: tuple[Point, ...]
    method_users: int


RAGGED = tuple(max(1, 1500 // n) for n in range(1, 65))  # 7,090 rows
REAL = Sizes(
    device="cuda",
    check=(Point(LLAMA, 4096, (4096,), 16, 16384, 64, "zipf"), Point("odd", 300, (200,), 5, 700, 9, "zipf"),
           Point(T5, 768, (2048,), 8, 2048, 128, "distinct"), Point("one row each", 768, (768,), 4, 1024, 1024),
           Point(QWEN, 1536, (8960,), 64, 4096, 40, "giant_tiny")),
    check_joint=(Point(QWEN, 1536, (1536, 256, 256), 16, 4096, 40, "zipf"),
                 Point(LLAMA, 4096, (4096, 1024, 1024), 8, 4096, 16, "giant_tiny"),
                 Point(LLAMA, 4096, (14336, 14336), 64, 2048, 8, "distinct")),
    check_attention=(Attention(LLAMA, 32, 8, 128, RAGGED), Attention("mistral-7b", 32, 8, 128, RAGGED, window=100),
                     Attention("minilm", 12, 12, 32, RAGGED, causal=False)),
    soak=Point(LLAMA, 4096, (4096,), 16, 16384, 40, "zipf"), soak_iterations=10_000, soak_ranks=(16, 64, 8, 32, 4),
    soak_configurations=4,
    sweep=(Point(LLAMA, 4096, (4096,), 16, 16384, 64), Point(QWEN, 1536, (8960,), 16, 16384, 64),
           Point(T5, 768, (2048,), 16, 16384, 64)),
    sweep_ranks=(16, 64), sweep_configurations=100,
    layer=tuple(Point(LLAMA, K, widths, 16, 16384, 64) for K, widths in
                ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))),
    method_users=32,
)  # fmt: skip
TINY = Sizes(
    device="cpu",
    check=(Point("odd", 40, (24,), 5, 60, 3, "zipf"),), check_joint=(Point("joint", 32, (128, 128), 4, 40, 2),),
    check_attention=(Attention("tiny", 4, 2, 8, (5, 1, 20)), Attention("window", 4, 2, 8, (5, 1, 20), window=3),
                     Attention("encoder", 2, 2, 16, (3, 9), causal=False)),
    soak=Point("tiny", 32, (32,), 4, 40, 2), soak_iterations=8, soak_ranks=(4,), soak_configurations=2,
    sweep=(Point("tiny", 32, (32,), 4, 40, 2),), sweep_ranks=(4,), sweep_configurations=2,
    layer=(Point("tiny", 32, (128, 128), 4, 32, 2), Point("tiny", 64, (32,), 4, 32, 2)), method_users=1,
)  # fmt: skip


class Report:
    """<out>/<part>.json, whole after every item, and a line per item on stdout."""

    def __init__(self, out: Path, part: str, sizes: Sizes):
        self.began, self.path = time.perf_counter(), out / f"{part}.json"
        name = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU, Triton's interpreter: a rehearsal"
        self.result = {"part": part, "device": name, "torch": torch.__version__, "triton": triton.__version__,
                       "python": platform.python_version(), "items": [], "failed": 0, "left_out": 0}  # fmt: skip
        self.write()

    def time_is_up(self, ahead_s: float = 0) -> bool:
        """Whether what must begin ahead_s before LIMIT_S is late. Counts what is left out, too."""
        late = time.perf_counter() - self.began + ahead_s > LIMIT_S
        self.result["left_out"] += late
        return late

    def leave_out(self, text: str) -> None:
        self.result["left_out"] += 1
        self.write()
        print(f"left out: {text}", flush=True)

    def exit_code(self) -> int:
        """1: an item failed. 3: none did, and something was left out. 0: all is well."""
        return 1 if self.result["failed"] else 3 if self.result["left_out"] else 0

    def add(self, ok: bool, text: str, **figures) -> None:
        self.result["items"].append({"ok": ok, **figures})
        self.result["failed"] += not ok
        self.write()
        print(f"{'ok  ' if ok else 'FAIL'} {text}", flush=True)

    def note(self, **figures) -> None:
        self.result |= figures
        self.write()

    def write(self) -> None:
        self.result["seconds"] = time.perf_counter() - self.began
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(part, self.path)


# ---- check ---------------------------------------------------------------------------------------------------------


def check(sizes: Sizes, report: Report) -> None:
    points = [(point, [name for name in OPS | VARIANTS if name != "lora_linear"]) for point in sizes.check]
    points += [(point, ["lora_linear"]) for point in sizes.check_joint]
    for point, names in points:
        for name, (dtype, widest) in product(names, WIDEST.items()):
            if point.K <= widest:
                check_op(name, one_width(name, point), dtype, sizes.device, report)
    for case, dtype in product(sizes.check_attention, (torch.bfloat16, torch.float16)):
        if not report.time_is_up():
            check_attention(case, dtype, sizes.device, report)


def one_width(name: str, point: Point) -> Point:
    return replace(point, widths=(point.K,)) if name in ("bottleneck", "ia3", "shift", "prompts") else point


def check_op(name: str, point: Point, dtype: torch.dtype, device: str, report: Report) -> None:
    op = (OPS | VARIANTS)[name]
    for backward in op.passes:
        if report.time_is_up():
            continue
        found = findings(op, make(op, point, device, dtype, mixed_ranks=True), backward)
        wrong = [key for key, good in found.items() if good is False]
        title = f"{name} {'forward+backward' if backward else 'forward'} {point.model} {dtype}"
        report.add(not wrong, f"{title}: relative error {found['error']:.1e}, {found['ratio']:.2f} of what is allowed "
                   f"{' '.join(wrong)}", op=name, backward=backward, dtype=str(dtype), K=point.K, widths=point.widths,
                   rank=point.rank, T=point.T, users=point.users, distribution=point.distribution,
                   **found)  # fmt: skip


def check_attention(case: Attention, dtype: torch.dtype, device: str, report: Report) -> None:
    """The buckets' way and, if chosen, flash attention's: as accurate as plain PyTorch in that dtype, and isolated.

    Whether a second run has the same bits is written down, not asked for: flash attention's grad_q need not have.
    """
    plan = Packed.plan(np.array(case.lengths), case.causal, device)
    chosen = plan.way(torch.device(device), dtype, case.head_dim, plain=True)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(sum(case.lengths), heads, case.head_dim) for heads in (case.heads, case.kv_heads)]
    q, k, v, grad_y = (torch.randn(shapes[i], device=device, generator=generator).to(dtype) for i in (0, 1, 1, 0))
    define = lambda *qkv: plan.varlen(*qkv, case.window, attention=reference.varlen_attention)  # noqa: E731
    ways = {"padded": lambda *qkv: plan.padded(*qkv, case.window)}
    if device == "cpu":  # in a rehearsal the definition stands in for flash attention
        ways["varlen"] = define
    elif chosen == "varlen":
        ways["varlen"] = lambda *qkv: plan.varlen(*qkv, case.window)
    exact = with_gradients(define, q.double(), k.double(), v.double(), grad_y.double())
    allowed = 2 * difference(with_gradients(define, q, k, v, grad_y), exact) + 1e-7
    first = case.lengths[0]
    poisoned = [torch.cat([x[:first], torch.full_like(x[first:], torch.nan)]) for x in (q, k, v, grad_y)]
    for way, attention in ways.items():
        found = with_gradients(attention, q, k, v, grad_y)
        again = all(map(equal, found, with_gradients(attention, q, k, v, grad_y)))
        isolated = not any(x[:first].isnan().any() for x in with_gradients(attention, *poisoned))
        error = difference(found, exact)
        words = f"{'' if isolated else 'NOT isolated, '}chosen: {chosen}, {'the same' if again else 'other'} bits again"
        report.add(error <= allowed and isolated, f"attention {way} {case.model} {dtype}: relative error {error:.1e}, "
                   f"{error / allowed:.2f} of what is allowed; {words}", op="attention", way=way, chosen=chosen,
                   model=case.model, dtype=str(dtype), error=error, allowed=allowed, isolated=isolated,
                   again=again)  # fmt: skip


def with_gradients(attention: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """y, grad_q, grad_k and grad_v of q, k, v and grad_y."""
    *inputs, grad_y = (x.detach().clone().requires_grad_() for x in tensors)
    y = attention(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def difference(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest |x - exact| / |exact|; NaN if there is one."""
    errors = [float((x.double() - e).norm() / e.norm()) for x, e in zip(found, exact)]
    return max(errors, key=lambda error: (error != error, error))


def findings(op: Op, inputs: Inputs, backward: bool) -> dict:
    """Errors of one batch, and what is True of it."""
    everyone = list(range(len(inputs.segments.slots)))
    exact = exactly(op, inputs, backward)
    plain = op.define(copied(op, inputs.map(Tensor.float) if op.accurate else inputs), backward)
    first = run(op, "ours", inputs, backward)
    bits = by_user(inputs, first)

    def same(other: Inputs, users: Sequence[int]) -> bool:
        found = by_user(other, run(op, "ours", other, backward))
        slots = inputs.segments.slots[users].tolist()
        return all(equal(one, two) for slot in slots for one, two in zip(found[slot], bits[slot]))

    error, plain_error = relative_error(first, exact, inputs), relative_error(plain, exact, inputs)
    ratio = error / (2 * plain_error + 1e-7)
    longest = int(np.argmax(np.diff(inputs.segments.starts)))
    facts = {"error": error, "plain_error": plain_error, "ratio": ratio, "as_accurate": ratio <= 1,
             "within_tolerance": error <= tolerance(op, inputs), "again": same(inputs, everyone)}
    facts["isolated"] = same(with_nan(op, inputs, everyone[1::2]), everyone[::2])
    if op not in (LORA_LINEAR, SEGMENT_MATMUL):  # a library's product: its bits may depend on how many rows share it
        facts["alone"] = all(same(pick(op, inputs, [u]), [u]) for u in {0, longest, everyone[-1]})
        facts["reordered"] = same(pick(op, inputs, everyone[::-1]), everyone)
    return facts


def copied(op: Op, inputs: Inputs) -> Inputs:
    """So that an op in place leaves the original alone."""
    return op.prepare(inputs.map(Tensor.clone)) if op.in_place else inputs


def by_user(inputs: Inputs, outputs: Outputs) -> dict[int, list[Tensor]]:
    """slot -> that user's part of every output."""
    starts = inputs.segments.starts
    return {int(slot): [*(y[start:end] for y in outputs.rows), *(grad[slot] for grad in outputs.slots)]
            for slot, start, end in zip(inputs.segments.slots, starts, starts[1:])}  # fmt: skip


def equal(one: Tensor, two: Tensor) -> bool:
    """Bit by bit, NaN or not."""
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, two)))


def with_nan(op: Op, inputs: Inputs, victims: Sequence[int]) -> Inputs:
    """These users' rows and gradients, in AdamW's case the gradient that it reads, full of NaN."""
    inputs, starts = inputs.map(Tensor.clone), inputs.segments.starts
    for victim in victims:
        for tensor in (inputs.x, *inputs.grad_ys):
            tensor[starts[victim] : starts[victim + 1]] = torch.nan
        if op.in_place:
            inputs.weights[1][int(inputs.segments.slots[victim])] = torch.nan
    return op.prepare(inputs)


# ---- Configurations ------------------------------------------------------------------------------------------------


@contextmanager
def configured(module: ModuleType, configuration: dict[str, int]) -> Iterator[None]:
    """Launches of this module's kernels take these block sizes, whatever the widths."""
    shipped = module.configuration
    module.configuration = lambda *widths: dict(configuration)
    try:
        yield
    finally:
        module.configuration = shipped


def shipped_configuration(module: ModuleType, rank: int) -> dict[str, int]:
    """For bf16."""
    return module.configuration(rank, torch.bfloat16.itemsize)


def candidates(module: ModuleType, rank: int, tried: list[dict[str, int]]) -> list[dict[str, int]]:
    """What is shipped first, then what else is tried."""
    shipped = shipped_configuration(module, rank)
    return [shipped, *(configuration for configuration in tried if configuration != shipped)]


def configurations(block: str, block_ts: Sequence[int], blocks: Sequence[int]) -> list[dict[str, int]]:
    """All combinations, the likely ones first."""
    return [{"BLOCK_T": BLOCK_T, block: size, "num_warps": warps, "num_stages": stages}
            for stages, warps, BLOCK_T, size in product((3, 4), (4, 8), block_ts, blocks)]  # fmt: skip


KERNELS = {  # name -> op, module, configurations worth a try
    "shrink_expand": (SHRINK_EXPAND, shrink_expand, configurations("BLOCK", (32, 64), (128, 64))),
    "wgrad": (WGRAD, wgrad, configurations("BLOCK_D", (64, 32), (256, 128, 64))),
}


# ---- soak ----------------------------------------------------------------------------------------------------------


def soak(sizes: Sizes, report: Report) -> None:
    """Every configuration runs again and again on the same inputs, outputs poisoned each time.

    Most of the time goes into compiling, so the runs are spread evenly; what is shipped comes first for every rank.
    """
    kernels = KERNELS | {"split": KERNELS["shrink_expand"]}
    tried = [(rank, kernel, candidates(module, rank, some)[nth]) for nth in range(sizes.soak_configurations)
             for rank in sizes.soak_ranks for kernel, (_, module, some) in kernels.items()]  # fmt: skip
    tried.append(tried[0])  # once more, for the runs that are left over by configurations that do not run
    done = 0
    for nth, (rank, kernel, configuration) in enumerate(tried):
        if report.time_is_up():
            continue
        iterations = (sizes.soak_iterations - done) // (len(tried) - nth)
        op, module, _ = kernels[kernel]
        inputs = make(op, replace(sizes.soak, rank=rank), sizes.device, torch.bfloat16, mixed_ranks=True)
        words = f"{kernel} rank {rank} {configuration}"
        with configured(module, configuration), split_if(kernel == "split"), poisoned_memory():
            try:
                found = repeat(op, inputs, iterations)
            except TritonError as error:  # too much shared memory, or it does not compile: part of the answer
                report.add(True, f"{words}: does not run, {type(error).__name__}", kernel=kernel, rank=rank,
                           configuration=configuration, cannot=str(error).split("\n")[0])  # fmt: skip
                continue
        done += iterations
        good = found["nan"] == found["mismatches"] == 0 and found["error"] <= tolerance(op, inputs)
        report.add(good, f"{words}: {iterations} runs, {found}", kernel=kernel, rank=rank, configuration=configuration,
                   iterations=iterations, **found)  # fmt: skip
    report.note(iterations=done, promised=sizes.soak_iterations)
    print(f"{done} runs in all")
    if done < sizes.soak_iterations:
        report.leave_out(f"{sizes.soak_iterations - done} of {sizes.soak_iterations} runs")


@contextmanager
def split_if(split: bool) -> Iterator[None]:
    """The launcher splits products among programs wherever there are fewer tiles than FEW_TILES."""
    shipped = shrink_expand.FEW_TILES
    shrink_expand.FEW_TILES = 1 << 30 if split else 0
    try:
        yield
    finally:
        shrink_expand.FEW_TILES = shipped


def repeat(op: Op, inputs: Inputs, iterations: int) -> dict:
    """Runs that had a NaN, runs that differ from the first one, and the first one's relative error."""
    first = run(op, "ours", inputs, True)
    error = relative_error(first, exactly(op, inputs, True), inputs)
    first = [tensor.clone() for tensor in by_parts(inputs, first)]
    nan, mismatches = (torch.zeros((), dtype=torch.int64, device=inputs.x.device) for _ in range(2))
    for _ in range(iterations):  # nothing here waits for the GPU
        found = by_parts(inputs, run(op, "ours", inputs, True))
        nan += torch.stack([tensor.isnan().any() for tensor in found]).any()
        mismatches += torch.stack([(one != two).any() for one, two in zip(found, first)]).any()
    return {"nan": int(nan), "mismatches": int(mismatches), "error": error}


def by_parts(inputs: Inputs, outputs: Outputs) -> list[Tensor]:
    return [*outputs.rows, *(grad[inputs.groups.slots] for grad in outputs.slots)]


# ---- sweep ---------------------------------------------------------------------------------------------------------


def sweep(sizes: Sizes, report: Report) -> None:
    clock, best = clock_of(sizes.device), []
    report.note(ceilings=ceilings(sizes.device, torch.bfloat16, clock))
    for point, rank, (kernel, (op, module, tried)) in product(sizes.sweep, sizes.sweep_ranks, KERNELS.items()):
        inputs = make(op, replace(point, rank=rank), sizes.device, torch.bfloat16)
        floor = floor_ms(*op.cost(inputs, True), report.result["ceilings"])
        exact, shipped, times = exactly(op, inputs, True), shipped_configuration(module, rank), {}
        for configuration in candidates(module, rank, tried)[: sizes.sweep_configurations]:
            if report.time_is_up():
                continue
            words = f"{kernel} {point.K}->{point.widths[0]} rank {rank} {configuration}"
            figures = {"kernel": kernel, "K": point.K, "N": point.widths[0], "rank": rank, "T": point.T,
                       "configuration": configuration, "floor_ms": floor}  # fmt: skip
            with configured(module, configuration), split_if(False):
                try:
                    error = relative_error(run(op, "ours", inputs, True), exact, inputs)
                    ms = side_by_side({"ours": lambda: op.ways["ours"](inputs, True)}, clock, 0.05)["ours"]  # noqa: B023
                except TritonError as failure:  # as in soak; but what is shipped has to run
                    report.add(configuration != shipped, f"{words}: does not run, {type(failure).__name__}", **figures,
                               cannot=str(failure).split("\n")[0])  # fmt: skip
                    continue
            times[ms] = configuration
            report.add(error <= tolerance(op, inputs), f"{words}: {ms:.4f} ms, {100 * floor / ms:.0f} % of floor",
                       **figures, ms=ms, error=error)  # fmt: skip
        if shipped in times.values():
            ms, shipped_ms = min(times), next(ms for ms, c in times.items() if c == shipped)
            best.append({"kernel": kernel, "K": point.K, "N": point.widths[0], "rank": rank, "best": times[ms],
                         "ms": ms, "fraction_of_floor": floor / ms, "shipped": shipped,
                         "shipped_ms": shipped_ms})  # fmt: skip
            report.note(best=best)
    print(f"\n{'kernel':<15}{'K->N':>13}{'rank':>5}{'ms':>9}{'floor':>7}{'ours':>9}  best configuration")
    for row in best:
        print(f"{row['kernel']:<15}{row['K']:>7}->{row['N']:<5}{row['rank']:>4}{row['ms']:>9.4f}"
              f"{100 * row['fraction_of_floor']:>5.0f} %{row['shipped_ms']:>9.4f}  {row['best']}")


# ---- layer ---------------------------------------------------------------------------------------------------------


def layer(sizes: Sizes, report: Report, out: Path) -> None:
    clock, totals = clock_of(sizes.device), {"ours": 0.0, "frozen": 0.0}
    for point in sizes.layer:
        if report.time_is_up():
            continue
        inputs = make(LORA_LINEAR, point, sizes.device, torch.bfloat16)
        error = relative_error(run(LORA_LINEAR, "ours", inputs, True), exactly(LORA_LINEAR, inputs, True), inputs)
        calls = {way: lambda way=way: LORA_LINEAR.ways[way](inputs, True) for way in totals}  # noqa: B023
        times = side_by_side(calls, clock, 0.5)
        for way in totals:
            totals[way] += times[way]
        shape = f"{point.K}->{'+'.join(map(str, point.widths))}"
        report.add(error <= tolerance(LORA_LINEAR, inputs), f"{shape}: with LoRA {times['ours']:.3f} ms, frozen "
                   f"{times['frozen']:.3f} ms, forward+backward", shape=shape, rank=point.rank, T=point.T,
                   users=point.users, error=error, **times)  # fmt: skip
    if not report.result["left_out"]:
        added = 100 * (totals["ours"] / totals["frozen"] - 1)
        report.note(layer_ms=totals, added_percent=added)
        print(f"all-linear LoRA adds {added:.1f} % to the layer's frozen products, forward+backward")

    try:
        from minipeft import bench  # it reads and writes models and tasks
    except ImportError as error:
        report.leave_out(f"methods and quick: {error}; {PACKAGES}")
        return
    options = rehearsal(out) if sizes is TINY else []
    every_method(sizes, report)
    if report.time_is_up(QUICK_S):
        return
    code = bench.main(["quick", "--device", sizes.device, "--out", str(out / "quick"), *options])
    result = json.loads((out / "quick" / "result.json").read_text()) if code == 0 else {}
    report.add(code == 0, f"quick: exit code {code}, {result.get('speedup', 0):.2f}x one by one", code=code,
               quick=result)  # fmt: skip


def every_method(sizes: Sizes, report: Report) -> None:
    """One step of some users by each method on the default base: their gradients on the device and on a CPU, fp32."""
    from methods import base_of, methods_of, runs_of

    base, labels = base_of("default")
    for name, method in methods_of(base).items():
        if report.time_is_up():
            continue
        rows = []
        for device, interpret in (("cpu", False), (sizes.device, backends.INTERPRET)):
            with patched(backends, "INTERPRET", interpret):
                engine, runs = runs_of(base.to(device), labels, method, sizes.method_users)
                engine.train_step(runs)
                rows.append(engine.gradients(runs).cpu())
        error = float((rows[1] - rows[0]).norm() / rows[0].norm())
        text = f"{name}: gradients of {sizes.method_users} users differ from the CPU's by {error:.1e}"
        report.add(error < 1e-4, text, method=name, error=error)


@contextmanager
def patched(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def rehearsal(out: Path) -> list[str]:
    """Options of a tiny quick suite; its base is made tiny, too."""
    from minipeft import bench, default_base
    from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
    from minipeft.tasks.task import save_task

    default_base.STEPS, bench.TRIAL_STEPS, os.environ["MINIPEFT_CACHE"] = 2, 2, str(out / "cache")
    default_base.SHAPE |= dict(width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=16)
    task, _ = make_synthetic(SyntheticConfig(users=2, max_examples=12, test_examples=5, texts=60))
    save_task(task, out / "task")
    return ["--task", str(out / "task")]


# ---- train ---------------------------------------------------------------------------------------------------------


def train(sizes: Sizes, report: Report) -> None:
    try:
        import gpu_models
    except ImportError as error:
        report.leave_out(f"all models: {error}; {PACKAGES}")
        return
    whole = gpu_models.TINY if sizes is TINY else gpu_models.REAL
    items = [lambda name=name: gpu_models.contenders(name, whole, sizes.device, report) for name in whole.contenders]
    for item in (*items, lambda: gpu_models.overhead(whole, sizes.device, report)):
        if not report.time_is_up(MODEL_S):
            item()
            gpu_models.release(sizes.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["check", "soak", "sweep", "layer", "train"])
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S"))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in the interpreter, tiny")
    args = parser.parse_args()
    sizes = TINY if args.rehearse else REAL
    if args.rehearse:
        timing.MATMUL_SIZE["cpu"], timing.COPY_BYTES["cpu"] = 128, 1 << 20
    try:
        assert backend(sizes.device) == "triton"  # compiled on a GPU, interpreted in a rehearsal
    except (ValueError, RuntimeError) as error:
        print(f"gpu.sh: {str(error).splitlines()[0]} Without a GPU: --rehearse", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, args.part, sizes)
    print(f"{args.part}: {report.result['device']}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    if args.part == "layer":
        layer(sizes, report, args.out)
    else:
        {"check": check, "soak": soak, "sweep": sweep, "train": train}[args.part](sizes, report)
    result = report.result
    report.note(finished=True)
    print(f"{args.part}: {len(result['items'])} items, {result['failed']} failed, {result['left_out']} left out, "
          f"{result['seconds']:.0f} s; written: {report.path}")
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
