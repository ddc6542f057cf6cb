"""Does prepare_epic.py give the published task, missing texts included, and refuse rows it cannot read?"""

import prepare_epic
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

# First digits of the sha256 of the published code's files: on the real subset, and on `ROWS`.
REAL_SHA256 = {"epic": {"leaked": "5145becf2cdff21c", "no_leak": "e11800fc05387108"}}
MADE_UP_SHA256 = {"epic": {"leaked": "1e9397a6b26b9850", "no_leak": "469d4e4e58a8f216"}}

HEADER = ["user", "label", "id_original", "text", "parent_text", "Age"]


def row(i, user, /, **cells):
    return list(({
        "user": user, "label": "iro" if i % 3 else "not", "id_original": f"t{i * 7 % 50}",
        "text": f'No, the "soup" {i} is\nlukewarm, sorry.', "parent_text": f"Is soup {i} warm? 🍲", "Age": "31.0",
    } | cells).values())


ROWS = [
    *(row(i, user) for i in range(28, 0, -1) for user in ("5f0a", "60bb")[i % 2:]),
    *(row(i, "5e9c", text=text) for i, text in enumerate(("", "NA", "null", "None", "n/a", "nil", "N/A ", "nothing"))),
    *(row(i, "5e9c", parent_text="") for i in range(10, 14)),
    row(14, "60bb", label="not"),                                         # 60bb's second label of the reply to 14
    row(1, "57aa"),                                                       # one example: dropped
]


def write_raw(folder, header=HEADER, rows=ROWS, name="EPICorpus.csv"):
    write_table(folder / "epic" / name, header, rows, line_end="\r\n")


@needs_raw("epic")
def test_real_files_are_those_of_the_published_code(tmp_path):
    assert_published(prepare_epic, RAW, tmp_path, REAL_SHA256)


@needs_raw("epic")
def test_real_statistics(tmp_path):
    assert_counts(prepare(prepare_epic, RAW, tmp_path), users=74, texts=1079, pairs=5073, kept=74, alpha=0.197,
                  labels={"Non-ironic": 3497, "Ironic": 1576})


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_epic, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def test_message_and_reply_labels_and_the_last_of_two_labels(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_epic, tmp_path / "raw", tmp_path / "out")
    found = examples(task)
    assert found["5f0a", "t14"] == (
        'message: "Is soup 2 warm? 🍲"\n\nreply: "No, the "soup" 2 is\nlukewarm, sorry."', ["Ironic"])
    assert found["5f0a", "t42"][1] == ["Non-ironic"] and ("57aa", "t7") not in found
    assert found["60bb", "t48"][1] == ["Non-ironic"] and facts(task)["annotations_replaced"] == 1


@pytest.mark.parametrize("line_end", ["\r\n", "\n", "\r"])
def test_line_ends_inside_a_text_stay_as_pandas_leaves_them(tmp_path, line_end):
    rows = [*ROWS, row(49, "5f0a", text="no\r\nsoup"), row(48, "5f0a", text="no,\rsoup")]
    write_table(tmp_path / "raw/epic/EPICorpus.csv", HEADER, rows, line_end=line_end)
    found = examples(prepare(prepare_epic, tmp_path / "raw", tmp_path / "out"))
    assert found["5f0a", "t43"][0].endswith('"no\r\nsoup"') and found["5f0a", "t36"][0].endswith('"no,\rsoup"')
    assert "is\nlukewarm" in found["5f0a", "t14"][0]


def test_what_pandas_takes_for_missing_is_nan_and_nothing_else(tmp_path):
    write_raw(tmp_path / "raw")
    found = examples(prepare(prepare_epic, tmp_path / "raw", tmp_path / "out"))
    replies = [found["5e9c", f"t{i * 7 % 50}"][0].split('reply: ')[1] for i in range(8)]
    assert replies == ['"nan"'] * 5 + ['"nil"', '"N/A "', '"nothing"']
    assert found["5e9c", "t20"][0].startswith('message: "nan"\n')


BAD_ROWS = {
    "unknown label": ({"label": "sarcastic"}, "column 'label' is neither 'iro' nor 'not'"),
    "no user": ({"user": ""}, "no user or no id_original"),
    "no id": ({"id_original": "NA"}, "no user or no id_original"),
}


@pytest.mark.parametrize("cells, reason", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, capsys, cells, reason):
    write_raw(tmp_path / "raw", rows=[row(49, "5f0a", **cells), *ROWS])
    task = assert_bad_row(prepare_epic, tmp_path, capsys, "EPICorpus.csv, line 2", reason)
    assert ("5f0a", "t43") not in labels(task)


def test_a_missing_column_is_named_and_a_missing_file_has_its_address(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=["user", "label", "id", *HEADER[3:]])
    assert_refused(prepare_epic, tmp_path, capsys, "line 1", "missing column 'id_original'")
    (tmp_path / "raw/epic/EPICorpus.csv").unlink()
    assert_refused(prepare_epic, tmp_path, capsys, "EPICorpus.csv", "huggingface.co", "CC-BY-NC-SA-4.0")
