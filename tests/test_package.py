"""Does `import minipeft` offer its public names without loading what nobody asked for?"""

import subprocess
import sys

import pytest

import minipeft


def test_every_public_name_is_there():
    everything = {}
    exec("from minipeft import *", everything)
    for name in minipeft.__all__:
        assert getattr(minipeft, name) is everything[name] and name in dir(minipeft)
    assert minipeft.LoRA(rank=4).rank == 4 and callable(minipeft.load_model)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'minipeft' has no attribute 'nope'"):
        minipeft.nope  # noqa: B018
    with pytest.raises(ImportError, match="nope"):
        exec("from minipeft import nope")


def test_kernel_benchmarks_import_without_the_packages_that_models_and_tasks_need():
    code = ("import sys; sys.modules |= dict.fromkeys(('safetensors', 'tokenizers', 'tqdm')); "
            "import minipeft.bench_kernels, minipeft.kernel_ops, minipeft.timing")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
