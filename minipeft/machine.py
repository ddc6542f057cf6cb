"""What a measurement ran on: the versions, the code and the processor that result.json speaks of."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def versions(device: torch.device | str, packages: tuple[str, ...] = ()) -> dict[str, str | int | None]:
    """Name -> version of Python, PyTorch, this code, and the packages (None: not there); and what ran: the device, the
    CPU, PyTorch's threads, and a GPU's name."""
    device = torch.device(device)
    found = {"python": platform.python_version(), "torch": torch.__version__, "minipeft": code()}
    found |= {name: _version(name) for name in packages}
    found |= {"device": str(device), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def code() -> str:
    """The version of this package; in a git checkout the commit, and whether tracked files differ from it."""
    number = _version("minipeft") or "not installed"
    if not (HERE.parent / ".git").exists():
        return number
    try:
        ask = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty=, changed", "--abbrev=10", "--exclude=*"]
        said = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or not this user's checkout
        return f"{number}, unknown commit"
    return f"{number}, commit {said.stdout.strip()}"


def cpu_name() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
