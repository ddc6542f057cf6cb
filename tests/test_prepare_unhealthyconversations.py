"""Does prepare_unhealthyconversations.py give the published task, and refuse rows it cannot read?"""

import prepare_unhealthyconversations
from prepared import assert_bad_row, assert_published, assert_refused, examples, facts, labels, prepare, write_table

# First digits of the sha256 of the published code's files on `ROWS`.
MADE_UP_SHA256 = {"unhealthyconversations": {"leaked": "77c9d51c39567469", "no_leak": "b6a7c079876f4005"}}

# The published code reads by position: 0, 1, 3 and 9.
HEADER = ["_unit_id", "comment", "_trust", "_worker_id", "antagonise", "condescending", "dismissive", "generalisation",
          "generalisation_unfair", "healthy", "hostile", "sarcastic"]


def row(i, user, healthy, text='In "our" town, soup\nis free.'):
    return [str(1739450000 + i), f"{i}. {text}", "0.788", user, "0", "0", "0", "0", "0", healthy, "0", "1"]


ROWS = [
    *(row(i, user, str(int(i % k > 0))) for i in range(30) for user, k in (("43893033", 2), ("7", 3)) if i % (k + 1)),
    row(19, "7", "0"),                                                    # 7's second view of comment 19
    row(40, "8", "0"),                                                    # one example: dropped
]


def write_raw(folder, header=HEADER, rows=ROWS):
    write_table(folder / "unhealthyconversations" / prepare_unhealthyconversations.FILE, header, rows)


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_unhealthyconversations, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def test_labels_texts_and_the_first_of_two_views(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_unhealthyconversations, tmp_path / "raw", tmp_path / "out")
    found = examples(task)
    assert found["43893033", "1739450001"] == ('1. In "our" town, soup\nis free.', ["healthy"])
    assert found["43893033", "1739450002"][1] == ["unhealthy"] and ("8", "1739450040") not in found
    assert found["7", "1739450019"][1] == ["healthy"]
    assert facts(task)["rows_skipped"] == {"labelled before by this user": 1}


def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, capsys):
    good = row(0, "7", "1")
    for bad, reason in (
        (row(50, "7", ""), "column 'healthy' is neither 0 nor 1"),
        (["1739450050", " ", *good[2:]], "column 'comment' is empty"),
    ):
        write_raw(tmp_path / "raw", rows=[good, bad, *ROWS])
        task = assert_bad_row(prepare_unhealthyconversations, tmp_path, capsys, "line 4", reason)
        assert ("7", "1739450050") not in labels(task)


def test_a_missing_column_is_named(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=[*HEADER[:9], "polite", *HEADER[10:]])
    assert_refused(prepare_unhealthyconversations, tmp_path, capsys, "line 1", "missing column 'healthy'")
