"""minipeft: one frozen language model, many people. Every user's own adapter trains in one fused pass."""

import os

# Threads that wait for each other must not spin for milliseconds: another busy program on the machine would slow every
# step. Read when torch loads, so it stands above the imports; a choice of the user's own stays. See docs/decisions.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from minipeft.engine import Adapter, Engine, predict
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.models.loading import load_model, load_tokenizer
from minipeft.schedule import Job, PassConfig, TrainConfig

__all__ = [
    "Adapter", "Engine", "InputError", "Job", "LoRA", "PassConfig", "TrainConfig", "load_model", "load_tokenizer",
    "predict",
]
