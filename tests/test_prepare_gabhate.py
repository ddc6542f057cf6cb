"""Does prepare_gabhate.py give the published task, and refuse rows it cannot read?"""

import prepare_gabhate
from prepared import assert_bad_row, assert_published, assert_refused, examples, facts, labels, prepare, write_table

# First digits of the sha256 of the published code's files on `ROWS`.
MADE_UP_SHA256 = {"gabhate": {"leaked": "b613ed58b47735ec", "no_leak": "fca608c185fc9426"}}

HEADER = ["ID", "Annotator", "Text", "Hate", "HD", "CV", "VO", "REL", "RAE", "SXO", "GEN", "IDL", "NAT", "POL", "MPH",
          "EX", "IM"]


def row(i, user, hate, text='My "soup"\tis\nwarm.'):
    return [str(i), user, f"{i}. {text}", hate, hate, *("0" for _ in HEADER[5:])]


ROWS = [
    *(row(30 - i, user, str(int(i % k == 0))) for i in range(30) for user, k in (("4", 2), ("11", 3)) if i % (k + 1)),
    row(19, "11", "1"),                                                   # 11's second view of post 19
    row(40, "0", "0", "Soup' for ``two``, é 🍲"),                          # one example: dropped
]


def write_raw(folder, header=HEADER, rows=ROWS, delimiter="\t"):
    write_table(folder / "gabhate" / prepare_gabhate.FILE, header, rows, delimiter)


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_gabhate, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def test_labels_texts_and_the_last_of_two_views(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_gabhate, tmp_path / "raw", tmp_path / "out")
    found = examples(task)
    assert found["4", "28"] == ('28. My "soup"\tis\nwarm.', ["Hateful"])
    assert found["4", "29"][1] == ["Non-hateful"] and ("0", "40") not in found
    assert found["11", "19"][1] == ["Hateful"] and facts(task)["annotations_replaced"] == 1


def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, capsys):
    good = row(0, "4", "1")
    for bad, reason in (
        (row(50, "4", "2"), "column 'Hate' is neither 0 nor 1"),
        (["50", "4", "  ", *good[3:]], "column 'Text' is empty"),
        (["50", "", *good[2:]], "column 'Annotator' is empty"),
        (["50", *good[1:-1]], "a row of 16 fields, but the header has 17"),
    ):
        write_raw(tmp_path / "raw", rows=[good, bad, *ROWS])
        task = assert_bad_row(prepare_gabhate, tmp_path, capsys, "line 4", reason)
        assert ("4", "50") not in labels(task)


def test_a_missing_column_and_another_delimiter_are_named(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=["ID", "Annotator", "Text", "Hateful", *HEADER[4:]])
    assert_refused(prepare_gabhate, tmp_path, capsys, "line 1", "missing column 'Hate'")
    write_raw(tmp_path / "raw", delimiter=",")
    assert_refused(prepare_gabhate, tmp_path, capsys, "line 1", "needed columns separated by '\\t'", "by ','")
