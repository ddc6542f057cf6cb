"""Does every kernel compile to good code for NVIDIA's sm_80 and sm_90 and AMD's gfx942, on a machine without a GPU?

Good is what the kernels promise. Nothing spills out of registers. Rows stream in pieces of 128 bits. No instruction is
atomic, so no sum depends on who comes first. Registers and shared memory leave room for enough programs at once. And
code depends on widths alone: another batch never waits for a compiler. aot.py finds the numbers; this file sets the
budgets and prints a table.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
TARGETS = ("sm_80", "sm_90", "gfx942")
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may have
WIDE = {"sm_80": 128, "sm_90": 128, "gfx942": 64}  # bits; AMD's 256 threads to our 4 warps get half as much each


@dataclass(frozen=True)
class Budget:
    """Of one kernel, for all its configurations and chips.

    regs:    of a thread. 255 is the most an NVIDIA thread can have; two programs of 128 threads then still fit.
    loads, stores: how many instructions may be narrower than WIDE: scalars, table entries, and tiles so small that a
             thread's share is no 16 bytes. A block of x or of a matrix read number by number would take dozens.
    singles: how many of those loads may be narrower than 32 bits, which no scalar is: a bf16 number read by itself.
    wide_loads, wide_stores: whether the kernel streams rows in, and out.
    """

    regs: int
    loads: int = 9
    stores: int = 1
    singles: int = 0
    wide_loads: bool = True
    wide_stores: bool = True


# "file.kernel", or "file.kernel CONSTANT=value" where a configuration needs a budget of its own.
BUDGETS = {
    "adamw.squares": Budget(regs=40, wide_stores=False),  # writes one number per program
    "adamw.norm": Budget(regs=40, wide_loads=False, wide_stores=False),  # a few sums per user
    "adamw.step": Budget(regs=80, loads=11),  # a user's nine settings
    "bgmv.bgmv": Budget(regs=112, loads=12, stores=3, singles=6, wide_stores=False),  # x and y are one row
    "bottleneck.forward": Budget(regs=200, loads=18, singles=16),  # down_bias, once per program
    "bottleneck.backward": Budget(regs=255, stores=2),
    "ia3.forward": Budget(regs=80),
    "ia3.backward": Budget(regs=152, stores=2),
    "ia3.add_parts": Budget(regs=40, loads=12, wide_loads=False, wide_stores=False),  # 64 columns, a thread for each
    "prompts.forward": Budget(regs=40, loads=12),
    "prompts.backward": Budget(regs=48, loads=12),
    "shrink_expand.shrink": Budget(regs=168, stores=32, wide_stores=False),  # planes, as the matrix unit leaves them
    "shrink_expand.expand": Budget(regs=128),
    "shrink_expand.shrink_expand": Budget(regs=255, loads=16),  # of which 9 look up a block's site
    "wgrad.wgrad": Budget(regs=168, loads=12),
    "wgrad.wgrad R=1": Budget(regs=168, loads=17, singles=6),  # v is one number per row: the gradient of a bias
    "wgrad.wgrad_final": Budget(regs=128),
}


def violations(row: dict, target: str, budget: Budget) -> list[str]:
    """Every promise that a configuration breaks, with the number."""
    if "error" in row:
        return [row["error"]]
    loads, stores = ({int(bits): count for bits, count in row[key].items()} for key in ("loads", "stores"))
    wide = WIDE[target]
    narrow_loads, narrow_stores = (sum(n for bits, n in x.items() if bits < wide) for x in (loads, stores))
    singles = sum(n for bits, n in loads.items() if bits < 32)
    rules = (
        (row["spills"] > 0, f"spills: {row['spills']} bytes of stack or scratch and instructions that use it"),
        (row["atomics"], f"atomic instructions: {' '.join(row['atomics'])}"),
        (row["regs"] > budget.regs, f"{row['regs']} registers, budget {budget.regs}"),
        (row["shared"] > SHARED[target], f"{row['shared']} bytes of shared memory, the chip has {SHARED[target]}"),
        (budget.wide_loads and max(loads, default=0) < wide, f"no load of {wide} bits: {loads}"),
        (budget.wide_stores and max(stores, default=0) < wide, f"no store of {wide} bits: {stores}"),
        (narrow_loads > budget.loads, f"{narrow_loads} loads under {wide} bits, budget {budget.loads}: {loads}"),
        (narrow_stores > budget.stores, f"{narrow_stores} stores under {wide} bits, budget {budget.stores}: {stores}"),
        (singles > budget.singles, f"{singles} loads under 32 bits, budget {budget.singles}: {loads}"),
        (row["varying"], f"compiled again for another batch, because of {', '.join(row['varying'])}"),
    )
    return [message for broken, message in rules if broken]


def budget_key(row: dict) -> str | None:
    """The key of the budget that names the most about this configuration."""
    words = {row["kernel"], *row["launch"].split()}
    return max((key for key in BUDGETS if set(key.split()) <= words), key=lambda key: len(key.split()), default=None)


def compile_for(target: str, *module: Path) -> list[dict]:
    """In a process of its own: here the kernels may be the interpreter's (conftest.py)."""
    run = subprocess.run([sys.executable, AOT, target, *module], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """target -> a row per configuration. All targets at once: two cores share them evenly."""
    version = pytest.importorskip("triton").__version__
    if f"triton=={version}" not in AOT.parents[1].joinpath("constraints.txt").read_text().split():
        pytest.skip(f"budgets are for the Triton that constraints.txt pins; {version} allots registers in its own way")
    with ThreadPoolExecutor() as pool:
        return dict(zip(TARGETS, pool.map(compile_for, TARGETS)))


def cell(row: dict | None) -> str:
    if row is None or "error" in row:
        return f"{'-':>30}"
    wide = [row[key].get("128", 0) for key in ("loads", "stores")]
    loads, stores = (f"{w}+{sum(row[key].values()) - w}" for w, key in zip(wide, ("loads", "stores")))
    mma = "/".join(sorted({name.split(".")[0].removeprefix("v_").split("_")[0] for name in row["mma"]})) or "-"
    return f"{row['regs']:4} {row['shared'] / 1024:4.0f}K {mma:>5} {loads:>6} {stores:>6}"


def test_the_table(rows, capsys):
    """Prints, per chip: registers, shared memory, matrix unit, loads and stores of 128 bits + narrower ones."""
    by_launch = {}
    for target, found in rows.items():
        for row in found:
            words = " ".join(word for word in row["launch"].split() if not word.startswith("stages"))  # AMD has others
            by_launch.setdefault((row["kernel"], words), {})[target] = row
    columns = f"{'regs':>4} {'smem':>5} {'mma':>5} {'loads':>6} {'stores':>6}"
    lines = [f"{'':28}{' | '.join(f'{target:30}' for target in TARGETS)} |",
             f"{'kernel':28}{' | '.join([columns] * len(TARGETS))} | configuration"]  # fmt: skip
    for (kernel, words), cells in sorted(by_launch.items()):
        lines.append(f"{kernel:28}{' | '.join(cell(cells.get(target)) for target in TARGETS)} | {words}")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert len(by_launch) >= len(BUDGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_promises(rows, target):
    broken: dict[str, list[str]] = {}  # what is broken -> by which configurations
    for row in rows[target]:
        key = budget_key(row)
        found = violations(row, target, BUDGETS.get(key, Budget(regs=255)))
        for message in [*found, *(["has no budget in test_aot.py"] if key is None else [])]:
            broken.setdefault(f"{row['kernel']} on {target}: {message}", []).append(row["launch"])
    assert not broken, "\n".join("\n    ".join([message, *launches]) for message, launches in broken.items())


def test_no_budget_is_left_over(rows):
    assert set(BUDGETS) <= {budget_key(row) for row in rows["sm_90"]}


BAD_KERNELS = '''
import torch, triton, triton.language as tl

@triton.jit
def good_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))

@triton.jit
def atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + cols, tl.load(x_ptr + tl.program_id(0) * BLOCK + cols))

@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    tl.store(y_ptr + places, x * tl.sum(y) + y * tl.sum(x))

@triton.jit
def scalar_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK) * width
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))

@triton.jit
def hungry_kernel(x_ptr, y_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    rows, acc = tl.arange(0, BLOCK), tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        places = rows[:, None] * K + k + rows[None, :]
        acc = tl.dot(tl.load(x_ptr + places), tl.trans(tl.load(y_ptr + places)), acc)
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], acc)

@triton.jit
def fussy_kernel(x_ptr, y_ptr, T, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols, cols < T), cols < T)

@triton.jit
def forgotten_kernel(x_ptr):
    pass

def launch_everything():
    x, y = torch.zeros(2**17), torch.zeros(2**17)
    good_kernel[(1,)](x, y, 1024)
    atomic_kernel[(1,)](x, y, 1024)
    spilling_kernel[(1,)](x, y, 128, num_warps=1)
    scalar_kernel[(1,)](x, y, 7, 1024)
    hungry_kernel[(1,)](x.half(), y.half(), 1024, 128, num_warps=8, num_stages=8)
    for T in (64, 65):
        fussy_kernel[(1,)](x, y, T, 1024)
'''


def test_the_gate_can_fail(tmp_path):
    """Each promise is broken once, by a kernel for each, on a chip of each maker."""
    pytest.importorskip("triton")
    path = tmp_path / "bad.py"
    path.write_text(BAD_KERNELS)
    expected = {"atomic": "atomic instructions", "spilling": "spills", "scalar": "no load of",
                "hungry": "shared memory", "fussy": "because of T", "forgotten": "does not launch it"}  # fmt: skip
    with ThreadPoolExecutor() as pool:
        reports = pool.map(compile_for, ("sm_90", "gfx942"), (path, path))
    for target, report in zip(("sm_90", "gfx942"), reports):
        found = {row["kernel"]: violations(row, target, Budget(regs=255)) for row in report}
        assert found.pop("bad.good") == []
        assert set(found) == {f"bad.{name}" for name in expected}
        for name, words in expected.items():
            assert any(words in message for message in found[f"bad.{name}"]), (target, name, found[f"bad.{name}"])
