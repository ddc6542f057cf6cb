"""Does prepare_goemotion.py map emotions as published, leave out what names none, and refuse broken rows?"""

import json

import prepare_goemotion
import pytest
from prepared import (
    RAW,
    assert_bad_row,
    assert_published,
    assert_refused,
    facts,
    labels,
    needs_raw,
    prepare,
    write_table,
)

# First digits of the sha256 of the published code's files on `ROWS`, an example's labels sorted in them: that code
# leaves them in the order of a set of strings.
MADE_UP_SHA256 = {"goemotion": {"leaked": "84b607bebec21178", "no_leak": "302ac931c9591c6f"}}

EMOTIONS = [*sorted(prepare_goemotion.LABEL_OF), "neutral"]               # the order of the official columns
HEADER = ["text", "id", "author", "subreddit", "link_id", "parent_id", "created_utc", "rater_id",
          "example_very_unclear", *EMOTIONS]


def row(i, rater, *emotions, **cells):
    return list(({
        "text": f'The "soup" number {i}, warm!', "id": f"e{i * 13 % 100:02}", "author": "cook", "subreddit": "soups",
        "link_id": "t3_a", "parent_id": "t1_b", "created_utc": "1548381039.0", "rater_id": rater,
        "example_very_unclear": str(not emotions),
    } | {emotion: str(int(emotion in emotions)) for emotion in EMOTIONS} | cells).values())


ROWS = [
    *(row(i, "37", EMOTIONS[i % 27]) for i in range(27)),                 # every emotion once
    *(row(i, "9", EMOTIONS[i % 27], EMOTIONS[(5 * i + 3) % 27]) for i in range(40, 0, -1)),
    row(50, "9", "joy", "love", "amusement"),                             # three emotions, one of Ekman's
    row(51, "9"),                                                         # very unclear
    row(52, "9", "neutral"),
    row(53, "9", "anger", "neutral"),
    row(53, "9", "fear"),                                                 # the first that counts
    row(53, "9", "disgust"),
    row(50, "9", "neutral"),
    row(60, "4", "joy"),                                                  # one example: dropped
]


def write_raw(folder, header=HEADER, rows=ROWS):
    third = len(rows) // 3
    for number, part in enumerate((rows[:third], rows[third:-third], rows[-third:]), start=1):
        write_table(folder / f"goemotion/goemotions_{number}.csv", header, part, line_end="\r\n")


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_goemotion, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


@needs_raw("goemotion")
def test_the_map_to_ekmans_emotions_is_the_official_one():
    official = json.loads((RAW / "goemotion/ekman_mapping.json").read_text())
    assert {label: set(emotions) for label, emotions in prepare_goemotion.EKMAN.items()} == {
        label: set(emotions) for label, emotions in official.items()}


def test_every_emotion_becomes_one_of_ekmans_and_the_same_ones_join(tmp_path):
    write_raw(tmp_path / "raw")
    found = labels(prepare(prepare_goemotion, tmp_path / "raw", tmp_path / "out"))
    for label, emotions in prepare_goemotion.EKMAN.items():
        for emotion in emotions:
            assert found["37", f"e{EMOTIONS.index(emotion) * 13 % 100:02}"] == [label]
    assert found["9", "e50"] == ["joy"]
    assert found["9", "e47"] == ["fear", "joy"]                           # joy and nervousness: sorted


def test_neutral_unclear_and_repeated_annotations_are_left_out_and_counted(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_goemotion, tmp_path / "raw", tmp_path / "out")
    found = labels(task)
    assert found["9", "e89"] == ["fear"]
    assert ("9", "e63") not in found and ("9", "e76") not in found and ("4", "e80") not in found
    assert facts(task)["rows_skipped"] == {"neutral": 3, "no emotion": 1, "labelled before by this user": 1}


def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, capsys):
    for cells, reason in (
        ({"joy": "2"}, "a column of an emotion is neither 0 nor 1"),
        ({"text": " "}, "column 'text' is empty"),
    ):
        write_raw(tmp_path / "raw", rows=[*ROWS, row(61, "9", "joy", **cells)])
        task = assert_bad_row(prepare_goemotion, tmp_path, capsys, "goemotions_3.csv, line 26", reason)
        assert ("9", "e93") not in labels(task)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_three_files_are_needed(tmp_path, capsys, number):
    write_raw(tmp_path / "raw")
    (tmp_path / f"raw/goemotion/goemotions_{number}.csv").unlink()
    assert_refused(prepare_goemotion, tmp_path, capsys, f"goemotions_{number}.csv", "storage.googleapis.com")


def test_a_missing_column_is_named(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=[*HEADER[:-1], "calm"])
    assert_refused(prepare_goemotion, tmp_path, capsys, "goemotions_1.csv, line 1", "missing column 'neutral'")
