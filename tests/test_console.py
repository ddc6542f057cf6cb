"""Does a command say what is wrong with its device, and put itself on the GPU that is its own?"""

import pytest
import torch

import minipeft_kernels.backend
from minipeft.console import check_device
from minipeft.errors import InputError
from minipeft.ranks import own_device


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says it has two. Gives a list of what was made the current one."""
    current = [0]
    monkeypatch.setattr(minipeft_kernels.backend, "triton", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    return current


def test_a_rank_launches_on_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = own_device("cuda")
    with pytest.raises(ValueError, match=r"torch.cuda.set_device\(1\)"):
        minipeft_kernels.backend.backend(device)
    check_device(device)
    assert two_gpus == [0, 1] and minipeft_kernels.backend.backend(device) == "triton"


def test_a_gpu_without_a_number_is_the_current_one(two_gpus):
    check_device("cuda")
    check_device("cpu")
    assert two_gpus == [0]


def test_a_gpu_that_is_not_there_is_an_error(two_gpus):
    with pytest.raises(InputError, match="--device cuda:2: this machine has 2 GPUs, counted from cuda:0"):
        check_device("cuda:2")
    assert two_gpus == [0]


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda", "cuda:0"])
def test_a_device_on_which_nothing_runs_is_an_error(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"^--device {device}: "):
        check_device(device)
