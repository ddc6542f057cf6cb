"""Does prepare_measuringhatespeech.py give the published task from Parquet and from CSV, and refuse broken rows?"""

import hashlib
import json
import shutil
import sys

import prepare_measuringhatespeech
import pytest
from prepared import (
    RAW,
    assert_bad_row,
    assert_published,
    assert_refused,
    examples,
    facts,
    labels,
    needs_raw,
    prepare,
    write_table,
)

# First digits of the sha256 of the published code's files on `ROWS`.
MADE_UP_SHA256 = {"measuringhatespeech": {"leaked": "dc7a94e9ad7d609e", "no_leak": "4986c504a3c20ea4"}}

HEADER = ["comment_id", "annotator_id", "platform", "sentiment", "hatespeech", "hate_speech_score", "text"]


def row(i, user, hatespeech, text='The "soup", they say,\nis warm 🍲.'):
    return [1005 - i, user, 3, 0.0, hatespeech, -3.9, f"{i}. {text}"]


ROWS = [
    *(row(i, user, float(i % k)) for i in range(30) for user, k in ((10873, 3), (2790, 2)) if i % (k + 1)),
    row(19, 2790, 2.0),                                                   # 2790's second view of comment 19
    row(40, 8, 0.0),                                                      # one example: dropped
]


def write_csv(folder, header=HEADER, rows=ROWS):
    path = folder / "measuringhatespeech" / prepare_measuringhatespeech.CSV
    write_table(path, header, rows)
    return path


def write_parquet(folder, header=HEADER, rows=ROWS):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / "measuringhatespeech" / prepare_measuringhatespeech.PARQUET
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(zip(header, map(list, zip(*rows))))), path, row_group_size=7)
    return path


@pytest.mark.parametrize("write_raw", [write_csv, write_parquet])
def test_made_up_files_are_those_of_the_published_code(tmp_path, write_raw):
    write_raw(tmp_path / "raw")
    assert_published(prepare_measuringhatespeech, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


@pytest.mark.parametrize("write_raw", [write_csv, write_parquet])
def test_float_labels_texts_and_the_last_of_two_views(tmp_path, write_raw):
    path = write_raw(tmp_path / "raw")
    task = prepare(prepare_measuringhatespeech, tmp_path / "raw", tmp_path / "out")
    assert json.loads((task / "task.json").read_text())["raw_sha256"] == {
        f"measuringhatespeech/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()}
    found = examples(task)
    assert found["10873", "1003"] == ('2. The "soup", they say,\nis warm 🍲.', ["2"])
    assert found["10873", "1004"][1] == ["1"] and found["10873", "1002"][1] == ["0"]
    assert found["2790", "986"][1] == ["2"] and facts(task)["annotations_replaced"] == 1
    assert ("8", "965") not in found


@pytest.mark.parametrize("write_raw", [write_csv, write_parquet])
def test_line_ends_inside_a_text_stay(tmp_path, write_raw):
    write_raw(tmp_path / "raw", rows=[*ROWS, row(50, 2790, 0.0, "soup\r\nand,\rsoup")])
    found = examples(prepare(prepare_measuringhatespeech, tmp_path / "raw", tmp_path / "out"))
    assert found["2790", "955"][0] == "50. soup\r\nand,\rsoup"


@pytest.mark.parametrize("write_raw", [write_csv, write_parquet])
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, capsys, write_raw):
    for bad, reason in (
        (row(50, 2790, 1.5), "column 'hatespeech' is none of 0, 1, 2"),
        ([*row(50, 2790, 1.0)[:-1], " "], "column 'text' is empty"),
        ([*row(50, 2790, 1.0)[:-1], None], "column 'text' is empty"),
        ([*row(50, None, 1.0)], "column 'annotator_id' is empty"),
    ):
        write_raw(tmp_path / "raw", rows=[bad, *ROWS])
        where = "speech.csv, line 2" if write_raw is write_csv else "speech.parquet, row 1"
        task = assert_bad_row(prepare_measuringhatespeech, tmp_path, capsys, where, reason)
        assert ("2790", "955") not in labels(task)


@pytest.mark.parametrize("write_raw", [write_csv, write_parquet])
def test_a_missing_column_is_named(tmp_path, capsys, write_raw):
    write_raw(tmp_path / "raw", header=[*HEADER[:4], "hate", *HEADER[5:]])
    assert_refused(prepare_measuringhatespeech, tmp_path, capsys, "missing column 'hatespeech'")


def test_a_file_cut_off_and_a_missing_file(tmp_path, capsys):
    path = write_parquet(tmp_path / "raw")
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(prepare_measuringhatespeech, tmp_path, capsys, "not a whole Parquet file", "Copy it again")
    path.unlink()
    assert_refused(prepare_measuringhatespeech, tmp_path, capsys, "measuring-hate-speech.parquet", "huggingface.co")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, capsys, monkeypatch):
    path = write_csv(tmp_path / "raw")
    path.rename(path.with_name(prepare_measuringhatespeech.PARQUET))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(prepare_measuringhatespeech, tmp_path, capsys, "Parquet needs pyarrow", "pip install pyarrow")


@needs_raw("measuringhatespeech")
def test_the_columns_are_those_of_the_official_excerpt(tmp_path, capsys):
    """Its 99 rows are read; no user in them has ten, so that is what it is refused for."""
    folder = tmp_path / "raw/measuringhatespeech"
    folder.mkdir(parents=True)
    shutil.copy(RAW / "measuringhatespeech/measuring-hate-speech.schema_sample.csv",
                folder / prepare_measuringhatespeech.CSV)
    assert_refused(prepare_measuringhatespeech, tmp_path, capsys, "no user of measuringhatespeech has 10 examples")
