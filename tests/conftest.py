"""Two paths, one suite: every op's tests take the fixture `device` and run on plain PyTorch and through the kernels.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported; the choice is
then undone, so that nothing a test starts inherits it, and a test's path is what its fixture says. With a GPU they run
compiled.
"""

import importlib
import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.experimental.gluon  # noqa: E402, F401  launching imports it, and it must see the same choice

for file in (Path(__file__).parent.parent / "kernels").glob("*.py"):
    importlib.import_module(f"minipeft_kernels.{file.stem}")
backend = importlib.import_module("minipeft_kernels.backend")
os.environ.pop("TRITON_INTERPRET", None)
backend.INTERPRET = False  # unless a test asks for `device` or `kernels`, the CPU means plain PyTorch


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """The device whose backend is the test's path: "cpu" for torch; "cuda", or the interpreter's "cpu", for triton."""
    on = "cuda" if GPU and request.param == "triton" else "cpu"
    monkeypatch.setattr(backend, "INTERPRET", request.param == "triton" and not GPU)
    assert backend.backend(on) == request.param
    return on


@pytest.fixture
def kernels(monkeypatch):
    """The device on which kernels run, compiled or interpreted: for launchers that have no other path."""
    monkeypatch.setattr(backend, "INTERPRET", not GPU)
    return "cuda" if GPU else "cpu"
