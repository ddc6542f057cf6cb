"""Would benchmarks/gpu.sh notice? Faults planted in an op, and a GPU that cannot run a configuration."""

import importlib.util
import itertools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from minipeft.kernel_cases import Outputs, Point, make
from minipeft.kernel_ops import ADAMW, OPS, SEGMENT_LORA

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


def report(gpu, tmp_path, part):
    return gpu.Report(tmp_path, part, gpu.TINY)


def out_of_resources(op):
    def ours(inputs, backward):
        raise OutOfResources(300_000, 232_448, "shared memory")

    return replace(op, ways={"ours": ours})


@pytest.mark.parametrize("part", ["soak", "sweep"])
def test_a_configuration_that_cannot_run_is_reported_and_no_failure(gpu, tmp_path, monkeypatch, kernels, part):
    some = {name: (out_of_resources(op), module, tried) for name, (op, module, tried) in gpu.KERNELS.items()}
    monkeypatch.setattr(gpu, "KERNELS", some)
    monkeypatch.setattr(gpu, "ceilings", lambda *_: {"copy_gbps": 1.0, "matmul_tflops": 1.0})
    getattr(gpu, part)(gpu.TINY, report(gpu, tmp_path, part))
    written = json.loads((tmp_path / f"{part}.json").read_text())
    assert written["failed"] == 0 and written["items"]
    assert all("shared memory" in item["cannot"] for item in written["items"])


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
    assert done.returncode == 2 and done.stderr.startswith("usage: benchmarks/gpu.sh [check|soak|sweep|train|all]")
