"""minipeft: one frozen language model, many people. Every user's own adapter trains in one fused pass."""

import ctypes
import os
import sys

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

from minipeft.engine import Adapter, Engine, predict
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.models.loading import load_model, load_tokenizer
from minipeft.schedule import Job, PassConfig, TrainConfig

__all__ = [
    "Adapter", "Engine", "InputError", "Job", "LoRA", "PassConfig", "TrainConfig", "load_model", "load_tokenizer",
    "predict",
]
