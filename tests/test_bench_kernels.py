"""Does `python -m minipeft.bench kernels` check, time and report what it says, floors and baselines included?"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minipeft import bench, bench_kernels, default_base, timing
from minipeft.kernel_cases import DISTRIBUTIONS, Outputs, Point, lengths_of, make, relative_error
from minipeft.kernel_cases import run as run_way
from minipeft.kernel_ops import OPS, SEGMENT_LORA
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import save_task
from minipeft_kernels.baselines import DoesNotApply

KEYS = """op backend dtype T users distribution rank K N ms floor_ms fraction_of_floor
baselines.loop baselines.gather_bmm baselines.padded_bmm baselines.grouped_mm""".split()
K, N, R, T, U = 32, 48, 4, 64, 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small batches, few turns, small ceilings."""
    base = Point("tiny", K, (N,), rank=R, T=T, users=U)
    monkeypatch.setattr(bench_kernels, "CPU", replace(
        bench_kernels.CPU, base=base, shapes=(("tiny", K, (N,)), ("tiny", K, (32, 16))), users=(2, U, 2 * T),
        ranks=(R, 8), rows=(T, 32), budget_s=0.0,
    ))  # fmt: skip
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(timing, "CEILING_TURNS", 2)
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(timing, "MATMUL_SIZE", {"cpu": 128})


def run(*argv) -> int:
    return bench.main(["kernels", *map(str, argv)])


def result_of(capsys, folder) -> dict:
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((folder / "result.json").read_text())
    return printed


def at(run: dict, key: str):
    for part in key.split("."):
        run = run[part]
    return run


def test_every_op_is_measured_and_every_key_is_there(tmp_path, capsys):
    assert run("--out", tmp_path) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert "CPU" in result["device"] and result["backend"] == "torch" and "This measures the CPU path" in output
    assert result["ceilings"]["copy_gbps"] > 0 and result["ceilings"]["matmul_tflops"] > 0
    assert {one["op"] for one in result["runs"]} == {name for name, op in OPS.items() if not op.launcher}
    assert not result["left_out"]
    for one in result["runs"]:
        for key in KEYS:
            at(one, key)
        assert one["backend"] == "torch" and one["dtype"] == "float32" and one["ms"] > 0 and one["floor_ms"] > 0
        assert one["fraction_of_floor"] == pytest.approx(one["floor_ms"] / one["ms"])
        assert all(error < 1e-5 for error in one["errors"].values())
        assert one["lengths"]["max"] * one["users"] >= one["T"]
    lora = [one for one in result["runs"] if one["op"] == "segment_lora"]
    assert {one["distribution"] for one in lora} == set(DISTRIBUTIONS)
    assert {one["timed"] for one in lora} == {"forward", "forward+backward"}
    assert {(one["T"], one["users"], one["rank"]) for one in lora} >= {(T, U, R), (T, 2, R), (T, U, 8), (32, U, R)}
    assert len({json.dumps([one[key] for key in ("op", "timed", "widths", "T", "users", "rank", "distribution")])
                for one in result["runs"]}) == len(result["runs"])  # nothing twice


def test_baselines_are_null_where_they_do_not_apply(tmp_path, capsys):
    run("--out", tmp_path, "--op", "segment_lora", "adamw", "ia3", "lora_linear", "bottleneck",
        "shift", "segment_matmul")  # fmt: skip
    for one in result_of(capsys, tmp_path)["runs"]:
        applying = {name for name, ms in one["baselines"].items() if ms is not None}
        assert applying == {"segment_lora": {"loop", "gather_bmm", "padded_bmm", "grouped_mm"}, "adamw": {"loop"},
                            "lora_linear": {"loop", "gather_bmm", "padded_bmm", "grouped_mm"},
                            "bottleneck": {"loop", "padded_bmm", "grouped_mm"},
                            "segment_matmul": {"loop", "gather_bmm", "padded_bmm", "grouped_mm"},
                            "ia3": {"loop", "gather"}, "shift": {"loop", "gather"}}[one["op"]]  # fmt: skip
        assert ("gather_bmm" in one["notes"]) == (one["op"] == "bottleneck")
        assert (one["frozen_ms"] is None) == (one["op"] != "lora_linear")
        if one["op"] == "lora_linear":
            assert one["added"] == pytest.approx(one["ms"] / one["frozen_ms"] - 1)


def test_floors_are_what_a_hand_computes(tmp_path, capsys):
    run("--out", tmp_path, "--op", "segment_lora")
    result = result_of(capsys, tmp_path)
    forward, both = result["runs"][:2]
    x, y, v, grad_y, weights = 64 * 32 * 4, 64 * 48 * 4, 64 * 4 * 4, 64 * 48 * 4, 4 * 4 * (32 + 48) * 4
    copy, product = result["ceilings"]["copy_gbps"] * 1e6, result["ceilings"]["matmul_tflops"] * 1e9  # per ms
    for one, num_bytes, flops in (
        (forward, x + y + v + weights, 2 * 64 * 4 * 80),
        (both, (x + y + v + weights) + (grad_y + x + x + v + weights + weights), 6 * 64 * 4 * 80),
    ):
        assert (one["T"], one["users"], one["K"], one["N"], one["rank"]) == (64, 4, 32, 48, 4)
        assert one["bytes"] == num_bytes and one["flops"] == flops
        assert one["floor_ms"] == pytest.approx(max(num_bytes / copy, flops / product))
        assert one["gbps"] == pytest.approx(num_bytes / one["ms"] / 1e6)


@pytest.mark.parametrize("name", OPS)
def test_every_op_counts_at_least_its_inputs_and_outputs(name, kernels):
    """Counted bytes are those of the tensors that a run is given and returns, and of little else."""
    op, point = OPS[name], Point("tiny", K, (K,), rank=R, T=128, users=2)
    inputs = make(op, point, "cpu", torch.float32)
    for backward in op.passes:
        rows, slots = run_way(op, "ours", inputs, backward)
        tensors = [*rows, *slots, *inputs.frozen, *(inputs.grad_ys if backward else ())]
        tensors += [inputs.x] * (name != "adamw") + [*inputs.weights] * (name != "wgrad")  # all others read both
        at_least = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())  # shift's grad_x is grad_y
        assert 0.9 * at_least <= op.cost(inputs, backward)[0] <= 1.8 * at_least


def test_lengths_of_every_distribution():
    point = Point("tiny", K, (N,), rank=R, T=1000, users=20)
    lengths = {name: lengths_of(replace(point, distribution=name), seed=1) for name in DISTRIBUTIONS}
    for name, (rows, resident) in lengths.items():
        assert sum(rows) == 1000 and min(rows) >= 1
        assert len(rows) == (1 if name == "identical" else 20)
        assert resident == (16 * 20 if name == "absent" else len(rows))
        assert lengths_of(replace(point, distribution=name), seed=1) == (rows, resident)
    assert set(lengths["uniform"][0]) == {50} and sorted(lengths["giant_tiny"][0])[-2:] == [1, 981]
    assert 20 < min(lengths["distinct"][0]) < 40 and max(lengths["zipf"][0]) > 250
    assert lengths["distinct"] != lengths_of(replace(point, distribution="distinct"), seed=2)


def test_kernels_by_themselves(tmp_path, capsys, kernels):
    """In the interpreter, what a GPU would run: shrink_expand and wgrad too."""
    assert run("--out", tmp_path, "--op", "wgrad", "shrink_expand", "--device", kernels) == 0
    result = result_of(capsys, tmp_path)
    assert result["backend"] == "triton" and {one["op"] for one in result["runs"]} == {"wgrad", "shrink_expand"}
    for one in result["runs"]:
        missing = {name for name in bench_kernels.BASELINES if one["baselines"][name] is None}
        assert missing == set(one["notes"]) == ({"gather_bmm"} if one["op"] == "wgrad" else set())


def test_one_row_each_has_every_baseline_up_to_the_users_that_it_takes():
    op = OPS["bgmv"]
    for users, missing in ((40, set()), (1024, {"grouped_mm"})):
        inputs, without = make(op, Point("tiny", K, (N,), R, users, users), "cpu", torch.float32), set()
        for way in bench_kernels.BASELINES:
            try:
                assert relative_error(run_way(op, way, inputs, False), op.define(inputs, False), inputs) < 1e-5
            except DoesNotApply:
                without.add(way)
        assert without == missing


def test_lora_beside_its_frozen_product_is_measured_however_rows_are_shared_out():
    points = list(bench_kernels.CPU.points("lora_linear", False))
    assert {point.distribution for point in points} == set(DISTRIBUTIONS)


def test_a_baseline_owes_the_accuracy_of_its_own_dtype():
    op = OPS["wgrad"]
    inputs = SimpleNamespace(x=torch.zeros(1, dtype=torch.bfloat16))
    assert bench_kernels.tolerance(op, inputs) < 2e-5 < bench_kernels.tolerance(op, inputs, "grouped_mm")


def test_profile_writes_a_trace_and_a_table(tmp_path, capsys):
    assert run("--out", tmp_path, "--op", "bgmv", "ia3", "--profile") == 0
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"bgmv", "ia3"} <= names
    assert "aten::" in (tmp_path / "kernels.txt").read_text()
    result_of(capsys, tmp_path)


def test_the_quick_suite_has_profiles_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    shape = default_base.SHAPE | dict(width=32, num_layers=1, mlp_width=32, head_dim=8)
    for name, value in (("STEPS", 2), ("SHAPE", shape)):
        monkeypatch.setattr(default_base, name, value)
    monkeypatch.setattr(bench, "TRIAL_STEPS", 4)
    task, _ = make_synthetic(SyntheticConfig(users=2, max_examples=24, test_examples=5, texts=60))
    save_task(task, tmp_path / "task")
    assert bench.main(["--task", str(tmp_path / "task"), "--out", str(tmp_path), "--profile"]) == 0
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"some of the trial, profiled", "_TorchLinearBackward"} <= names
    assert "aten::" in (tmp_path / "kernels.txt").read_text()
    result_of(capsys, tmp_path)


# ---- What must not pass --------------------------------------------------------------------------------------------


def broken(way: str, damage):
    """segment_lora with damaged outputs."""
    def wrong(inputs, backward):
        rows, slots = SEGMENT_LORA.ways[way](inputs, backward)
        return Outputs([damage(y) for y in rows], slots)

    return replace(SEGMENT_LORA, ways=SEGMENT_LORA.ways | {way: wrong})


@pytest.mark.parametrize("damage", [lambda y: 1.001 * y, lambda y: y.index_fill(0, torch.tensor([3]), torch.nan)])
def test_a_wrong_op_is_not_timed(tmp_path, monkeypatch, damage):
    monkeypatch.setitem(bench_kernels.OPS, "segment_lora", broken("ours", damage))
    with pytest.raises(bench_kernels.Wrong, match=r"segment_lora forward tiny .* ours has a relative error of"):
        run("--out", tmp_path, "--op", "segment_lora")


def test_a_wrong_baseline_is_null_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_kernels.OPS, "segment_lora", broken("grouped_mm", torch.zeros_like))
    run("--out", tmp_path, "--op", "segment_lora")
    for one in result_of(capsys, tmp_path)["runs"]:
        assert one["baselines"]["grouped_mm"] is None and one["baselines"]["loop"] is not None
        assert "grouped_mm has a relative error" in one["notes"]["grouped_mm"]


def test_numbers_an_op_forgets_to_write_are_seen():
    inputs = make(SEGMENT_LORA, Point("tiny", K, (N,), rank=R, T=T, users=U), "cpu", torch.float32)

    def forgetful(inputs, backward):
        y = torch.empty(T, N)
        y[1:] = SEGMENT_LORA.define(inputs, backward).rows[0][1:]
        return Outputs([y], [])

    op = replace(SEGMENT_LORA, ways={"ours": forgetful})
    error = relative_error(run_way(op, "ours", inputs, False), SEGMENT_LORA.define(inputs, False), inputs)
    assert error != error


def test_a_baseline_that_would_be_too_big_is_left_out():
    inputs = make(SEGMENT_LORA, Point("tiny", K, (N,), R, 1000, 100, "giant_tiny"), "cpu", torch.float32)
    bench_kernels.check_size("loop", inputs, 1)
    bench_kernels.check_size("padded_bmm", inputs, 100 * 901 * N * 4)
    with pytest.raises(DoesNotApply, match="padded_bmm: one tensor would be"):
        bench_kernels.check_size("padded_bmm", inputs, 100 * 901 * N * 4 - 1)


def test_what_time_does_not_allow_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "CPU", replace(bench_kernels.CPU, limit_s=0))
    assert run("--out", tmp_path, "--op", "ia3") == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert not result["runs"] and len(result["left_out"]) == len(DISTRIBUTIONS)
    assert f"left out, as 0 s were over: {len(DISTRIBUTIONS)} batches" in output


def test_full_is_every_combination():
    grid = bench_kernels.CPU
    assert len(list(grid.points("segment_lora", full=True))) == (5 * 2 + 1) * 2 * 2  # one user only in "identical"
    assert len(list(grid.points("lora_linear", full=True))) == (5 * 2 + 1) * 2  # distributions, users, shapes
    assert next(grid.points("segment_lora", full=False)) == grid.base


def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    measure, calls = bench_kernels.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(bench_kernels, "measure", interrupted)
    assert run("--out", tmp_path, "--op", "ia3") == 130
    assert f"interrupted. 2 batches were measured; their figures are in {tmp_path}" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "result.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("argv, named", [
    (["--op", "segment_lore"], "--op segment_lore: there is no such op; choose from segment_lora,"),
    (["--op", "wgrad"], "--op wgrad: measured by itself where kernels run"),
    (["--device", "cuda"], "--device cuda: "), (["--device", "nonsense"], "--device nonsense: "),
    (["--users", "0"], "--users is not an option of suite kernels"),
    (["--task", "x"], "--task is not an option of suite kernels"),
    (["--seed", "x"], "--seed"), (["--op"], "--op"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, capsys, argv, named):
    assert run("--out", tmp_path, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("minipeft.bench: ") and named in error


def test_options_of_the_kernels_suite_are_none_of_quick(capsys):
    assert bench.main(["quick", "--full"]) == 2
    assert capsys.readouterr().err.startswith("minipeft.bench: --full is not an option of suite quick")


# ---- Clocks --------------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_slow_ones_fewer():
    order, taken = [], {"a": 10.0, "slow": 1000.0, "b": 30.0}

    def clock(call):
        call()
        return taken[order[-1]]

    calls = {name: lambda name=name: order.append(name) for name in taken}
    assert timing.side_by_side(calls, clock, budget_s=4.2) == taken
    assert order == ["a", "slow", "b"] * 3 + ["a", "b"]  # 4 turns fit, slow calls get 3


def test_the_gpu_clock_flushes_the_cache_before_each_call(monkeypatch):
    """With stand-ins for CUDA's events: what is enqueued, and in which order."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 0.2

    class Buffer(SimpleNamespace):
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Buffer())
    clock = timing.clock_of("cuda")
    log.clear()
    assert clock(lambda: log.append("call")) == 0.2
    assert log == ["flush"] * 3 + ["event", "call", "event", "wait"]  # 3 * 0.2 ms give Python a lead of 0.5 ms


def test_ceilings_count_bytes_read_and_written_and_take_the_fastest():
    taken = iter([0.5, 0.25, 4.0, 2.0])  # ms of two copies of 1 MB, then of two products of 128 x 128
    found = timing.ceilings("cpu", torch.float32, lambda call: (call(), next(taken))[1])
    assert found["copy_gbps"] == pytest.approx(2 * (1 << 20) / 0.25e-3 / 1e9)
    assert found["matmul_tflops"] == pytest.approx(2 * 128**3 / 2e-3 / 1e12)
