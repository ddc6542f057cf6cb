"""A task, a base of each kind and a store on each, for all tests of the commands."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from commands import KINDS, run
from small_bases import MAKERS

import minipeft
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task, save_task


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """The task's folder: six users, among them ann and bob."""
    made, _ = make_synthetic(SyntheticConfig(users=6, max_examples=24, test_examples=5, texts=60))
    folder = tmp_path_factory.mktemp("task")
    save_task(made, folder)
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace("user00000", "ann").replace("user00001", "bob"))
    return folder


@pytest.fixture(scope="session")
def bases(task, tmp_path_factory):
    """Kind -> a model folder."""
    return {kind: make(load_task(task), tmp_path_factory.mktemp("bases") / kind) for kind, make in MAKERS.items()}


@pytest.fixture(scope="session")
def stores(task, bases, tmp_path_factory):
    """Kind -> a store of everybody's LoRA. Tests read it only."""
    folders = {kind: tmp_path_factory.mktemp("stores") / kind for kind in KINDS}
    for kind, folder in folders.items():
        assert run("train", "--model", bases[kind], "--task", task, "--method", "lora", "--rank", 2, "--store", folder,
                   "--epochs", 2, "--learning-rate", 0.01, "--seed", 3) == 0  # fmt: skip
    return folders


@pytest.fixture
def fake(monkeypatch):
    """Stands for minipeft.interop: keeps adapters in memory by folder."""
    kept = {}
    module = SimpleNamespace(
        export_peft=lambda adapter, base, folder: kept.__setitem__(str(folder), (adapter, type(base).__name__)),
        import_peft=lambda folder, base, user: replace(kept[str(folder)][0], user=user),
        export_adapterhub=None, import_adapterhub=None, kept=kept,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "minipeft.interop", module)
    monkeypatch.setattr(minipeft, "interop", module, raising=False)
    return module
