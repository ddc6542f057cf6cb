"""What the compilers make of every kernel, found without a GPU: registers, spills, memory, width of accesses, atomics.

    python tests/aot.py sm_90 [MODULE.py]

Triton can compile for a chip that is not there; only a launch needs the chip. So the real ops run on CPU tensors of
real models' widths, Triton believes the target to be active, and its own cache hook takes each launch's specialisation
(types, constants, divisibility by 16, warps, stages) in place of compiling and launching. No launch configuration is
repeated here, so what is compiled afterwards is what a GPU would run. Nothing reads or writes the tensors, so most of
them take no memory. The machine code is then read with the disassembler that ships inside Triton.

One JSON object per configuration goes to stdout; test_aot.py holds them to budgets. MODULE.py: that file's kernels,
launched by its function `launch_everything`, instead of minipeft's.
"""

import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import minipeft_kernels.backend
from minipeft_kernels.adamw import AdamWSettings, adamw_
from minipeft_kernels.bgmv import bgmv
from minipeft_kernels.bottleneck import Bottleneck, BottleneckTensors
from minipeft_kernels.bottleneck_rows import BottleneckRows, bottleneck_rows
from minipeft_kernels.ia3 import ia3_rows
from minipeft_kernels.prompts import PromptPlan, PromptRows, prompt_rows
from minipeft_kernels.segment_lora import Lora, backward_triton, forward_triton
from minipeft_kernels.segments import Segments, VectorRows
from minipeft_kernels.shift import shift_rows
from minipeft_kernels.shrink_expand import site_table
from minipeft_kernels.wgrad import num_squares

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}  # fmt: skip
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# ---- What is launched ----------------------------------------------------------------------------------------------

FEW = ([48, 16], [47, 3, 1])  # segments' lengths. Programs share a tile
MANY = ([2097] + [1] * 303, [2101] + [1] * 302)  # enough tiles for one program each; the first segment is two chunks
HUGE = 2**31 + 2**20  # bytes of a bank of many users: AMD's compiler addresses tensors past 2 GiB in another way
USERS = 512
bf16, fp32 = torch.bfloat16, torch.float32


def _bank(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Views [USERS, *shape] of one bank, as minipeft.bank makes them."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    P = -(-sum(sizes) // 64) * 64
    huge = HUGE // dtype.itemsize if sum(sizes) > 2**18 else 0
    bank = torch.empty(max(USERS * P, huge), dtype=dtype)[: USERS * P].view(USERS, P)
    ends = itertools.accumulate(sizes)
    return [bank[:, end - size : end].view(USERS, *shape) for shape, size, end in zip(shapes, sizes, ends)]


def _rows(lengths: list[int], *widths: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(sum(lengths), width, dtype=dtype) for width in widths]


def _lora(lengths: list[int], K: int, widths: list[int], R: int, dtype=bf16, drop: bool = False, masked: bool = True,
          later: bool = False, lowest: bool = False) -> None:  # fmt: skip
    """Forward and backward of sites that share their input, as the engine calls them.

    masked: some user's rank is below R; where nobody's is, the kernels get no ranks. later: it is a later micro-step,
    whose gradients are added to those that are there. lowest: x needs no gradient.
    """
    M, segments = len(widths), Segments.build(range(len(lengths)), lengths)
    shapes = [(M * R, K), *((R, N) for N in widths)]
    (A, *Bts), (grad_A, *grad_Bts) = _bank(dtype, *shapes), _bank(fp32, *shapes)
    scale, ranks = torch.ones(USERS), torch.full((USERS,), R, dtype=torch.int32) if masked else None
    drops = torch.zeros(len(lengths), 2, dtype=torch.int64) if drop else None
    sites = site_table(widths, M * R, dtype, "cpu")
    squares = tuple(torch.empty(USERS, num_squares(*grad.shape[1:], dtype.itemsize)) for grad in (grad_A, *grad_Bts))
    accumulate = torch.ones(USERS, dtype=torch.int32) if later else None
    lora = Lora(A, tuple(Bts), scale, ranks, segments, grad_A, tuple(grad_Bts), sites, drops, accumulate, squares)
    x, grad_x, y, *grad_ys = _rows(lengths, K, K, sum(widths), *widths, dtype=dtype)
    backward_triton(lora, x, grad_ys, forward_triton(lora, x, y), None if lowest else grad_x)


def _bottleneck(lengths: list[int], K: int, F: int, activation: str, serial: bool, dtype=bf16) -> None:
    shapes = (F, K), (F,), (F, K), (K,)
    weights, grads = BottleneckTensors(*_bank(dtype, *shapes)), BottleneckTensors(*_bank(fp32, *shapes))
    scale, widths = torch.ones(USERS), torch.full((USERS,), F, dtype=torch.int32)
    segments = Segments.build(range(len(lengths)), lengths)
    group = Bottleneck(weights, grads, activation, segments, None if serial else scale, widths)
    x, residual, grad_y = _rows(lengths, K, K, K, dtype=dtype)
    x.requires_grad_()
    y = bottleneck_rows(x, None if serial else residual, torch.ones(1, requires_grad=True), [BottleneckRows(0, group)])
    y.backward(grad_y)


def _ia3(lengths: list[int], D: int, dtype=bf16) -> None:
    (vectors,), (grads,) = _bank(dtype, (D,)), _bank(fp32, (D,))
    x, grad_y = _rows(lengths, D, D, dtype=dtype)
    x.requires_grad_()
    group = VectorRows(0, vectors, Segments.build(range(len(lengths)), lengths), grads)
    ia3_rows(x, torch.ones(1, requires_grad=True), [group]).backward(grad_y)


def _shift(lengths: list[int], D: int, dtype=bf16) -> None:
    (vectors,), (grads,) = _bank(dtype, (D,)), _bank(fp32, (D,))
    x, grad_y = _rows(lengths, D, D, dtype=dtype)
    group = VectorRows(0, vectors, Segments.build(range(len(lengths)), lengths), grads)
    shift_rows(x, torch.ones(1, requires_grad=True), [group]).backward(grad_y)


def _prompts(lengths: list[int], K: int, dtype=bf16) -> None:
    (prompts,), (grads,) = _bank(dtype, (20, K)), _bank(fp32, (20, K))
    plan = PromptPlan.build(range(len(lengths)), range(0, 8 * len(lengths), 8), [7] * len(lengths))
    x = torch.zeros(8 * len(lengths), K, dtype=dtype)
    prompt_rows(x, torch.ones(1, requires_grad=True), [PromptRows(prompts, plan, grads)]).backward(x)


def _decode(num_rows: int, K: int, N: int, R: int, dtype=bf16) -> None:
    (A, Bt), x = _bank(dtype, (R, K), (R, N)), torch.empty(num_rows, K, dtype=dtype)
    ranks = torch.full((USERS,), R, dtype=torch.int32)
    bgmv(x, A, Bt, torch.ones(USERS), torch.zeros(num_rows, dtype=torch.int64), ranks)


def _adamw(num_slots: int, P: int, compute: bool) -> None:
    buffers = [torch.empty(64, P) for _ in range(4)]
    settings = AdamWSettings(*(torch.ones(num_slots, dtype=torch.float64) for _ in range(7)))
    adamw_(*buffers, torch.arange(num_slots), settings, compute=torch.empty(64, P, dtype=bf16) if compute else None)


def launch_everything() -> None:
    """Every op as training calls it, at several batches, which must not need code of their own.

    Widths of Flan-T5-base (768, 2048), Qwen2.5-1.5B (1536, 8960) and Llama-3.1-8B (4096, 14336). All are multiples of
    the kernels' blocks, where a width is a number of iterations and little else, so no rank runs at every width. Every
    branch of every `configuration` runs, which test_aot.py checks; dropout and several sites where they differ most.
    """
    minipeft_kernels.backend.INTERPRET = True  # a CPU's backend is now the kernels, which are not interpreted here
    for lengths in (*FEW, *MANY):
        for R, K in ((8, 768), (16, 1536), (32, 4096), (64, 4096)):
            _lora(lengths, K, [K], R, masked=R in (8, 64))
        for R, K in ((8, 768), (32, 768), (64, 1024)):
            _lora(lengths, K, [K], R, fp32, masked=R == 32)
        _lora(lengths, 1536, [1536], 16, torch.float16, masked=False)
        _lora(lengths, 1536, [1536] * 3, 8, masked=False)
        _lora(lengths, 1536, [1536] * 3, 16, drop=True)
        _lora(lengths, 768, [768] * 3, 8, fp32, drop=True)
        for dtype in (bf16, fp32):
            _lora(lengths, 1024, [1024], 64, dtype, drop=True)
            _lora(lengths, 1024, [1024], 64, dtype, drop=True, lowest=True)
        _lora(lengths, 1536, [1536] * 3, 8, masked=False, lowest=True)
        _lora(lengths, 768, [768] * 3, 8, fp32, drop=True, lowest=True)
    for lengths in MANY:  # so many rank rows are split whatever the number of tiles
        for dtype in (bf16, fp32):
            _lora(lengths, 768, [768] * 3, 32, dtype, drop=True, masked=False)
            _lora(lengths, 768, [768] * 3, 64, dtype, masked=False)
            _lora(lengths, 768, [768] * 3, 64, dtype, masked=False, lowest=True)
            _lora(lengths, 768, [768] * 3, 64, dtype, drop=True, later=True)
        _bottleneck(lengths, 4096, 256, "gelu", serial=False)
    for lengths in FEW:
        _lora(lengths, 1024, [1024], 256, drop=True)
        for F in (16, 64, 128):
            _bottleneck(lengths, 768, F, "gelu", serial=False)
        for F in (16, 32, 64, 128):
            _bottleneck(lengths, 768, F, "gelu", serial=False, dtype=fp32)
        _bottleneck(lengths, 1024, 256, "gelu", serial=False, dtype=fp32)
        _bottleneck(lengths, 1536, 32, "silu", serial=True)
        _bottleneck(lengths, 2048, 200, "gelu", serial=True)  # a bank past HUGE has widths of its own: one code each
        for dtype in (bf16, fp32):
            _bottleneck(lengths, 768, 48, "relu", serial=True, dtype=dtype)
        _bottleneck(lengths, 768, 16, "gelu_tanh", serial=True, dtype=fp32)
    for lengths in MANY:
        for D, dtype in ((768, fp32), (14336, bf16)):
            _ia3(lengths, D, dtype)
            _shift(lengths, D, dtype)
            _prompts(lengths, D, dtype)
    for num_rows in (1, 64, 1023):
        for R, K, N in ((8, 768, 2048), (16, 1536, 8960), (32, 4096, 4096), (64, 4096, 14336)):
            _decode(num_rows, K, N, R)
        _decode(num_rows, 768, 768, 8, fp32)
    for num_slots in (1, 64):
        _adamw(num_slots, 64 * 1001, compute=True)
        _adamw(num_slots, 64 * 1001, compute=False)


# ---- Recording -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel and how Triton specialised it, in Triton's own JSON."""

    kernel: JITFunction
    specialization: str

    @property
    def name(self) -> str:
        """_wgrad_final_kernel of wgrad.py is wgrad.wgrad_final."""
        return f"{self.kernel.__module__.split('.')[-1]}.{self.kernel.__name__.strip('_').removesuffix('_kernel')}"

    @property
    def words(self) -> str:
        """Its types of floating point numbers, absent pointers (-name), constants, warps and stages."""
        data = json.loads(self.specialization)
        parameters, options = list(data["signature"]), data["options"]
        types = sorted({kind[1:] for kind in data["signature"].values() if "f" in kind})
        constants = [(parameters[i], value) for (i,), value in zip(data["constant_keys"], data["constant_vals"])]
        words = [f"-{name.removesuffix('_ptr')}" if value is None else f"{name}={value}" for name, value in constants]
        return " ".join(["+".join(types), *words, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])

    @property
    def arguments(self) -> dict[str, object]:
        """What Triton knows of each argument: its type, and whether 16 divides it."""
        data = json.loads(self.specialization)
        known = {path[0]: value for path, value in zip(data["attrs_keys"], data["attrs_vals"])}
        return {name: (kind, known.get(i)) for i, (name, kind) in enumerate(data["signature"].items())}


class Recorder:
    """Every distinct launch, as Triton itself specialises it for the target; nothing is compiled or launched."""

    def __init__(self, target: GPUTarget):
        self.launches: dict[Launch, None] = {}  # in the order of their coming
        driver = SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
        triton.runtime.driver.set_active(driver)

    def __enter__(self) -> dict[Launch, None]:
        triton.knobs.runtime.jit_cache_hook = self._note
        return self.launches

    def __exit__(self, *exception) -> None:
        triton.knobs.runtime.jit_cache_hook = None

    def _note(self, *, fn, compile, **rest) -> bool:
        self.launches[Launch(fn.jit_function, compile["specialization_data"])] = None
        return True  # "do not compile", and with nothing compiled Triton launches nothing


# ---- Reading machine code ------------------------------------------------------------------------------------------


def _output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections .text.*"""
    (table,), (size, number, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    names_at = sections[names][4]
    return b"".join(cubin[start : start + length] for name, _, _, _, start, length in sections
                    if cubin.startswith(b".text.", names_at + name))  # fmt: skip


def read_cubins(cubins: list[bytes], architecture: int) -> list[dict]:
    """What NVIDIA binaries need and do. All are disassembled at once: nvdisasm takes half a second to start."""
    codes = [_code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        sass = _output(NVIDIA_TOOLS / "nvdisasm", "--binary", f"SM{architecture}", file.name)
        ops = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
        assert len(ops) == sum(map(len, codes)) // 16, "every instruction takes 16 bytes"
        reports, first = [], 0
        for cubin, code in zip(cubins, codes):
            file.seek(0)
            file.write(cubin)
            file.truncate()
            file.flush()
            usage = _output(NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name)
            reports.append(_report_sass(Counter(ops[first : first + len(code) // 16]), usage))
            first += len(code) // 16
    return reports


def _report_sass(ops: Counter, usage: str) -> dict:
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads, stores, local = Counter(), Counter(), 0
    for op, count in ops.items():
        family, *modifiers = op.split(".")
        bits = next((int(m.strip("US")) for m in modifiers if m in ("U8", "S8", "U16", "S16", "64", "128")), 32)
        if family in ("LDG", "LDGSTS", "LD"):
            loads[bits] += count
        elif family in ("STG", "ST"):
            stores[bits] += count
        elif family in ("UTMALDG", "UTMASTG"):  # whole tiles, by the tensor memory accelerator
            (loads if family == "UTMALDG" else stores)[128] += count
        elif family in ("LDL", "STL"):
            local += count
    return {
        "regs": found["REG"],
        "spills": found["STACK"] + found["LOCAL"] + local,
        "mma": _matching(ops, r"(HMMA|HGMMA|IMMA|DMMA)\..*"),
        "atomics": _matching(ops, r"(RED|REDG|ATOM|ATOMG|ATOMS|UTMAREDG|UBLKRED|SURED|SUATOM)(\..*)?"),
        "loads": loads,
        "stores": stores,
    }


def read_amdgcn(text: str) -> dict:
    """What an AMD program needs and does."""
    found = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    ops = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    loads, stores, scratch = Counter(), Counter(), 0
    for op, count in ops.items():
        if access := re.match(r"(?:global|buffer|flat)_(load|store)_[us]?(dwordx?\d?|short|byte)", op):
            (loads if access[1] == "load" else stores)[widths[access[2]]] += count
        scratch += count * op.startswith("scratch_")
    return {
        "regs": found["vgpr_count"],  # with the accumulation registers of the matrix unit
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"] + found["private_segment_fixed_size"] + scratch,
        "mma": _matching(ops, r"v_mfma_.*"),
        "atomics": _matching(ops, r"(global|buffer|flat)_atomic_.*|ds_(pk_)?(add|sub|inc|dec|min|max)_.*"),
        "loads": loads,
        "stores": stores,
    }


def _matching(ops: Counter, pattern: str) -> list[str]:
    return sorted(op for op in ops if re.fullmatch(pattern, op))


# ---- The command ---------------------------------------------------------------------------------------------------


def report(launches: list[Launch], target: GPUTarget) -> list[dict]:
    """One row per configuration, compiled in an empty cache: what an earlier run compiled proves nothing.

    `varying` names the arguments whose specialisation differs between launches of one configuration: a new batch would
    then wait for a compiler. The first launch of each configuration is the one compiled.
    """
    groups: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.name, launch.words), []).append(launch)
    rows, compiled = [], []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for (name, words), group in groups.items():
            arguments = [launch.arguments for launch in group]
            varying = [key for key in arguments[0] if any(other[key] != arguments[0][key] for other in arguments)]
            rows.append({"kernel": name, "launch": words, "varying": varying})
            try:
                binary = group[0].kernel.preload(group[0].specialization)
                compiled.append((rows[-1], binary))
                rows[-1]["shared"] = binary.metadata.shared
            except Exception as error:
                rows[-1]["error"] = str(error).strip() or type(error).__name__
    if target.backend == "cuda":
        found = read_cubins([binary.asm["cubin"] for _, binary in compiled], target.arch)
    else:
        found = [read_amdgcn(binary.asm["amdgcn"]) for _, binary in compiled]
    for (row, _), what in zip(compiled, found):
        row |= what
    return rows


def _never_launched(modules: list[ModuleType], launches: list[Launch]) -> list[dict]:
    """A row for each kernel, by its name, that nobody launched."""
    functions = [x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)]
    names = {Launch(x, "").name for x in functions if x.__name__.endswith("_kernel")}
    return [{"kernel": name, "launch": "-", "error": "launch_everything does not launch it"}
            for name in sorted(names - {launch.name for launch in launches})]  # fmt: skip


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(target: str, path: str | None = None) -> None:
    if minipeft_kernels.backend.INTERPRET:
        raise SystemExit("aot.py: TRITON_INTERPRET=1 compiles nothing; unset it.")
    torch.set_num_threads(1)
    if path is None:
        found = pkgutil.iter_modules(minipeft_kernels.__path__)
        modules = [importlib.import_module(f"minipeft_kernels.{module.name}") for module in found]
        launch = launch_everything
    else:
        modules = [_load(path)]
        launch = modules[0].launch_everything
    with Recorder(TARGETS[target]) as launches:
        launch()
    for row in report(list(launches), TARGETS[target]) + _never_launched(modules, list(launches)):
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
