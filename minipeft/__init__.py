"""minipeft: one frozen language model, many people. Every user's own adapter trains in one fused pass."""

from minipeft.engine import Adapter, Engine, predict
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.models.loading import load_model, load_tokenizer
from minipeft.schedule import Job, PassConfig, TrainConfig

__all__ = [
    "Adapter", "Engine", "InputError", "Job", "LoRA", "PassConfig", "TrainConfig", "load_model", "load_tokenizer",
    "predict",
]
