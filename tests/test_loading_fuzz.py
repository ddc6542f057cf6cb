"""Does every damaged model folder either load or raise InputError, quickly and without taking memory?

Seeded damage to tiny folders of every family, in one process that may not allocate more than 64 MiB: bytes flipped,
files cut, lengths, JSON values of other kinds and sizes, keys dropped and doubled.
"""

import json
import random
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from minipeft.errors import InputError
from minipeft.models.loading import FAMILIES, load_model

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 32, "intermediate_size": 24,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
OWN_SIZES = {  # model_type -> settings that transformers does not spell as in SIZES
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}
SHARDED = ("llama", "gpt2", "bert")
TOTAL = 2400  # damaged folders
MOST_BYTES, MOST_SECONDS = 64 << 20, 3.0
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 5000, 2**20, 2**28, 2**31, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "x", "16", "\ud800", "a\nb\0", "é" * 3000, "F64", "BOOL", "../x",
    [], [1], [16, 16], [[[]]], [None] * 1000, {}, {"a": {"b": []}}, {"rope_type": "linear", "factor": 1e-320},
    {"rope_type": "llama3"}, {"rope_type": ["linear"]}, {"type": "yarn", "factor": 4},
]  # fmt: skip


def make_folders(root):
    """A folder of each family, as transformers saves it. Returns the families it knows no sizes for."""
    import transformers  # not in the process that loads

    missed = []
    for kind in FAMILIES:
        try:
            config = transformers.AutoConfig.for_model(kind, **SIZES | OWN_SIZES.get(kind, {}))
            heads = transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel
            if kind in ("bert", "roberta", "xlm-roberta"):
                heads = (transformers.AutoModel,)
            auto = next(auto for auto in heads if type(config) in auto._model_mapping)
            model = auto.from_config(config)
            assert model.num_parameters() < 100_000, f"{kind}: {model.num_parameters()} parameters, add its sizes"
            model.save_pretrained(root / kind)
            if kind in SHARDED:
                model.save_pretrained(root / f"{kind} sharded", max_shard_size="8KB")
            load_model(root / kind)
        except (KeyError, ValueError, AssertionError) as error:
            missed.append(f"{kind}: {error}")
    return missed


# damage: each takes a random.Random and a file's bytes, and returns other bytes


def flip(rng, data, within=None):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(min(len(data), within or len(data)))] = rng.randrange(256)
    return bytes(data)


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def change_json(rng, data):
    """One or two values anywhere in it are replaced, dropped or doubled under another name."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        inside = value
        while True:
            place = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside))) if inside else None
            if place is None or not isinstance(inside[place], dict | list) or rng.random() < 0.5:
                break
            inside = inside[place]
        if place is None:
            break
        action = rng.random()
        if action < 0.6:
            inside[place] = rng.choice(ODD)
        elif action < 0.8:
            inside.pop(place)
        elif isinstance(inside, dict):
            inside[rng.choice([place + "x", "weight", "", "n\n", rng.choice(list(inside))])] = inside[place]
        else:
            inside.append(inside[place])
    return json.dumps(value).encode()


def change_number(rng, data):
    """One of a config's whole numbers is another one."""
    fields = json.loads(data)
    numbers = [name for name, value in fields.items() if type(value) is int]
    if numbers:
        fields[rng.choice(numbers)] = rng.choice([value for value in ODD if type(value) is int])
    return json.dumps(fields).encode()


def double_key(rng, data):
    """A key that is there a second time, with another value: the first one's place in the text is the front."""
    fields = json.loads(data)
    key = rng.choice(list(fields))
    return (b"{" + json.dumps(key).encode() + b": " + json.dumps(rng.choice(ODD)).encode() + b", "
            + data.lstrip().removeprefix(b"{"))  # fmt: skip


def whole_json(rng, data):
    return json.dumps(rng.choice(ODD)).encode() if rng.random() < 0.5 else b'{"a":' * rng.choice([10, 900, 990, 10**5])


def flip_header(rng, data):
    return flip(rng, data, within=8 + int.from_bytes(data[:8], "little"))


def header_length(rng, data):
    length = int.from_bytes(data[:8], "little")
    length = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), 10**8, 2**31, 2**63, 2**64 - 1,
                         rng.randrange(2 * length)])  # fmt: skip
    return length.to_bytes(8, "little") + data[8:]


def change_header(rng, data):
    end = 8 + int.from_bytes(data[:8], "little")
    header = rng.choice([change_json, change_json, double_key])(rng, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]


def crowd(rng, data):
    """Many tensors more, or a list as long: parsed, each takes many times its bytes."""
    number, end = rng.choice([10_000, 80_000]), 8 + int.from_bytes(data[:8], "little")
    tensors = (f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},'.encode() for i in range(number))
    header = b"{" + b"".join(tensors) + data[9:end]
    return len(header).to_bytes(8, "little") + header + data[end:]


def crowd_json(rng, data):
    return data.rstrip().removesuffix(b"}") + b', "more": [' + b"[]," * rng.choice([10_000, 1_500_000]) + b"[]]}"


DAMAGE = {
    ".json": (flip, cut, change_json, change_json, change_json, change_number, change_number, double_key, whole_json,
              crowd_json),
    ".safetensors": (flip_header, flip_header, flip_header, cut, header_length, change_header, change_header, crowd),
}


def attempt(folder):
    """"loaded", "refused" or what is wrong about it."""
    start, outcome = time.perf_counter(), "loaded"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NaN weights
            model = load_model(folder)
        model.config.vocab_size + len(model.sites)
    except InputError as error:
        outcome = "refused"
        if "\n" in str(error) or len(str(error)) > 3000:
            return f"the message is no line: {str(error)[:3000]!r}"
        if "allocate" in str(error):
            return f"tried to take too much memory: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return f"took {seconds:.1f} s" if seconds > MOST_SECONDS else outcome


def fuzz(root):
    """Damages one file at a time and puts it back. Returns how many loaded, how many did not, and what was wrong."""
    torch.set_num_threads(1)
    rng, folders, wrong, outcomes = random.Random(0), sorted(root.iterdir()), [], []
    for folder in folders:
        assert attempt(folder) == "loaded", folder
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for number in range(TOTAL):
        folder = folders[number % len(folders)]
        path = rng.choice(sorted(folder.iterdir()) + [folder / "config.json"] * 2)
        damage, before = rng.choice(DAMAGE[path.suffix]), path.read_bytes()
        after = damage(rng, before)
        path.write_bytes(after)
        outcomes.append(attempt(folder))
        if outcomes[-1] not in ("loaded", "refused"):
            wrong.append(f"{number} {folder.name}/{path.name} {damage.__name__}: {outcomes[-1]}")
        path.write_bytes(before)
    for folder in folders:
        assert attempt(folder) == "loaded", folder
    return outcomes.count("loaded"), outcomes.count("refused"), wrong


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_every_damaged_folder_loads_or_is_refused(tmp_path):
    missed = make_folders(tmp_path)
    assert not missed, missed
    run = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    loaded, refused, wrong = json.loads(run.stdout)
    assert not wrong, f"{len(wrong)} of {TOTAL}: " + "\n".join(wrong[:20])
    assert loaded + refused == TOTAL and min(loaded, refused) > TOTAL / 5


if __name__ == "__main__":
    print(json.dumps(fuzz(Path(sys.argv[1]))))
