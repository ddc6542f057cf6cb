"""Does prepare_wikidetox.py give the published task of two files, and refuse rows it cannot read?"""

import prepare_wikidetox
from prepared import assert_bad_row, assert_published, assert_refused, examples, facts, labels, prepare, write_table

# First digits of the sha256 of the published code's files on `ROWS` and `TEXTS`.
MADE_UP_SHA256 = {"wikidetox": {"leaked": "bdbecb0aa3107276", "no_leak": "fcf50d4c5cb6fa96"}}

TEXT_HEADER = ["rev_id", "comment", "year", "logged_in", "ns", "sample", "split"]
HEADER = ["rev_id", "worker_id", "aggression", "aggression_score"]


def text(i, comment="NEWLINE_TOKENThe ``soup`` is warm. \"Thanks\"TAB_TOKEN== é =="):
    return [str(37675 + i), comment and f"{i}{comment}", "2004", "True", "article", "random", "train"]


def row(i, user, aggression):
    return [str(37675 + i), user, aggression, "-1.0" if aggression.startswith("1") else "0.5"]


TEXTS = [text(i) for i in range(40)]
ROWS = [
    *(row(i, user, f"{int(i % k == 0)}.0") for i in range(30, 0, -1) for user, k in (("1362", 2), ("49", 3))),
    *(row(i, "2", str(i % 2)) for i in range(12)),                        # labels without a fraction
    row(12, "49", "0.0"),                                                 # 49's second view of comment 12
    row(3, "8", "0.0"),                                                   # one example: dropped
]


def write_raw(folder, header=HEADER, rows=ROWS, texts=TEXTS):
    write_table(folder / "wikidetox" / prepare_wikidetox.ANNOTATIONS, header, rows, delimiter="\t")
    write_table(folder / "wikidetox" / prepare_wikidetox.TEXTS, TEXT_HEADER, texts, delimiter="\t")


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_wikidetox, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def test_labels_texts_with_their_tokens_and_the_first_of_two_views(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_wikidetox, tmp_path / "raw", tmp_path / "out")
    found = examples(task)
    assert found["1362", "37677"] == ("2" + TEXTS[0][1][1:], ["Aggressive"])
    assert found["1362", "37678"][1] == ["Normal"] and ("8", "37678") not in found
    assert found["2", "37676"][1] == ["Aggressive"] and found["2", "37677"][1] == ["Normal"]
    assert found["49", "37687"][1] == ["Aggressive"]
    assert facts(task)["rows_skipped"] == {"labelled before by this user": 1}


def test_a_bad_annotation_is_named_or_left_out_and_counted(tmp_path, capsys):
    for bad, reason in (
        (row(31, "2", "0.5"), "column 'aggression' is neither 0 nor 1"),
        (row(99, "2", "1.0"), "aggression_annotated_comments.tsv has no text of this rev_id"),
    ):
        write_raw(tmp_path / "raw", rows=[bad, *ROWS])
        task = assert_bad_row(prepare_wikidetox, tmp_path, capsys, "aggression_annotations.tsv, line 2", reason)
        assert ("2", bad[0]) not in labels(task)


def test_a_bad_text_is_named_or_left_out_and_counted(tmp_path, capsys):
    for bad, reason in (
        (text(50, ""), "column 'comment' is empty"),
        (text(3, "Another soup."), "a text of the same rev_id came before"),
    ):
        write_raw(tmp_path / "raw", texts=[*TEXTS, bad])
        task = assert_bad_row(prepare_wikidetox, tmp_path, capsys, "aggression_annotated_comments.tsv, line 42", reason)
        assert examples(task)["49", "37678"][0] == TEXTS[3][1]


def test_a_missing_column_and_a_missing_file_are_named(tmp_path, capsys):
    write_raw(tmp_path / "raw", header=["rev_id", "worker_id", "attack", "attack_score"])
    assert_refused(prepare_wikidetox, tmp_path, capsys, "line 1", "missing column 'aggression'")
    (tmp_path / "raw/wikidetox/aggression_annotated_comments.tsv").unlink()
    assert_refused(prepare_wikidetox, tmp_path, capsys, "aggression_annotated_comments.tsv", "figshare.com")
