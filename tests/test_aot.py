"""Does every kernel compile to good code for NVIDIA's sm_80 and sm_90 and AMD's gfx942, on a machine without a GPU?

Good is what the kernels promise. Nothing spills out of registers. Rows stream in pieces of 128 bits. No instruction is
atomic, so no sum depends on who comes first. Products of bf16 run on the matrix unit, those of fp32 at full precision.
Registers and shared memory leave room for enough programs at once. And code depends on widths alone: another batch
never waits for a compiler. aot.py finds the numbers; this file sets the budgets and prints a table.

All that holds where it was compiled: every branch of every `configuration` function, in bf16 and in fp32, for as many
rank rows as kernels take; fp16, which training does not choose, once.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from minipeft_kernels import bottleneck, shrink_expand, wgrad
from minipeft_kernels.blocks import MOST_RANKS
from minipeft_kernels.dtypes import padded

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
    products: whether it multiplies matrices, which in bf16 has to be on the matrix unit.
    """

    regs: int
    loads: int = 9
    stores: int = 1
    singles: int = 0
    wide_loads: bool = True
    wide_stores: bool = True
    products: bool = False


# "file.kernel", or "file.kernel CONSTANT=value" where a configuration needs a budget of its own.
BUDGETS = {
    "adamw.squares": Budget(regs=40, wide_stores=False),  # writes one number per program
    "adamw.norm": Budget(regs=40, wide_loads=False, wide_stores=False),  # a few sums per user
    "adamw.step": Budget(regs=80, loads=11),  # a user's nine settings
    "bgmv.bgmv": Budget(regs=112, loads=12, stores=3, singles=6, wide_stores=False),  # x and y are one row
    # down_bias by itself, once per program; an F that is no power of two, 200, masks the matrices' rows.
    "bottleneck.forward": Budget(regs=224, loads=24, singles=16, products=True),
    "bottleneck.backward": Budget(regs=255, stores=3, products=True),  # s of rows; q, s h of F = 16: 8 bytes a thread
    "ia3.forward": Budget(regs=80),
    "ia3.backward": Budget(regs=152, stores=2),
    "ia3.add_parts": Budget(regs=40, loads=12, wide_loads=False, wide_stores=False),  # 64 columns, a thread for each
    "prompts.forward": Budget(regs=40, loads=12),
    "prompts.backward": Budget(regs=48, loads=12),
    # An x of 16 rows, 32 columns is 8 bytes a thread; planes leave as the matrix unit holds them.
    "shrink_expand.shrink": Budget(regs=168, loads=10, stores=32, wide_stores=False, products=True),
    "shrink_expand.expand": Budget(regs=128, loads=10, products=True),  # 3 look up a block's site, 1 its dropout
    "shrink_expand.expand R=64 M=3": Budget(regs=176, loads=10, products=True),  # 256 rank rows of v in fp32 registers
    # v alone, where x needs no gradient: it adds planes up, and a few rank rows leave narrowly.
    "shrink_expand.expand -y -sites N=0": Budget(regs=104, wide_stores=False),
    "shrink_expand.shrink_expand": Budget(regs=255, loads=18, products=True),  # 9 look up blocks' sites, 2 dropout
    "wgrad.wgrad": Budget(regs=168, loads=14, products=True),
    "wgrad.wgrad R=64 M=3": Budget(regs=216, loads=14, products=True),  # a sum of 256 rank rows, in fp32 by hand
    # v is one number per row: the gradient of a bias.
    "wgrad.wgrad R=1": Budget(regs=168, loads=17, singles=6, products=True),
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
    tf32 = [op for op in row["mma"] if re.search("[TX]F32", op.upper())]
    by_hand = budget.products and "16" in row["launch"].split()[0] and not row["mma"]
    rules = (
        (row["spills"] > 0, f"spills: {row['spills']} bytes of stack or scratch and instructions that use it"),
        (row["atomics"], f"atomic instructions: {' '.join(row['atomics'])}"),
        (by_hand, "products of bf16 or fp16 without the matrix unit"),
        (tf32, f"products of fp32 that are cut to TF32: {' '.join(tf32)}"),
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


CONFIGURED = {  # kernel -> what configures it, and the widths that it takes: rank rows or a bottleneck's F
    "shrink_expand.shrink": (shrink_expand.configuration, range(1, MOST_RANKS + 1)),
    "shrink_expand.expand": (shrink_expand.configuration, range(1, MOST_RANKS + 1)),
    "shrink_expand.shrink_expand": (shrink_expand.configuration, range(1, shrink_expand.MOST_FUSED_RANKS + 1)),
    "wgrad.wgrad": (wgrad.configuration, range(1, MOST_RANKS + 1)),
    "bottleneck.forward": (bottleneck.configuration, range(1, bottleneck.MAX_F + 1)),
    "bottleneck.backward": (bottleneck.configuration, range(1, bottleneck.MAX_F + 1)),
}


def shape_of(row: dict) -> tuple[int, int, frozenset[str]]:
    """Bytes per number, padded width, and the words of the configuration that a row was compiled in."""
    types, *words = row["launch"].split()
    values = dict(word.split("=") for word in words if "=" in word)
    width = int(values["F"]) if "F" in values else int(values["M"]) * int(values["R"])
    names = {"BLOCK", "BLOCK_T", "BLOCK_D", "warps", "stages"}
    return 2 if "16" in types else 4, padded(width), frozenset(word for word in words if word.split("=")[0] in names)


@pytest.mark.parametrize("kernel", CONFIGURED)
def test_every_branch_of_every_configuration_is_compiled(rows, kernel):
    configuration, widths = CONFIGURED[kernel]
    compiled, shipped = {shape_of(row) for row in rows["sm_90"] if row["kernel"] == kernel}, set()
    for width in widths:
        for itemsize in (2, 4):
            config = {name.removeprefix("num_"): value for name, value in configuration(width, itemsize).items()}
            words = frozenset(f"{name}={value}" for name, value in config.items())
            shipped.add((itemsize, padded(width), words))
    assert shipped <= compiled, f"launch_everything in aot.py lacks {sorted(map(str, shipped - compiled))}"


@pytest.mark.parametrize("kernel", ["shrink_expand.shrink", "shrink_expand.expand", "shrink_expand.shrink_expand",
                                    "wgrad.wgrad", "wgrad.wgrad_final"])  # fmt: skip
def test_lora_is_compiled_as_training_calls_it(rows, kernel):
    """With users of ranks below the bank's and without, in a first micro-step and a later one."""
    launches = [row["launch"].split() for row in rows["sm_90"] if row["kernel"] == kernel]
    assert kernel == "wgrad.wgrad_final" or any("fp16" in types.split("+") for types, *_ in launches)
    if kernel.startswith("wgrad"):
        launches = [words for words in launches if "-squares" not in words]  # a bottleneck's, which have no ranks
        assert {"-accumulate" in words for words in launches} == {False, True}
    assert {"-ranks" in words for words in launches} == {False, True}


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
def tf32_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + places, tl.dot(tl.load(x_ptr + places), tl.load(y_ptr + places), input_precision="tf32"))

@triton.jit
def by_hand_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + places, tl.load(x_ptr + places) * tl.load(y_ptr + places))

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
    tf32_kernel[(1,)](x, y, 64)
    by_hand_kernel[(1,)](x.bfloat16(), y.bfloat16(), 64)
    for T in (64, 65):
        fussy_kernel[(1,)](x, y, T, 1024)
'''


def test_the_gate_can_fail(tmp_path):
    """Each promise is broken once, by a kernel for each, on a chip of each maker."""
    pytest.importorskip("triton")
    path = tmp_path / "bad.py"
    path.write_text(BAD_KERNELS)
    expected = {"atomic": "atomic instructions", "spilling": "spills", "scalar": "no load of",
                "hungry": "shared memory", "fussy": "because of T", "forgotten": "does not launch it",
                "tf32": "cut to TF32", "by_hand": "without the matrix unit"}  # fmt: skip
    with ThreadPoolExecutor() as pool:
        reports = pool.map(compile_for, ("sm_90", "gfx942"), (path, path))
    for target, report in zip(("sm_90", "gfx942"), reports):
        found = {row["kernel"]: violations(row, target, Budget(regs=255, products=True)) for row in report}
        assert found.pop("bad.good") == []
        assert set(found) == {f"bad.{name}" for name in expected}
        for name, words in expected.items():
            assert any(words in message for message in found[f"bad.{name}"]), (target, name, found[f"bad.{name}"])
