"""Which implementation a device gets. One function chooses; nothing else looks at the device."""

import torch


def backend(device: torch.device | str) -> str:
    """The name of the implementation that runs on this device: "cpu" (plain PyTorch on tiles, kernels/cpu.py).

    Raises:
        ValueError: no implementation exists for the device. There is no fallback.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu"
    raise ValueError(f"minipeft_kernels: no implementation for device {kind!r} yet; move the model to the CPU.")
