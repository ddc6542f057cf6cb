"""Does prepare_subjectivediscourse.py give the three published tasks from one file, and refuse rows it cannot read?"""

import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import prepare_subjectivediscourse
import pytest
from prepared import (
    RAW,
    assert_bad_row,
    assert_counts,
    assert_published,
    assert_refused,
    examples,
    facts,
    labels,
    needs_raw,
    prepare,
    write_table,
)

RESPONSE, QUESTION_SENTIMENT, RESPONSE_SENTIMENT = prepare_subjectivediscourse.SOURCE.tasks

# First digits of the sha256 of the published code's files: on the real file, and on `ROWS`.
REAL_SHA256 = {
    RESPONSE: {"leaked": "fe645b48e5c02f5b", "no_leak": "4b310a2c0014f78d"},
    QUESTION_SENTIMENT: {"leaked": "0eee587c741df172", "no_leak": "d129d9a6d3a198aa"},
    RESPONSE_SENTIMENT: {"leaked": "6730d13b78786195", "no_leak": "003c673d59d3ab4c"},
}
MADE_UP_SHA256 = {
    RESPONSE: {"leaked": "e18762ec5ae8365a", "no_leak": "9367a8c7416f5941"},
    QUESTION_SENTIMENT: {"leaked": "c45c384128090550", "no_leak": "0e0ad17df4e9ca7a"},
    RESPONSE_SENTIMENT: {"leaked": "51af1d2ace872d17", "no_leak": "1e3dda9f7f1e1264"},
}

# The official file has 186 columns, of which the first has no name; these are the first 22.
HEADER = ["", "hearing_id", "hearing_title", "qa_index", "q_speaker", "q_speaker_detail", "q_text", "r_speaker_detail",
          "r_text", "hit_order", "gold_label_set", "gold_coarse_labels", "gold_act_set", "gold_acts", "gold_intent_set",
          "gold_intents", "gold_fine_labels", "gold_workers", "gold_sentiments", "gold_explanations", "gold_q_intents",
          "gold_q_sentiments"]
RESPONSES = prepare_subjectivediscourse.RESPONSES
SPELLINGS = ("veryNegative", "negative", "somewhatNegative", "neutral", "somewhatPositive", "positive", "veryPositive")


def row(i, workers, **cells):
    """A raw row; `cells` replace what it would hold in the columns of these names."""
    people = range(len(workers))
    return list((dict.fromkeys(HEADER, "x") | {
        "qa_index": f"hearing-{i}", "q_speaker_detail": "A (host)", "q_text": f'Was the "soup" number {i} warm?',
        "r_speaker_detail": "B (cook)", "r_text": "It was\tnot cold.", "gold_workers": str(tuple(workers)),
        "gold_coarse_labels": str(tuple(RESPONSES[(i * p + i) % 6] for p in people)),
        "gold_sentiments": str(tuple(SPELLINGS[(i + p) % 7] for p in people)),
        "gold_q_sentiments": str(tuple(SPELLINGS[(2 * i + p) % 7] for p in people)),
    } | cells).values())


ROWS = [
    *(row(i, ("ann", "ben", "cleo")[: 1 + i % 3]) for i in range(40)),
    row(3, ("ben", "dora")),                                              # ben's second reading of number 3
]


def write_raw(folder, header=HEADER, rows=ROWS):
    write_table(folder / "subjectivediscourse" / prepare_subjectivediscourse.FILE, header, rows, delimiter="\t")


@needs_raw("subjectivediscourse")
def test_real_files_are_those_of_the_published_code(tmp_path):
    assert_published(prepare_subjectivediscourse, RAW, tmp_path, REAL_SHA256)


@needs_raw("subjectivediscourse")
def test_real_statistics(tmp_path):
    prepare(prepare_subjectivediscourse, RAW, tmp_path)
    size = {"users": 68, "texts": 1000, "pairs": 6206, "kept": 37}
    assert_counts(tmp_path / RESPONSE, **size, alpha=0.494, labels={
        "answer": 3518, "shift-dodge": 1262, "shift-correct": 512, "cant-answer-sincere": 486, "cant-answer-lying": 229,
        "answer_overans-sway": 199,
    })
    assert_counts(tmp_path / QUESTION_SENTIMENT, **size, alpha=0.008, labels={
        "neutral": 2918, "positive": 1070, "somewhat-positive": 990, "somewhat-negative": 631, "negative": 314,
        "very-negative": 152, "very-positive": 131,
    })
    assert_counts(tmp_path / RESPONSE_SENTIMENT, **size, alpha=0.013, labels={
        "neutral": 2236, "somewhat-negative": 914, "somewhat-positive": 903, "negative": 902, "positive": 649,
        "very-negative": 517, "very-positive": 85,
    })


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_subjectivediscourse, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def write_archive(folder):
    """The file in a folder of the official archive, as --download leaves it; returns the archive's path."""
    write_raw(folder)
    path = folder / "subjectivediscourse" / prepare_subjectivediscourse.FILE
    archive = path.with_name("gold_full_data.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, f"gold/{path.name}")
        tar.add(path, "gold/another.tsv")
    path.unlink()
    return archive


def test_the_archive_is_read_as_it_is(tmp_path):
    archive = write_archive(tmp_path / "raw")
    assert_published(prepare_subjectivediscourse, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)
    task = json.loads((tmp_path / "out" / RESPONSE / "task.json").read_text())
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert task["raw_sha256"] == {"subjectivediscourse/gold_full_data.tar.gz": sha256}


def test_an_archive_cut_off_or_without_the_file(tmp_path, capsys):
    archive = write_archive(tmp_path / "raw")
    whole = archive.read_bytes()
    for content, reason in ((whole[:-20], "not a whole gzip file"), (whole[:60], "not a whole gzip file"),
                            (gzip.compress(b"soup" * 1000), "not a whole tar archive")):
        archive.write_bytes(content)
        assert_refused(prepare_subjectivediscourse, tmp_path, capsys, f"gold_full_data.tar.gz: {reason}")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(Path(__file__), "another.tsv")
    assert_refused(prepare_subjectivediscourse, tmp_path, capsys, "gold_full_data.tar.gz: holds no 'with_features")


def test_three_tasks_of_one_row(tmp_path):
    write_raw(tmp_path / "raw")
    prepare(prepare_subjectivediscourse, tmp_path / "raw", tmp_path / "out")
    key = ("ben", "hearing-5")
    text = 'A (host) \n Was the "soup" number 5 warm? \n B (cook) \n It was\tnot cold.'
    found = {task: examples(tmp_path / "out" / task)[key] for task in REAL_SHA256}
    assert found == {RESPONSE: (text, ["shift-correct"]), QUESTION_SENTIMENT: (text, ["somewhat-positive"]),
                     RESPONSE_SENTIMENT: (text, ["very-positive"])}
    for task in REAL_SHA256:
        assert {label for own in labels(tmp_path / "out" / task).values() for label in own} <= set(
            RESPONSES if task == RESPONSE else prepare_subjectivediscourse.SENTIMENTS)


def test_a_second_reading_by_one_person_replaces_the_first(tmp_path):
    write_raw(tmp_path / "raw", rows=[*ROWS[:-1], row(4, ("ben",), gold_coarse_labels="('answer',)")])
    task = prepare(prepare_subjectivediscourse, tmp_path / "raw", tmp_path / "out")
    assert labels(task)["ben", "hearing-4"] == ["answer"] and facts(task)["annotations_replaced"] == 1


BAD_ROWS = {
    "not a tuple": ({"gold_workers": "ann"}, "column 'gold_workers': not a tuple of strings"),
    "a string": ({"gold_workers": "'ann'"}, "column 'gold_workers': not a tuple of strings"),
    "of numbers": ({"gold_workers": "(1, 2)"}, "column 'gold_workers': not a tuple of strings"),
    "too few labels": ({"gold_q_sentiments": "('neutral',)"}, "column 'gold_q_sentiments': not as many labels"),
    "unknown response": ({"gold_coarse_labels": "('answer', 'sing')"}, "an unknown label"),
    "unknown sentiment": ({"gold_sentiments": "('neutral', 'blue')"}, "an unknown label"),
    "no text": (dict.fromkeys(prepare_subjectivediscourse.TEXT_COLUMNS, ""), "no text"),
}


@pytest.mark.parametrize("cells, reason", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_or_left_out_of_all_tasks_and_counted(tmp_path, capsys, cells, reason):
    write_raw(tmp_path / "raw", rows=[*ROWS, row(77, ("ann", "ben"), **cells)])
    assert_bad_row(prepare_subjectivediscourse, tmp_path, capsys, "line 43", reason)
    for task in REAL_SHA256:
        assert sum(facts(tmp_path / "out" / task)["bad_rows"].values()) == 1
        assert ("ann", "hearing-77") not in labels(tmp_path / "out" / task)


def test_a_missing_column_is_named(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=[*HEADER[:-1], "q_mood"])
    assert_refused(prepare_subjectivediscourse, tmp_path, capsys, "line 1", "missing column 'gold_q_sentiments'")
