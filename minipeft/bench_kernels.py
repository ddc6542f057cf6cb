"""python -m minipeft.bench kernels: every op against the roofline and against what people run today.

For each op and batch: milliseconds, GB/s of the bytes that no version can avoid, and which part of the time is floor,

    floor = max(bytes / copy bandwidth, FLOPs / matrix product rate),         both measured first, in the same process

beside baselines with the same outputs, all taking turns. Before anything is timed, outputs are filled with NaN and then
compared with the definition in fp64. On a GPU the kernels run, in bf16; on a CPU the PyTorch path, in fp32.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from minipeft.errors import InputError
from minipeft.kernel_cases import (
    DISTRIBUTIONS,
    Inputs,
    Op,
    Point,
    exactly,
    lengths_of,
    make,
    relative_error,
    run,
    tolerance,
)
from minipeft.kernel_ops import OPS
from minipeft.machine import cpu_name, versions
from minipeft.profiling import profiled, region
from minipeft.timing import Clock, ceilings, clock_of, floor_ms, side_by_side
from minipeft_kernels.backend import backend
from minipeft_kernels.baselines import DoesNotApply
from minipeft_kernels.segments import TILE

BASELINES = ("loop", "gather_bmm", "padded_bmm", "grouped_mm")
OTHER_RANK = {"bottleneck": 64, "prompts": 20}  # F and V instead of a LoRA's rank
AXES = {  # what is varied, op by op, one thing at a time
    "segment_lora": ("distribution", "users", "rank", "T", "shape"), "lora_linear": ("distribution", "shape", "users"),
    "shrink_expand": ("distribution", "users", "rank", "T", "shape"),
    "wgrad": ("distribution", "users", "rank", "T", "shape"),
    "adamw": ("users",), "bgmv": ("users", "shape"), "bottleneck": ("distribution",),
    "ia3": ("distribution",), "shift": ("distribution",), "segment_matmul": ("distribution", "users"),
    "prompts": ("distribution",),
}  # fmt: skip
FLAN_T5, QWEN, LLAMA = "flan-t5-base", "qwen2.5-1.5b", "llama-3.1-8b"


@dataclass(frozen=True)
class Grid:
    """The batches to choose from. Everything but `base` is what else one axis may be.

    budget_s: how long one comparison may take beyond its fewest turns. limit_s: no batch starts later, unless --full.
    most_bytes: of one tensor of a baseline; where it would need more, it does not apply.
    """

    base: Point
    shapes: tuple[tuple[str, int, tuple[int, ...]], ...]
    users: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    dtype: torch.dtype
    budget_s: float
    limit_s: float
    most_bytes: int

    def axis(self, name: str) -> list[dict]:
        """What replaces what in a point."""
        return {
            "distribution": [{"distribution": distribution} for distribution in DISTRIBUTIONS],
            "users": [{"users": users} for users in self.users],
            "rank": [{"rank": rank} for rank in self.ranks],
            "T": [{"T": T} for T in self.rows],
            "shape": [{"model": model, "K": K, "widths": widths} for model, K, widths in self.shapes],
        }[name]

    def points(self, name: str, full: bool) -> Iterator[Point]:
        """The batches of an op: the base and one thing changed at a time, or all combinations; each batch once."""
        base = replace(self.base, rank=OTHER_RANK.get(name, self.base.rank))
        axes = [self.axis(axis) for axis in AXES[name]]
        if full:
            changes = [{key: value for part in parts for key, value in part.items()} for parts in product(*axes)]
        else:
            changes = [{}] + [change for axis in axes for change in axis]
        seen = set()
        for change in changes:
            point = replace(base, **change)
            if name in ("adamw", "bgmv"):  # a row per user
                point = replace(point, T=point.users)
            if name in ("bottleneck", "ia3", "shift", "prompts"):  # K in, K out
                point = replace(point, widths=(point.K,))
            if point.distribution == "identical":
                point = replace(point, users=1)
            joint = name == "lora_linear"
            fits = point.T >= point.users * (TILE if joint else 1) and (joint or len(point.widths) == 1)
            if fits and point not in seen:
                seen.add(point)
                yield point


CPU = Grid(
    base=Point(FLAN_T5, 768, (768,), rank=8, T=2048, users=128),
    shapes=((FLAN_T5, 768, (768,)), (FLAN_T5, 768, (2048,)), (QWEN, 1536, (1536, 256, 256))),
    users=(16, 128, 1024), ranks=(8, 32), rows=(2048,),
    dtype=torch.float32, budget_s=0.1, limit_s=110, most_bytes=256 << 20,
)  # fmt: skip
GPU = Grid(
    base=Point(LLAMA, 4096, (4096,), rank=16, T=16384, users=64),
    shapes=(
        (FLAN_T5, 768, (768,)), (FLAN_T5, 768, (2048,)), (FLAN_T5, 2048, (768,)),
        (QWEN, 1536, (1536,)), (QWEN, 1536, (1536, 256, 256)), (QWEN, 1536, (8960,)), (QWEN, 8960, (1536,)),
        (LLAMA, 4096, (4096,)), (LLAMA, 4096, (4096, 1024, 1024)), (LLAMA, 4096, (14336,)), (LLAMA, 14336, (4096,)),
    ),
    users=(4, 16, 64, 256, 1024), ranks=(8, 16, 64), rows=(2048, 16384, 65536),
    dtype=torch.bfloat16, budget_s=0.3, limit_s=400, most_bytes=8 << 30,
)  # fmt: skip


class Wrong(AssertionError):
    """An output that differs from the definition by more than rounding."""


def run_kernels(args: argparse.Namespace, finished: list[str]) -> dict:
    """The whole suite. Appends to `finished` each batch whose figures are in result.json."""
    began = time.perf_counter()
    path = backend(args.device)
    grid, ops, clock = GPU if on_gpu(args) else CPU, chosen_ops(args.op, path), clock_of(args.device)
    result = {
        "suite": "kernels", "device": device_name(args), "backend": path, "seed": args.seed, "full": args.full,
        "versions": versions(args.device, ("numpy", "triton")),
        "ceilings": ceilings(args.device, grid.dtype, clock), "runs": [], "left_out": [],
    }  # fmt: skip
    print(heading(result, grid), flush=True)
    for name, point in plan(grid, ops, args.full):
        for backward in ops[name].passes:
            if not args.full and time.perf_counter() - began > grid.limit_s:
                result["left_out"].append(title(name, point, backward))
                continue
            measured = measure(name, point, backward, grid, args, clock, result["ceilings"])
            print(line(measured), flush=True)
            result["runs"].append(measured)
            write(args.out, result)
            finished.append(title(name, point, backward))
    if result["left_out"]:
        print(f"left out, as {grid.limit_s:.0f} s were over: {len(result['left_out'])} batches, listed in result.json; "
              "--full measures them")
    if args.profile:
        profile_ops(grid, ops, args)
    result["seconds"] = time.perf_counter() - began
    write(args.out, result)
    print(f"{result['seconds']:.0f} s in all; written: {args.out}/result.json")
    print(json.dumps(result))
    return result


def plan(grid: Grid, ops: dict[str, Op], full: bool) -> list[tuple[str, Point]]:
    """What is measured, in order: every op's first batch, then the rest, op by op."""
    points = {name: list(grid.points(name, full)) for name in ops}
    firsts = [(name, first) for name, (first, *_) in points.items()]
    return firsts + [(name, point) for name, (_, *rest) in points.items() for point in rest]


def measure(
    name: str, point: Point, backward: bool, grid: Grid, args: argparse.Namespace, clock: Clock, ceilings: dict
) -> dict:
    """Check every way to compute one batch, then time them side by side."""
    op = OPS[name]
    inputs = make(op, point, args.device, grid.dtype, args.seed)
    exact = exactly(op, inputs, backward)
    calls, errors, notes = {}, {}, {}
    for way, function in op.ways.items():
        try:
            check_size(way, inputs, grid.most_bytes)
            outputs = run(op, way, inputs, backward)
            if way != "frozen":  # which leaves the adapters out, on purpose
                errors[way] = relative_error(outputs, exact, inputs)
                if not errors[way] <= tolerance(op, inputs, way):
                    raise Wrong(f"{title(name, point, backward)}: {way} has a relative error of {errors[way]:.1e}")
        except (DoesNotApply, Wrong, RuntimeError) as error:  # a library may not take what it is given
            if way == "ours":
                raise
            notes[way] = str(error).split("\n")[0]
            continue
        calls[way] = lambda function=function: function(inputs, backward)
    del exact, outputs
    times = side_by_side(calls, clock, grid.budget_s)
    ms, (num_bytes, flops) = times["ours"], op.cost(inputs, backward)
    floor, lengths = floor_ms(num_bytes, flops, ceilings), np.array(inputs.groups.lengths)
    return {
        "op": name, "timed": "forward+backward" if backward else "forward",
        "backend": backend(args.device), "dtype": str(inputs.weights[0].dtype).removeprefix("torch."),
        "model": point.model,
        "T": len(inputs.x), "users": len(lengths), "resident": len(inputs.bank), "distribution": point.distribution,
        "lengths": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "rank": point.rank if op.size == "rank" else None, "size": op.size and {op.size: point.rank},
        "K": point.K, "N": sum(point.widths), "widths": point.widths,
        "ms": ms, "floor_ms": floor, "fraction_of_floor": floor / ms, "bytes": num_bytes, "flops": flops,
        "gbps": num_bytes / ms / 1e6, "tflops": flops / ms / 1e9,
        "baselines": {way: times.get(way) for way in BASELINES} | {way: times[way] for way in times if way not in
                                                                   ("ours", "frozen", *BASELINES)},
        "frozen_ms": times.get("frozen"), "added": times["ours"] / times["frozen"] - 1 if "frozen" in times else None,
        "errors": errors, "notes": notes,
    }  # fmt: skip


def check_size(way: str, inputs: Inputs, most_bytes: int) -> None:
    """Raises DoesNotApply where a baseline would make one tensor of more than most_bytes."""
    point, lengths = inputs.point, inputs.groups.lengths
    widest = max(point.K, *point.widths)
    numbers = {"gather_bmm": len(inputs.x) * point.rank * widest, "padded_bmm": len(lengths) * max(lengths) * widest}
    num_bytes = numbers.get(way, 0) * inputs.x.itemsize
    if num_bytes > most_bytes:
        raise DoesNotApply(f"{way}: one tensor would be {num_bytes / 2**30:.1f} GB")


def profile_ops(grid: Grid, ops: dict[str, Op], args: argparse.Namespace) -> None:
    """The first batch of each op again, ours only, under the profiler."""
    cases = {name: make(op, next(grid.points(name, False)), args.device, grid.dtype, args.seed)
             for name, op in ops.items()}  # fmt: skip
    with profiled(args.out):
        for name, inputs in cases.items():
            with region(name):
                ops[name].ways["ours"](inputs, ops[name].passes[-1])


# ---- Options -------------------------------------------------------------------------------------------------------


def on_gpu(args: argparse.Namespace) -> bool:
    return torch.device(args.device).type == "cuda"


def chosen_ops(names: list[str] | None, path: str) -> dict[str, Op]:
    """The ops asked for; all that the backend has if none is."""
    for name in names or ():
        if name not in OPS:
            raise InputError(f"--op {name}: there is no such op; choose from {', '.join(OPS)}")
        if OPS[name].launcher and path == "torch":
            raise InputError(f"--op {name}: measured by itself where kernels run, on a GPU; on a CPU take segment_lora")
    return {name: op for name, op in OPS.items() if (name in names if names else path != "torch" or not op.launcher)}


def write(out: Path, result: dict) -> None:
    """result.json as it stands, whole at any moment."""
    (out / "result.json.part").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(out / "result.json.part", out / "result.json")


# ---- What is shown -------------------------------------------------------------------------------------------------


def device_name(args: argparse.Namespace) -> str:
    if on_gpu(args):
        return torch.cuda.get_device_name(args.device)
    return f"CPU ({cpu_name()}, {torch.get_num_threads()} threads)"


def title(name: str, point: Point, backward: bool) -> str:
    passes = "forward+backward" if backward else "forward"
    return (f"{name} {passes} {point.model} {point.K}->{'+'.join(map(str, point.widths))} T {point.T} "
            f"{point.users} users {point.distribution} rank {point.rank}")


def heading(result: dict, grid: Grid) -> str:
    what = {"torch": "the CPU path, plain PyTorch: no kernel runs here, and these figures say nothing about a GPU",
            "triton": "the Triton kernels"}[result["backend"]]
    best = result["ceilings"]
    lines = [
        f"{result['device']}, torch {result['versions']['torch']}, {str(grid.dtype).removeprefix('torch.')}. "
        f"This measures {what}.",
        f"ceilings, measured just now: copy {best['copy_gbps']:.0f} GB/s (read + written), "
        f"matrix product {best['matmul_tflops']:.2f} TFLOP/s",
        f"rows of {grid.base.users} users, {grid.base.T} in all:",
    ]
    for distribution in DISTRIBUTIONS:
        lengths, resident = lengths_of(replace(grid.base, distribution=distribution), result["seed"])
        lines.append(f"  {distribution:<11}{len(lengths)} of {resident} resident, {min(lengths)} to {max(lengths)} "
                     f"rows, median {np.median(lengths):.0f}")
    return "\n".join([
        *lines,
        "floor: max(bytes / copy, FLOPs / product), each byte once. Baselines: how many times as long as ours.",
        "",
        f"{'op':<15}{'':<9}{'K->N':>17}{'T':>7}{'users':>6} {'rows':<11}{'rank':>4}{'ms':>10}{'GB/s':>7}{'floor':>7}"
        f"{'loop':>8}{'gather':>8}{'padded':>8}{'grouped':>8}{'base+':>8}",
    ])  # fmt: skip


def line(run: dict) -> str:
    """One row of the table."""
    size = next(iter((run["size"] or {"": ""}).values()))
    others = {way: run["baselines"][way] for way in BASELINES}
    others["gather_bmm"] = others["gather_bmm"] or run["baselines"].get("gather")
    times = "".join(f"{'-':>8}" if ms is None else f"{ms / run['ms']:>7.1f}x" for ms in others.values())
    added = "" if run["added"] is None else f"{100 * run['added']:.0f} %"
    passes = {"forward": "forward", "forward+backward": "fwd+bwd"}[run["timed"]]
    shape = f"{run['K']}->{'+'.join(map(str, run['widths']))}"
    return (f"{run['op']:<15}{passes:<9}{shape:>17}{run['T']:>7}{run['users']:>6} {run['distribution']:<11}{size:>4}"
            f"{run['ms']:>10.3f}{run['gbps']:>7.0f}{100 * run['fraction_of_floor']:>5.0f} %{times}{added:>8}")
