"""Would benchmarks/gpu.sh notice? Faults planted in an op, and a GPU that cannot run a configuration."""

import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from minipeft import bench
from minipeft.bench_train import CONTENDERS
from minipeft.kernel_cases import Outputs, Point, make
from minipeft.kernel_ops import ADAMW, OPS, SEGMENT_LORA, SEGMENT_LORA_DROPOUT, WGRAD_LATER
from minipeft.models.attention import Packed

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
POINT = Point("tiny", 24, (24,), rank=4, T=60, users=4, distribution="distinct")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def op_with(fault):
    """segment_lora whose outputs fault(inputs, rows, slots) changes in place."""

    def ours(inputs, backward):
        rows, slots = SEGMENT_LORA.ways["ours"](inputs, backward)
        fault(inputs, rows, slots)
        return Outputs(rows, slots)

    return replace(SEGMENT_LORA, ways={"ours": ours})


def unwritten(inputs, rows, slots):
    rows[0][-1] = torch.empty_like(rows[0][-1])


def leaking(inputs, rows, slots):  # a mask that does not hide the next row
    start = int(inputs.segments.starts[1])
    if start < len(inputs.x):
        rows[1][start - 1] += 0.0 * inputs.x[start]


def leaking_gradient(inputs, rows, slots):
    slots[0][inputs.groups.slots] += 0.0 * inputs.x.sum()


def company(inputs, rows, slots):  # bits that depend on how many rows there are
    rows[0] *= 1 + 2e-7 * (len(inputs.x) > 30)


def order(inputs, rows, slots):
    slots[1] *= 1 + 2e-7 * float(inputs.segments.slots[0] % 2)


def inaccurate(inputs, rows, slots):
    rows[1] *= 1 + 1e-6


def test_what_is_right_passes(gpu, kernels):
    inputs = make(SEGMENT_LORA, POINT, "cpu", torch.float32, mixed_ranks=True)
    for backward in (False, True):
        assert all(gpu.findings(SEGMENT_LORA, inputs, backward).values())


@pytest.mark.parametrize("fault, noticed", [
    (unwritten, {"within_tolerance", "as_accurate"}), (leaking, {"isolated"}), (leaking_gradient, {"isolated"}),
    (company, {"alone"}), (order, {"alone", "reordered"}), (inaccurate, {"as_accurate"}),
])  # fmt: skip
def test_a_planted_fault_is_noticed(gpu, kernels, fault, noticed):
    inputs = make(SEGMENT_LORA, POINT, "cpu", torch.float32, mixed_ranks=True)
    found = gpu.findings(op_with(fault), inputs, True)
    assert noticed <= {key for key, good in found.items() if good is False}


def test_runs_that_differ_are_noticed(gpu):
    inputs, runs = make(SEGMENT_LORA, POINT, "cpu", torch.float32), itertools.count()

    def race(inputs, rows, slots):
        slots[0][inputs.groups.slots] += 1e-7 * (next(runs) % 3)

    assert gpu.findings(op_with(race), inputs, True)["again"] is False
    assert gpu.repeat(op_with(race), inputs, 9)["mismatches"] == 6

    def sometimes_nan(inputs, rows, slots):
        rows[0][5] = torch.nan if next(runs) % 2 else 1.0

    found = gpu.repeat(op_with(sometimes_nan), inputs, 8)
    assert found["nan"] == 4 and found["mismatches"] >= 4
    assert gpu.repeat(SEGMENT_LORA, inputs, 5)["mismatches"] == 0


def test_a_step_that_uses_a_gradient_that_is_not_finite_is_noticed(gpu):
    inputs = make(ADAMW, POINT, "cpu", torch.float32)
    assert all(gpu.findings(ADAMW, inputs, False).values())

    def ours(inputs, backward):
        inputs.weights[0][:] += 0.0 * inputs.weights[1][inputs.groups.slots].sum()
        return ADAMW.ways["ours"](inputs, backward)

    assert gpu.findings(replace(ADAMW, ways={"ours": ours}), inputs, False)["isolated"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", [SEGMENT_LORA_DROPOUT, WGRAD_LATER], ids=["dropout", "accumulate and squares"])
def test_variants_pass(gpu, kernels, op, dtype):
    inputs = make(op, POINT, "cpu", dtype, mixed_ranks=True)
    assert all(gpu.findings(op, inputs, True).values())


def undropped(inputs, backward):
    return SEGMENT_LORA_DROPOUT.ways["ours"](replace(inputs, prepared=inputs.prepared * torch.tensor([1, 0])), backward)


def other_mask(inputs, backward):
    return SEGMENT_LORA_DROPOUT.ways["ours"](replace(inputs, prepared=inputs.prepared + torch.tensor([1, 0])), backward)


def stored(inputs, backward):
    return WGRAD_LATER.ways["ours"](replace(inputs, prepared=torch.zeros_like(inputs.prepared)), backward)


def squares_left_out(inputs, backward):
    grad, squares = WGRAD_LATER.ways["ours"](inputs, backward).slots
    return Outputs([], [grad, 0.0 * squares])


@pytest.mark.parametrize("op, fault", [(SEGMENT_LORA_DROPOUT, undropped), (SEGMENT_LORA_DROPOUT, other_mask),
                                       (WGRAD_LATER, stored), (WGRAD_LATER, squares_left_out)])  # fmt: skip
def test_a_fault_in_a_variant_is_noticed(gpu, kernels, op, fault):
    inputs = make(op, POINT, "cpu", torch.float32, mixed_ranks=True)
    found = gpu.findings(replace(op, ways={"ours": fault}), inputs, True)
    assert not found["within_tolerance"] and not found["as_accurate"]


def wider_window(plan, q, k, v, window):
    return PADDED(plan, q, k, v, window + 1)


def sees_others(plan, q, k, v, window):
    return PADDED(plan, q, k, v, window) + 0.0 * k.sum()


def forgets_a_gradient(plan, q, k, v, window):
    return PADDED(plan, q, k.detach() + 0.5 * (k - k.detach()), v, window)


PADDED = Packed.padded


@pytest.mark.parametrize("fault", [None, wider_window, sees_others, forgets_a_gradient])
def test_a_fault_in_attention_is_noticed(gpu, tmp_path, monkeypatch, fault):
    one, case = report(gpu, tmp_path, "check"), gpu.Attention("tiny", 4, 2, 8, (7, 1, 20), window=3)
    if fault is not None:
        monkeypatch.setattr(Packed, "padded", fault)
    gpu.check_attention(case, torch.bfloat16, "cpu", one)
    assert {item["way"]: item["ok"] for item in one.result["items"]} == {"padded": fault is None, "varlen": True}


def test_every_op_and_variant_is_checked_in_every_dtype(gpu, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "check_op", lambda name, point, dtype, *_: seen.append((name, dtype, point.model)))
    monkeypatch.setattr(gpu, "check_attention", lambda *_: None)
    gpu.check(gpu.REAL, report(gpu, tmp_path, "check"))
    for name in (*OPS, "segment_lora, dropout", "wgrad, accumulate and squares"):
        dtypes = {dtype for op, dtype, _ in seen if op == name}
        assert dtypes >= ({torch.bfloat16} if name == "lora_linear" else set(gpu.WIDEST)), name


def report(gpu, tmp_path, part):
    return gpu.Report(tmp_path, part, gpu.TINY)


def out_of_resources(op):
    def ours(inputs, backward):
        raise OutOfResources(300_000, 232_448, "shared memory")

    return replace(op, ways={"ours": ours})


@pytest.mark.parametrize("part", ["soak", "sweep"])
def test_a_configuration_that_cannot_run_is_reported(gpu, tmp_path, monkeypatch, kernels, part):
    some = {name: (out_of_resources(op), module, tried) for name, (op, module, tried) in gpu.KERNELS.items()}
    monkeypatch.setattr(gpu, "KERNELS", some)
    monkeypatch.setattr(gpu, "ceilings", lambda *_: {"copy_gbps": 1.0, "matmul_tflops": 1.0})
    one = report(gpu, tmp_path, part)
    getattr(gpu, part)(gpu.TINY, one)
    written = json.loads((tmp_path / f"{part}.json").read_text())
    assert written["items"] and all("shared memory" in item["cannot"] for item in written["items"])
    assert [item["ok"] for item in written["items"]] == {"soak": [True] * 7, "sweep": [False, True] * 2}[part]
    assert one.exit_code() == {"soak": 3, "sweep": 1}[part]  # none of the runs were made; what is shipped has to run


def test_runs_of_a_configuration_that_cannot_run_are_made_by_others(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "KERNELS", {name: (SEGMENT_LORA, *rest) for name, (_, *rest) in gpu.KERNELS.items()})
    calls = itertools.count()

    def repeat(op, inputs, iterations):
        if next(calls) % 2:  # every other one, the last of the list among them
            raise OutOfResources(300_000, 232_448, "shared memory")
        return {"nan": 0, "mismatches": 0, "error": 0.0}

    monkeypatch.setattr(gpu, "repeat", repeat)
    one = report(gpu, tmp_path, "soak")
    gpu.soak(replace(gpu.TINY, soak_iterations=1000), one)
    assert one.result["iterations"] == one.result["promised"] == 1000 and one.exit_code() == 0


@pytest.mark.parametrize("part", ["check", "soak", "sweep"])
def test_too_little_is_exit_code_3(gpu, tmp_path, monkeypatch, kernels, capsys, part):
    monkeypatch.setattr(gpu, "LIMIT_S", -1)
    monkeypatch.setattr(gpu, "ceilings", lambda *_: {"copy_gbps": 1.0, "matmul_tflops": 1.0})
    monkeypatch.setattr(sys, "argv", ["gpu.py", part, "--rehearse", "--out", str(tmp_path)])
    for name in ("MATMUL_SIZE", "COPY_BYTES"):
        monkeypatch.setattr(gpu.timing, name, dict(getattr(gpu.timing, name)))
    assert gpu.main() == 3
    assert ("left out: 8 of 8 runs" in capsys.readouterr().out) == (part == "soak")


def test_a_failure_is_exit_code_1_whatever_is_left_out(gpu, tmp_path, capsys):
    one = report(gpu, tmp_path, "check")
    assert one.exit_code() == 0
    one.leave_out("something")
    assert one.exit_code() == 3 and json.loads((tmp_path / "check.json").read_text())["left_out"] == 1
    one.add(False, "bad")
    assert one.exit_code() == 1


def gpu_sh(python: Path, *argv) -> subprocess.CompletedProcess:
    """gpu.sh with another interpreter."""
    python.chmod(0o755)
    command = ["env", f"PYTHON={python}", "bash", BENCHMARKS / "gpu.sh", *argv]
    return subprocess.run(command, capture_output=True, text=True)


def python_without(folder, modules):
    """A Python in which importing these modules raises."""
    starter, python = folder / "starter.py", folder / "python"
    starter.write_text(f"""
import runpy, sys
sys.modules |= dict.fromkeys({modules.split()})
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{starter}" "$@"\n')
    return python


@pytest.mark.parametrize("codes, worst", [("0 0 0 0 0", 0), ("0 3 0 0 0", 3), ("1 3 0 0 0", 1), ("3 0 0 0 1", 1)])
def test_all_goes_on_and_ends_with_the_worst_code(tmp_path, codes, worst):
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
        echo "$2" "${{@:3}}"
        declare -A codes
        read -r codes[check] codes[soak] codes[sweep] codes[layer] codes[train] <<< "{codes}"
        exit "${{codes[$2]}}"
    """)
    for out in (["--out", "here"], ["--out=here"]):  # no other --out is added
        done = gpu_sh(python, "all", *out)
        parts = ("check", "soak", "sweep", "layer", "train")
        assert done.stdout.splitlines() == [f"{part} {' '.join(out)}" for part in parts]
        assert done.returncode == worst and not done.stderr
    assert gpu_sh(python, *out).returncode == worst


@pytest.mark.parametrize("part, code", [("soak", 0), ("layer", 3), ("train", 3)])
def test_runs_without_the_packages_that_only_models_and_tasks_need(tmp_path, part, code):
    python = python_without(tmp_path, "safetensors tokenizers tqdm")
    done = gpu_sh(python, part, "--rehearse", f"--out={tmp_path}")
    assert done.returncode == code, done.stderr
    written = json.loads((tmp_path / f"{part}.json").read_text())
    assert written["failed"] == 0 and written["finished"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert len(lines) == (part != "soak") and all("it needs safetensors, tokenizers and tqdm" in one for one in lines)


def test_the_report_is_whole_after_every_item_and_time_is_kept(gpu, tmp_path, monkeypatch):
    one = report(gpu, tmp_path, "check")
    one.add(True, "good", op="x")
    one.add(False, "bad", op="y")
    written = json.loads((tmp_path / "check.json").read_text())
    assert [item["ok"] for item in written["items"]] == [True, False] and written["failed"] == 1
    assert not one.time_is_up()
    monkeypatch.setattr(gpu, "LIMIT_S", -1)
    assert one.time_is_up() and one.result["left_out"] == 1
    gpu.check(gpu.TINY, one)
    assert len(one.result["items"]) == 2 and one.result["left_out"] > len(OPS)


def test_configurations_are_overridden_and_restored(gpu):
    module = gpu.shrink_expand
    shipped = module.configuration(16, 2)
    with gpu.configured(module, {"BLOCK_T": 16}):
        assert module.configuration(64, 2) == {"BLOCK_T": 16}
    assert module.configuration(16, 2) == shipped


def test_an_unknown_part_is_a_usage_line():
    done = subprocess.run(["bash", BENCHMARKS / "gpu.sh", "cheque"], capture_output=True, text=True)
    usage = "usage: benchmarks/gpu.sh [check|soak|sweep|layer|train|all]"
    assert done.returncode == 2 and done.stderr.startswith(usage)


def test_whole_models_are_measured_and_compared(tmp_path):
    for peer in ("transformers", "peft"):
        pytest.importorskip(peer)
    done = subprocess.run(["env", f"PYTHON={sys.executable}", "bash", BENCHMARKS / "gpu.sh", "train", "--rehearse",
                           f"--out={tmp_path}"], capture_output=True, text=True)  # fmt: skip
    written = json.loads((tmp_path / "train.json").read_text())
    assert done.returncode == 0 == written["failed"] and written["finished"], done.stdout + done.stderr
    *contenders, overhead = written["items"]
    for item in contenders:
        assert item["dtype"] == "bfloat16" and item["users"] == 2
        assert {name: on["steps"] for name, on in item["timed"].items()} == dict.fromkeys(CONTENDERS, 2)
        assert max(item["max_loss_difference"], item["max_published_loss_difference"]) < 0.05
        assert all(item[f"{name}_users_per_s"] > 0 for name in CONTENDERS)
    assert overhead["ours_ms"] > 0 < overhead["frozen_ms"] and not overhead["recompute"]


def test_where_memory_does_not_hold_activations_it_is_said_and_both_compute_them_again(gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_models

    tried = []

    def timed(ours, frozen, device, timed_s):
        ours()
        frozen()
        tried.append(None)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ours_ms": 2.0, "frozen_ms": 1.0}

    monkeypatch.setattr(gpu_models, "timed", timed)
    one = report(gpu, tmp_path, "train")
    gpu_models.overhead(gpu_models.TINY, "cpu", one)
    first, second = one.result["items"]
    assert first["cannot"] == "out of memory" and not first["recompute"] and second["recompute"]
    assert second["ok"] and second["added_percent"] == 100.0


def test_a_layer_begins_nothing_once_the_time_is_up(gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(gpu, "LIMIT_S", -1)
    monkeypatch.setattr(gpu, "LORA_LINEAR", None)
    monkeypatch.setattr(bench, "main", None)
    one = report(gpu, tmp_path, "layer")
    gpu.layer(replace(gpu.TINY), one, tmp_path)
    assert not one.result["items"] and one.exit_code() == 3 and "added_percent" not in one.result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_triton_it_says_so_in_one_line(tmp_path):
    done = gpu_sh(python_without(tmp_path, ""), "check", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "this PyTorch sees no GPU" in done.stderr and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1
    done = gpu_sh(python_without(tmp_path, "triton"), "check", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "triton is not installed" in done.stderr and len(done.stderr.splitlines()) == 1
