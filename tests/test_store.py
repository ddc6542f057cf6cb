"""Does every adapter come back bit for bit, whoever the user is, and is a broken file noticed?"""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipeft.engine import Adapter
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin
from minipeft.store import Store, adapter_path, load_adapter, save_adapter, user_of
from minipeft.tasks.task import Header

CONFIG = DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=75)
BASE = Decoder(CONFIG)
METRICS = {"best_epoch": 2, "epochs": 3, "steps": 12, "val_loss": [1.5, 0.1 + 0.2, math.nan], "stopped_early": True,
           "skipped_steps": 0}  # fmt: skip
DANGEROUS = {"path": "../../x", "absolute": "/etc/passwd", "dot": ".", "dots": "..", "three dots": "...", "empty": "",
             "nul": "a\0b", "emoji": "👩‍🚀", "newline": "a\nb", "percent": "%2E", "only percent": "%", "space": " ",
             "backslash": "..\\x", "hidden": ".bashrc", "suffix": "x.safetensors", "tmp": "x.tmp", "dash": "-rf",
             "right to left": "\u202eabc", "star": "*", "combining": "e\u0301", "composed": "\u00e9"}  # fmt: skip


def make_adapter(user="ann", method=None, seed=0):
    """Numbers of every size, of both signs, the smallest too; zero where the method trains nothing."""
    method, draw = method or LoRA(3, 7.0, ("q", "down")), torch.Generator().manual_seed(seed)
    layout = method.layout(BASE)
    tensors = {}
    for name, shape in layout.shapes.items():
        tensors[name] = torch.zeros(shape)
        size = torch.exp(20 * torch.randn(method.rank, shape[1], generator=draw).clamp(-4, 4))
        tensors[name][: method.rank] = size * torch.randn(method.rank, shape[1], generator=draw)
        tensors[name][0, 0], tensors[name][0, 1] = 1e-45, -0.0
    return Adapter(user, method, layout.row(tensors), METRICS)


def bits(row):
    return row.view(torch.int32)


@pytest.mark.parametrize("method", [LoRA(), LoRA(1, 0.1, ("k",)), LoRA(12, 16.0, ("layers.1.mlp.gate", "v")), None])
def test_round_trip_bit_for_bit(tmp_path, method):
    adapter = make_adapter(method=method)
    path = save_adapter(tmp_path / "new" / "folder", adapter, BASE)
    back = load_adapter(tmp_path / "new" / "folder", "ann", BASE)
    assert path == adapter_path(tmp_path / "new" / "folder", "ann")
    assert torch.equal(bits(back.row), bits(adapter.row))
    assert back.user == "ann" and back.method == adapter.method
    assert math.isnan(back.metrics["val_loss"].pop()) and back.metrics["val_loss"] == METRICS["val_loss"][:2]
    assert {**back.metrics, "val_loss": 0} == {**METRICS, "val_loss": 0}


def test_the_file_holds_the_papers_matrices_and_no_padding(tmp_path):
    adapter = make_adapter()
    path = save_adapter(tmp_path, adapter, BASE)
    tensors, layout = load_file(path), adapter.method.layout(BASE)
    assert tensors.keys() == {f"{site}.{m}" for site in adapter.method.chosen(BASE) for m in "AB"}
    A, B = tensors["layers.1.mlp.down.A"], tensors["layers.1.mlp.down.B"]
    assert A.shape == (3, 75) and B.shape == (32, 3)
    assert torch.equal(A, layout.view(adapter.row, "layers.1.mlp.down.A")[:3])
    assert torch.equal(B.T, layout.view(adapter.row, "layers.1.mlp.down.Bt")[:3])
    assert sum(tensor.numel() for tensor in tensors.values()) == adapter.method.count(BASE)
    with safe_open(path, "pt") as file:
        method = json.loads(file.metadata()["method"])
        assert method == {"name": "lora", "rank": 3, "alpha": 7.0, "sites": ["q", "down"], "dropout": 0.0,
                          "scaling": "lora", "ranks": [], "alphas": []}
        assert file.metadata()["user"] == "ann"


def test_any_text_is_a_safe_user_id(tmp_path):
    folder = tmp_path / "a" / "b" / "store"
    adapters = [make_adapter(user, seed=i) for i, user in enumerate(DANGEROUS.values())]
    for adapter in adapters:
        assert save_adapter(folder, adapter, BASE).parent == folder
    assert len(list(folder.iterdir())) == len(DANGEROUS)  # no two share a file, and nothing else is left
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder] == []
    for adapter in adapters:
        back = load_adapter(folder, adapter.user, BASE)
        assert back.user == adapter.user and torch.equal(bits(back.row), bits(adapter.row))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=6))
def test_ids_and_paths_are_one_to_one(users):
    paths = {str(adapter_path("store", user)) for user in users}
    assert len(paths) == len(users)
    assert [user_of(adapter_path("store", user)) for user in users] == users
    for path in paths:
        assert os.path.dirname(os.path.normpath(path)) == "store" and "\0" not in path


def test_an_id_that_fits_no_file_name_is_an_error(tmp_path):
    adapter_path(tmp_path, "a" * 200)
    for user in ("a" * 201, "👩" * 17):
        with pytest.raises(InputError, match=f"user id of {len(user)} characters is too long"):
            save_adapter(tmp_path, make_adapter(user), BASE)
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces(tmp_path):
    save_adapter(tmp_path, make_adapter(seed=1), BASE)
    newer = make_adapter(seed=2, method=LoRA(2))
    save_adapter(tmp_path, newer, BASE)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(bits(load_adapter(tmp_path, "ann", BASE).row), bits(newer.row))


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """If writing fails half way, what was there before is still there."""
    before = make_adapter(seed=1)
    save_adapter(tmp_path, before, BASE)

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path, make_adapter(seed=2), BASE)
    assert torch.equal(bits(load_adapter(tmp_path, "ann", BASE).row), bits(before.row))


def test_an_unknown_user_is_an_error(tmp_path):
    save_adapter(tmp_path, make_adapter("ann"), BASE)
    with pytest.raises(InputError, match="no adapter of user 'bob' in "):
        load_adapter(tmp_path, "bob", BASE)
    with pytest.raises(InputError, match="no adapter of user 'ann' in "):
        load_adapter(tmp_path / "nowhere", "ann", BASE)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_damaged_file_is_an_error(tmp_path, keep):
    path = save_adapter(tmp_path, make_adapter(), BASE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"ann\.safetensors is damaged: "):
        load_adapter(tmp_path, "ann", BASE)


def test_an_adapter_of_another_base_is_an_error(tmp_path):
    save_adapter(tmp_path, make_adapter(), BASE)
    SITES, other = BASE.sites, lambda sites: SimpleNamespace(sites=sites, heads={}, embeddings={})
    wider = other({site: (K + 1, N) for site, (K, N) in SITES.items()})
    with pytest.raises(InputError, match=r"layers.0.attn.q.A is \(3, 32\), this base needs \(3, 33\); was it trained"):
        load_adapter(tmp_path, "ann", wider)
    taller = other({site: (K, N + 1) for site, (K, N) in SITES.items()})
    with pytest.raises(InputError, match=r"layers.0.attn.q.B is \(32, 3\), this base needs \(33, 3\)"):
        load_adapter(tmp_path, "ann", taller)
    deeper = other({**SITES, "layers.2.attn.q": (32, 32)})
    with pytest.raises(InputError, match=r"layers.2.attn.q.A is nothing, this base needs \(3, 32\)"):
        load_adapter(tmp_path, "ann", deeper)
    shallower = other({site: size for site, size in SITES.items() if site.startswith("layers.0")})
    with pytest.raises(InputError, match=r"layers.1.attn.q.A is no site of this base"):
        load_adapter(tmp_path, "ann", shallower)


def test_a_file_of_somebody_elses_making_is_an_error(tmp_path):
    path = adapter_path(tmp_path, "ann")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"ann\.safetensors is no adapter of minipeft"):
        load_adapter(tmp_path, "ann", BASE)


# ---- A folder of them ----------------------------------------------------------------------------------------------

TASK = Header("moods", "Do they like it?", ("yes", "no"))


def loaded(seed=0, name="base"):
    """A base that says it came from a folder."""
    base = Decoder(CONFIG)
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    base.origin = Origin(f"/models/{name}", name, base)
    return base


def test_a_store_gives_back_what_was_added_and_says_whose_it_is(tmp_path):
    base = loaded()
    store = Store.make(tmp_path / "new" / "store", base, TASK)
    everyone = make_adapter("(everyone)", seed=9)
    adapters = [replace(make_adapter(user, seed=i), under=everyone if i % 2 else None)
                for i, user in enumerate(DANGEROUS.values())]  # fmt: skip
    for adapter in adapters:
        store.add(adapter, base)
    again = Store(store.folder)
    assert again.task == TASK and again.base == store.base and again.base.name == "base"
    assert again.users() == sorted(DANGEROUS.values())
    assert len(list((store.folder / "shared").iterdir())) == 1
    for adapter in adapters:
        found = again.get(adapter.user, base)
        assert found.user == adapter.user and torch.equal(bits(found.row), bits(adapter.row))
        assert (found.under is None) == (adapter.under is None)
        if found.under:
            assert torch.equal(bits(found.under.row), bits(everyone.row)) and found.under.user == "(everyone)"
            assert torch.equal(bits(load_adapter(store.folder, adapter.user, base).under.row), bits(everyone.row))
        assert again.about(adapter.user)[0] == adapter.method
    assert len({id(again.get(a.user, base).under) for a in adapters if a.under}) == 1


def test_adapters_over_different_shared_ones_keep_their_own(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base, TASK)
    for seed in (1, 2):
        store.add(replace(make_adapter(f"user {seed}"), under=make_adapter("(everyone)", seed=seed)), base)
    for seed in (1, 2):
        expected = make_adapter("(everyone)", seed=seed).row
        assert torch.equal(bits(store.get(f"user {seed}", base).under.row), bits(expected))


def test_another_base_is_an_error_that_names_both(tmp_path):
    base, other = loaded(), loaded(seed=1, name="other")
    store = Store.make(tmp_path, base, TASK)
    store.add(make_adapter(), base)
    calls = (lambda: store.get("ann", other), lambda: store.add(make_adapter(), other),
             lambda: Store.make(tmp_path, other, TASK))  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=r"belongs to base 'base' \(\w{12}\), not to 'other' \(\w{12}\); name the "
                                             "one that was in /models/base"):
            call()
    moved = loaded(name="renamed")  # the same numbers in another folder
    assert torch.equal(store.get("ann", moved).row, store.get("ann", base).row)
    with pytest.raises(InputError, match="came from no folder"):
        store.get("ann", BASE)


def test_another_task_is_an_error_and_no_task_takes_the_first(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base)
    with pytest.raises(InputError, match="does not say for which task its adapters are; import one with --task"):
        store.known_task()
    assert Store.make(tmp_path, base, TASK).task == TASK == Store.make(tmp_path, base).known_task()
    for changed, what in ((replace(TASK, labels=("no", "yes")), "labels"), (replace(TASK, instruction="?"), "instruc")):
        with pytest.raises(InputError, match=f"belongs to task 'moods'; 'moods' has other {what}"):
            Store.make(tmp_path, base, changed)
    assert Store.make(tmp_path, base, replace(TASK, name="renamed")).task == TASK


def test_deleting_forgets_one_user(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base, TASK)
    for user in ("ann", "bob"):
        store.add(make_adapter(user), base)
    assert "ann" in store
    store.delete("ann")
    assert "ann" not in store and store.users() == ["bob"]
    for call in (lambda: store.delete("ann"), lambda: store.get("ann", base), lambda: store.about("ann")):
        with pytest.raises(InputError, match="no adapter of user 'ann' in "):
            call()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base": 3, "task": null}', '{"base": {"name": "x"}}',
                                     '{"base": {"name": "x", "folder": "y", "fingerprint": "z"}, "task": {"name": 1}}'])
def test_a_broken_store_json_is_an_error(content, tmp_path):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(InputError, match=r"store\.json: "):
        Store(tmp_path)


def test_a_shared_adapter_that_is_gone_is_an_error(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base, TASK)
    store.add(replace(make_adapter(), under=make_adapter("(everyone)")), base)
    (shared,) = (tmp_path / "shared").iterdir()
    shared.unlink()
    with pytest.raises(InputError, match=f"{shared.name} is damaged: No such file"):
        store.get("ann", base)
