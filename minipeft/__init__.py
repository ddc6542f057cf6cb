"""minipeft: one frozen language model, many people. Every user's own adapter trains in one fused pass."""

import ctypes
import importlib
import os
import sys
from typing import Any

# Threads that wait for each other must not spin for milliseconds: another busy program on the machine would slow every
# step. Read when torch loads, so it stands above the imports; a choice of the user's own stays. See docs/decisions.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Freed memory is kept for the next step instead of going back to the system, which would hand it out again page by
# page: up to 1 GiB of it, and no blocks above 256 MiB. A choice of the user's own stays. See docs/decisions.md.
if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's; other C libraries have none
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 256 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)

# A name's module is imported when the name is first asked for, so that minipeft.kernel_ops, say, needs no safetensors,
# tokenizers or tqdm: benchmarks/gpu.sh runs with what a GPU machine has.
_MODULES = {
    "Engine": "engine", "Job": "schedule", "LoRA": "methods.lora", "Store": "store", "TrainConfig": "schedule",
    "evaluate": "running", "load_model": "models.loading", "load_task": "tasks.task", "predict": "running",
    "train": "training",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minipeft.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
