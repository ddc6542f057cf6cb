"""Which implementation a device gets. One function chooses; nothing else looks at the device."""

import torch

from minipeft_kernels.dtypes import INTERPRETED, triton

INTERPRET = bool(INTERPRETED)  # whether TRITON_INTERPRET=1 was set when the kernels were imported


def backend(device: torch.device | str) -> str:
    """The name of the implementation that runs on this device.

    "triton": compiled kernels on a GPU; on a CPU, under TRITON_INTERPRET=1, the same kernels in Triton's interpreter
              (slow: for tests and for stepping through a kernel with a debugger).
    "torch":  plain PyTorch, on a CPU: products over pieces of whole tiles (kernels/cpu.py), as in training; ragged
              segments of `segment_lora` by itself go to torch.nn.functional.grouped_mm.

    Raises:
        ValueError: no implementation exists for the device, or it is a GPU other than the current one, on which kernels
            are launched. There is no fallback.
    """
    kind, index = torch.device(device).type, torch.device(device).index
    if kind == "cpu":
        return "triton" if INTERPRET else "torch"
    if kind != "cuda":
        raise ValueError(f"minipeft_kernels: no implementation for device {kind!r}; use a CPU or a GPU.")
    if triton is None:
        raise ValueError("minipeft_kernels: a GPU needs Triton, which is not installed; pip install triton.")
    if INTERPRET:
        raise ValueError("minipeft_kernels: TRITON_INTERPRET=1 runs kernels on the CPU; unset it to use the GPU.")
    if not torch.cuda.is_available():
        raise ValueError("minipeft_kernels: this PyTorch sees no GPU; use the CPU, or install PyTorch for the GPU.")
    if index is not None and index != (current := torch.cuda.current_device()):
        raise ValueError(f"minipeft_kernels: kernels are launched on the current GPU, cuda:{current}, not on "
                         f"cuda:{index}; call torch.cuda.set_device({index}) first.")
    return "triton"


def chosen(device: torch.device | str, triton, torch):
    """Of two implementations, what this device gets."""
    return triton if backend(device) == "triton" else torch
