"""How tests give commands and read what came of them."""

import io
import json
import sys

import torch
from small_bases import MAKERS

from minipeft.__main__ import main
from minipeft.store import Store

KINDS = list(MAKERS)


def run(*argv) -> int:
    return main([str(arg) for arg in argv])


def printed(capsys) -> dict:
    """The object on the last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def say(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def ask(monkeypatch, store, base, lines, *more) -> int:
    say(monkeypatch, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return run("predict", "--store", store, "--model", base, *more)


def rows_of(folder, base) -> dict[str, torch.Tensor]:
    store = Store(folder)
    return {user: store.get(user, base).row for user in store.users()}
