"""The PEFT methods by their names on the command line."""

from minipeft.methods.bitfit import BitFit
from minipeft.methods.bottleneck import Houlsby, Parallel, Pfeiffer
from minipeft.methods.dora import DoRA
from minipeft.methods.head import Head
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.methods.norms import LayerNormTuning
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.ptuning import PTuning
from minipeft.methods.stack import Stack
from minipeft.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {method.name: method for method in (
    LoRA, DoRA, VeRA, IA3, LayerNormTuning, BitFit, Houlsby, Pfeiffer, Parallel, PromptTuning, PrefixTuning, PTuning,
    Head, Stack)}  # fmt: skip
