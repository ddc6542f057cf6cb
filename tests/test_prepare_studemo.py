"""Does prepare_studemo.py give the published multi-label task, count what it skips, and say clearly what is wrong?"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import prepare_studemo
import pytest
from common import main

ROOT = Path(__file__).resolve().parents[1]
RAW = Path(os.environ.get("MINIPEFT_RAW") or ROOT.parent / "shared/data/raw")
needs_raw = pytest.mark.skipif(
    not (RAW / "studemo").is_dir(), reason="no studemo folder in $MINIPEFT_RAW or ../shared/data/raw"
)

# sha256 of the published code's files on the real raw files (their first 16 digits).
PUBLISHED_SHA256 = {"user_data_leaked.json": "ad806ca59166bdaf", "user_data_no_leak.json": "59e0475a995c2378"}

TEXT_HEADER = ["text_id", "text"]
TEXTS = [[str(i), f"The soup number {i} was warm.\nThe bread, too."] for i in range(30)]
HEADER = ["text_id", "annotator_id", *prepare_studemo.LABELS]


def annotation(text_id, user, **values):
    """One raw row; labels that are not named are 0.0."""
    return [str(text_id), user, *(str(float(values.get(label, 0))) for label in prepare_studemo.LABELS)]


ROWS = [
    *(annotation(i, "7", joy=1 + i % 3, trust=i % 2, valence=3 * (i % 2) - 2) for i in range(25)),
    *(annotation(i, "12", sadness=i % 4, arousal=1) for i in range(29, 4, -1)),
    *(annotation(i, "3", fear=2) for i in range(4)),                  # four examples: dropped
    annotation(28, "7", valence=-2),                                  # no label at 1 or above: skipped
    annotation(29, "7"),
]


def write_raw(folder, header=HEADER, rows=ROWS, texts=TEXTS):
    for name, lines in {"annotation_data.csv": [header, *rows], "text_data.csv": [TEXT_HEADER, *texts]}.items():
        path = folder / "studemo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def prepare(raw, out, *options):
    argv = ["--raw", str(raw), "--out", str(out), *options]
    assert main(prepare_studemo.SOURCE, prepare_studemo.read_tasks, argv) == 0
    return out / "studemo"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_raw
def test_real_files_are_those_of_the_published_code(tmp_path):
    task = prepare(RAW, tmp_path, "--layout", "original")
    for name, sha256 in PUBLISHED_SHA256.items():
        assert hashlib.sha256((task / name).read_bytes()).hexdigest().startswith(sha256), name


@needs_raw
def test_real_statistics(tmp_path):
    task = json.loads((prepare(RAW, tmp_path) / "task.json").read_text())
    facts = task["statistics"]
    assert (facts["users"], facts["texts"], facts["pairs"], facts["users_kept"]) == (25, 5163, 7411, 25)
    assert sum(facts["rows_skipped"].values()) == 7463 - 7411
    assert facts["examples_per_user"] == pytest.approx(296.44) and round(facts["users_per_text"], 2) == 1.44
    assert round(facts["krippendorff_alpha_masi"], 3) == 0.164
    assert facts["label_counts"] == {
        "arousal": 5886, "anger": 3150, "valence": 3090, "joy": 2616, "trust": 2613, "anticipation": 2328,
        "disgust": 2302, "sadness": 1963, "surprise": 1668, "fear": 1273,
    }
    assert task["labels"] == sorted(facts["label_counts"]) and task["multi_label"]


def test_a_label_counts_from_one_and_negative_valence_is_none(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(tmp_path / "raw", tmp_path / "out")
    lines = [json.loads(line) for name in ("train", "val", "test") for line in (task / f"{name}.jsonl").open()]
    labels = {(line["user"], line["id"]): line["label"] for line in lines}
    assert labels["7", "2"] == ["joy"]                                # trust 0, valence -2
    assert labels["7", "3"] == ["joy", "trust", "valence"]            # in the order of the columns
    assert labels["12", "8"] == ["arousal"] and labels["12", "9"] == ["sadness", "arousal"]
    assert {line["text"] for line in lines} <= {text for _, text in TEXTS}


def test_users_with_few_examples_are_dropped_and_rows_without_label_skipped_and_both_counted(tmp_path, capsys):
    write_raw(tmp_path / "raw")
    facts = json.loads((prepare(tmp_path / "raw", tmp_path / "out") / "task.json").read_text())["statistics"]
    assert (facts["users"], facts["users_kept"], facts["pairs"]) == (3, 2, 54)
    assert facts["users_dropped"] == {"fewer than 10 examples": {"3": 4}}
    assert facts["rows_skipped"] == {"no label at 1 or above": 2, "labelled before by this user": 0}
    assert sum(facts["split_sizes"]["leaked"].values()) == sum(facts["split_sizes"]["no_leak"].values()) == 50
    line = capsys.readouterr().out
    assert "rows skipped: 2" in line and "users dropped (fewer than 10 examples): 1" in line


def test_users_with_an_empty_split_are_listed(tmp_path):
    """Ten examples with ten different labels: of a label seen once, the only example goes to val."""
    rows = [annotation(i, "5", **{label: 1}) for i, label in enumerate(prepare_studemo.LABELS)]
    write_raw(tmp_path / "raw", rows=[*ROWS, *rows])
    listed = {"5": {"train": 0, "val": 10, "test": 0}}
    original = prepare(tmp_path / "raw", tmp_path / "original", "--layout", "original")
    assert json.loads((original / "users-with-empty-dataset-splits.json").read_text())["leaked"] == listed
    task = json.loads((prepare(tmp_path / "raw", tmp_path / "jsonl") / "task.json").read_text())
    assert task["statistics"]["users_with_empty_split"]["leaked"] == listed


def test_same_bytes_on_every_run(tmp_path):
    write_raw(tmp_path / "raw")
    script = [sys.executable, str(ROOT / "data_scripts/prepare_studemo.py"), "--raw", str(tmp_path / "raw"), "--out"]
    for seed in ("0", "1"):
        subprocess.run([*script, str(tmp_path / seed)], check=True, capture_output=True,
                       env=os.environ | {"PYTHONHASHSEED": seed})
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1") != {}


# What is wrong -> (what write_raw is given, what the message says). Every text takes two lines of text_data.csv.
BAD_FILES = {
    "no label column": (
        {"header": [*HEADER[:-1], "excitement"]}, ["annotation_data.csv, line 1", "missing column 'arousal'"]),
    "no texts": ({"texts": []}, ["text_data.csv", "no rows"]),
    "a text without words": ({"texts": [*TEXTS[:4], ["4"]]}, ["text_data.csv, line 10", "1 fields"]),
    "a text id twice": ({"texts": [*TEXTS, TEXTS[0]]}, ["text_data.csv, line 62", "came before"]),
    "no text of an id": ({"texts": TEXTS[:25]}, ["annotation_data.csv, line 27", "no text"]),
    "not a number": ({"rows": [[*ROWS[0][:-1], "much"]]}, ["annotation_data.csv, line 2", "'arousal'", "not a number"]),
    "not finite": ({"rows": [[*ROWS[0][:-1], "nan"]]}, ["annotation_data.csv, line 2", "'arousal'", "not a number"]),
    "a short row": ({"rows": [ROWS[0], ROWS[1][:-1]]}, ["annotation_data.csv, line 3", "11 fields"]),
    "no labels at all": ({"rows": [annotation(1, "7")]}, ["no user of studemo has 10 examples"]),
}


@pytest.mark.parametrize("files, expected", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_one_clear_line_and_writes_nothing(tmp_path, capsys, files, expected):
    write_raw(tmp_path / "raw", **files)
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert main(prepare_studemo.SOURCE, prepare_studemo.read_tasks, argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "" and not (tmp_path / "out").exists()
    for part in expected:
        assert part in captured.err
    assert "soup" not in captured.err                                 # never a text


def test_missing_text_file(tmp_path, capsys):
    write_raw(tmp_path / "raw")
    (tmp_path / "raw/studemo/text_data.csv").unlink()
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert main(prepare_studemo.SOURCE, prepare_studemo.read_tasks, argv) == 2
    assert "text_data.csv: No such file" in capsys.readouterr().err
