"""Does a broken raw file, of any kind, end with one clear line, or with --skip-bad a count, and nothing half written?

All of it through the commands, as a user starts them.
"""

import csv
import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"

HEADER = ["id", "text", "ann", "ben"]
ROWS = [[f"t{i}", f"day {i}, \"quoted\"", "Hateful" if i % 3 else "Non-hateful", "Hateful"] for i in range(14)]


def as_csv(rows, header=HEADER, delimiter=","):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()


def with_row(number, row):
    """The good file with another row in that place; row i is on line i + 2."""
    return as_csv([*ROWS[:number], row, *ROWS[number + 1:]])


def prepare(folder, content, *options, dataset="tweeteval", name="annotations_g3.csv"):
    """Writes the raw file and starts the command; (what came back, the task's folder)."""
    path = folder / "raw" / dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return start(folder, *options, dataset=dataset)


def start(folder, *options, dataset="tweeteval", **environment):
    command = [sys.executable, f"{SCRIPTS}/prepare_{dataset}.py", "--raw", "raw", "--out", "out", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    return result, folder / "out" / dataset


def assert_stops(folder, result, *expected):
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    for part in expected:
        assert part in result.stderr
    assert "day" not in result.stderr                      # never a text
    assert not (folder / "out").exists()


def examples_of(task):
    lines = [json.loads(line) for name in ("train", "val", "test") for line in (task / f"{name}.jsonl").open()]
    return {(line["user"], line["id"]): (line["text"], line["label"]) for line in lines}


def examples_after(prepared):
    result, task = prepared
    assert result.returncode == 0, result.stderr
    return examples_of(task)


def facts_of(task):
    return json.loads((task / "task.json").read_text())["statistics"]


# What is wrong with the whole file -> (content, what the message says). --skip-bad is no help against these.
BAD_FILES = {
    "missing column": (as_csv(ROWS, ["id", "tweet", "ann", "ben"]), ["line 1", "missing column 'text'"]),
    "wrong delimiter": (as_csv(ROWS, delimiter="\t"), ["line 1", "missing column 'id', 'text'", "','", "'\\t'"]),
    "a column twice": (as_csv(ROWS, ["id", "text", "ann", "ann"]), ["line 1", "same name"]),
    "empty": ("", ["line 1", "missing column 'id', 'text'"]),
    "no rows": (as_csv([]), ["no rows"]),
    "a header without end": (as_csv(ROWS, ["id", "text", "ann", "b" * 200_000]), ["line 1", "not readable as CSV"]),
    "not UTF-8 in the header": (as_csv(ROWS).encode().replace(b"ben", b"b\xe9n", 1), ["line 1", "not UTF-8"]),
}


@pytest.mark.parametrize("options", [(), ("--skip-bad",)], ids=["", "--skip-bad"])
@pytest.mark.parametrize("content, expected", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_stops(tmp_path, content, expected, options):
    result, _ = prepare(tmp_path, content, *options)
    assert_stops(tmp_path, result, "prepare_tweeteval: raw/tweeteval/annotations_g3.csv", *expected)


# What is wrong with the row on line 6 -> (content, the reason)
BAD_ROWS = {
    "a short row": (with_row(4, ROWS[4][:3]), "a row of 3 fields, but the header has 4"),
    "a long row": (with_row(4, [*ROWS[4], "Hateful"]), "a row of 5 fields, but the header has 4"),
    "an empty line": (with_row(4, []), "a row of 0 fields, but the header has 4"),
    "unknown label": (with_row(4, ["t4", "day", "Hateful", "hateful"]),
                      "column 'ben' is neither 'Hateful' nor 'Non-hateful'"),
    "empty text": (with_row(4, ["t4", "", *ROWS[4][2:]]), "column 'text' is empty"),
    "blank text": (with_row(4, ["t4", " \n ", *ROWS[4][2:]]), "column 'text' is empty"),
    "no id": (with_row(4, ["", *ROWS[4][1:]]), "column 'id' is empty"),
    "not UTF-8": (as_csv(ROWS).encode().replace(b"day 4", b"day \xff"), "not UTF-8"),
    "a field without end": (with_row(4, ["t4", "x" * 200_000, *ROWS[4][2:]]),
                            "not readable as CSV (field larger than field limit (131072))"),
}


@pytest.mark.parametrize("content, reason", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_stops_or_is_counted(tmp_path, content, reason):
    result, task = prepare(tmp_path, content)
    assert_stops(tmp_path, result, f"prepare_tweeteval: raw/tweeteval/annotations_g3.csv, line 6: {reason}.")

    result, task = prepare(tmp_path, content, "--skip-bad")
    assert result.returncode == 0 and "bad rows: 1;" in result.stdout, result.stderr
    assert facts_of(task)["bad_rows"] == {reason: 1}
    kept = [row for row in ROWS if row[0] != "t4"]
    assert examples_of(task) == {
        (user, text_id): (text, [label]) for text_id, text, *labels in kept for user, label in zip(HEADER[2:], labels)
    }


def test_bad_rows_are_counted_by_reason(tmp_path):
    bad = [["x1", "", "Hateful", "Hateful"], ["x2", "day"], ["x3", "day"], ["x4", "day", "yes", "no"]]
    result, task = prepare(tmp_path, as_csv([*ROWS[:5], *bad, *ROWS[5:]]), "--skip-bad")
    assert "bad rows: 4;" in result.stdout
    assert facts_of(task)["bad_rows"] == {
        "column 'text' is empty": 1, "a row of 2 fields, but the header has 4": 2,
        "column 'ann' is neither 'Hateful' nor 'Non-hateful'": 1,
    }
    assert len(examples_of(task)) == 2 * len(ROWS)


def test_a_quote_that_is_never_closed(tmp_path):
    """Read on, it would swallow every row after it."""
    content = as_csv(ROWS) + 't14,day,Hateful,"Hateful\nt15,day,Hateful,Hateful\n'
    result, _ = prepare(tmp_path, content)
    assert_stops(tmp_path, result, "line 16", "a quote is opened and never closed")
    result, task = prepare(tmp_path, content, "--skip-bad")
    assert facts_of(task)["bad_rows"] == {"a quote is opened and never closed": 1}
    assert len(examples_of(task)) == 2 * (len(ROWS) + 1)


def test_a_stray_quote_swallows_no_rows_up_to_the_next(tmp_path):
    """Line 4 opens a quote that a quote in the middle of line 9 would close: one bad row, and all others are there."""
    lines = [f"t{i},day {i},Hateful,Hateful\n" for i in range(14)]
    lines[2], lines[7] = 't2,"day 2,Hateful,Hateful\n', 't7,day "7,Hateful,Hateful\n'
    content = "id,text,ann,ben\n" + "".join(lines)
    result, _ = prepare(tmp_path, content)
    assert_stops(tmp_path, result, "line 4: not readable as CSV (',' expected after '\"')")
    result, task = prepare(tmp_path, content, "--skip-bad")
    assert list(facts_of(task)["bad_rows"].values()) == [1]
    assert {text_id for _, text_id in examples_of(task)} == {f"t{i}" for i in range(14) if i != 2}


@pytest.mark.parametrize("number", ["x", "0", "-1", "2.5", ""])
def test_users_that_are_no_number(tmp_path, number):
    result, _ = prepare(tmp_path, as_csv(ROWS), "--users", number)
    assert result.returncode == 2 and f"--users: needs a whole number above 0, got {number!r}" in result.stderr


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    result, _ = prepare(tmp_path, as_csv([row[:3] for row in ROWS]), "--skip-bad")
    assert_stops(tmp_path, result, "no rows below the header that can be used")


def test_a_second_annotation_of_a_text_replaces_the_first_in_its_place_and_is_counted(tmp_path):
    again = ["t3", "day 3, again", "Hateful", "Non-hateful"]
    result, task = prepare(tmp_path, as_csv([*ROWS, again]), "--layout", "original")
    assert "annotations replaced: 2;" in result.stdout and facts_of(task)["annotations_replaced"] == 2
    replaced = (task / "user_data_leaked.json").read_bytes()
    result, task = prepare(tmp_path, with_row(3, again), "--layout", "original")
    assert facts_of(task)["annotations_replaced"] == 0
    assert (task / "user_data_leaked.json").read_bytes() == replaced


def test_byte_order_mark_line_ends_and_gzip_change_nothing(tmp_path):
    embedded = [[i, text.replace(", ", "\nand "), *labels] for i, text, *labels in ROWS]
    content = as_csv(embedded).encode()
    expected = examples_after(prepare(tmp_path, content))
    assert expected["ann", "t2"] == ('day 2\nand "quoted"', ["Hateful"])
    for same in (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"),
                 content.removesuffix(b"\n"), content + b"\n", content + b"\r\n\n"):
        assert examples_after(prepare(tmp_path, same)) == expected
    (tmp_path / "raw/tweeteval/annotations_g3.csv").unlink()
    assert examples_after(prepare(tmp_path, gzip.compress(content), name="annotations_g3.csv.gz")) == expected


def test_a_gzip_file_cut_off_or_damaged(tmp_path):
    whole = gzip.compress(as_csv(ROWS).encode())
    damaged = bytearray(whole)
    damaged[30] ^= 255
    for content in (whole[:-12], whole[:-2], whole[:40], as_csv(ROWS).encode(), bytes(damaged)):
        for options in ((), ("--skip-bad",)):
            result, _ = prepare(tmp_path, content, *options, name="annotations_g3.csv.gz")
            assert_stops(tmp_path, result, "annotations_g3.csv.gz: not a whole gzip file")


def test_any_subset_is_read_where_the_official_file_is_missing(tmp_path):
    for name, content in (("annotations_g3.subset.csv", as_csv(ROWS).encode()),
                          ("annotations_g3.subset.csv.gz", gzip.compress(as_csv(ROWS).encode()))):
        _, task = prepare(tmp_path, content, name=name)
        assert json.loads((task / "task.json").read_text())["subset"]
        (tmp_path / "raw/tweeteval" / name).unlink()
    prepare(tmp_path, as_csv(ROWS[:11]), name="annotations_g3.subset.csv")
    _, task = prepare(tmp_path, as_csv(ROWS))
    assert not json.loads((task / "task.json").read_text())["subset"] and facts_of(task)["texts"] == len(ROWS)


def test_what_is_not_there_is_named_with_where_to_get_it(tmp_path):
    result, _ = start(tmp_path)
    assert_stops(tmp_path, result, "raw/tweeteval: no such folder", "--raw", "github.com/paul-rottger", "CC0-1.0")
    (tmp_path / "raw/cockamamie").mkdir(parents=True)
    result, _ = start(tmp_path, dataset="cockamamie")
    assert_stops(tmp_path, result, "raw/cockamamie/cockamamie.json: No such file nor 'cockamamie.subset.json'",
                 "githubusercontent.com/limorigu")


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "raw/tweeteval/annotations_g3.csv").mkdir(parents=True)
    result, _ = start(tmp_path)
    assert_stops(tmp_path, result, "annotations_g3.csv: Is a directory")
    (tmp_path / "raw/studemo").write_text("a file")
    result, _ = start(tmp_path, dataset="studemo")
    assert_stops(tmp_path, result, "raw/studemo: no such folder")


def test_bad_input_leaves_the_task_of_an_earlier_run_alone(tmp_path):
    _, task = prepare(tmp_path, as_csv(ROWS))
    before = {path: path.read_bytes() for path in task.rglob("*") if path.is_file()}
    result, _ = prepare(tmp_path, with_row(9, ["t9"]))
    assert result.returncode == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_task_that_does_not_fit_on_the_disk(tmp_path):
    prepare(tmp_path, as_csv(ROWS))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = [sys.executable, f"{SCRIPTS}/prepare_tweeteval.py", "--raw", "raw", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)))
    assert result.returncode == 2
    assert result.stderr == ("prepare_tweeteval: out/tweeteval: cannot be written (File too large). "
                             "Nothing of it is kept.\n")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def write_slowly(tmp_path, token):
    """A process that has begun to write the task's folder and waits; it says so when it is ready for a signal."""
    code = f"""if True:
        import pathlib, secrets, sys, time
        import folders
        def files():
            print("begun", flush=True)
            time.sleep(60)
            yield "task.json", []
        secrets.token_hex = lambda _: {token!r}
        folders.tidy_on_sigterm()
        folders.write_folder(pathlib.Path("out/tweeteval"), files())"""
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": str(SCRIPTS)})
    assert writer.stdout.readline() == b"begun\n"
    return writer


def test_leftovers_are_removed_by_the_next_run_unless_in_use(tmp_path):
    out = tmp_path / "out"
    killed = write_slowly(tmp_path, "0" * 8)
    killed.kill()
    killed.wait()
    (out / ".tweeteval.22222222.old").mkdir()
    (out / ".another.00000000.new").mkdir()
    writer = write_slowly(tmp_path, "1" * 8)
    assert {path.name for path in out.iterdir()} == {
        ".tweeteval.00000000.new", ".tweeteval.11111111.new", ".tweeteval.22222222.old", ".another.00000000.new",
    }
    result, _ = prepare(tmp_path, as_csv(ROWS))
    assert result.returncode == 0
    assert {path.name for path in out.iterdir()} == {"tweeteval", ".tweeteval.11111111.new", ".another.00000000.new"}

    writer.terminate()
    assert writer.wait() == 128 + 15
    assert {path.name for path in out.iterdir()} == {"tweeteval", ".another.00000000.new"}


@pytest.mark.parametrize("content, expected", [
    (b"", ["line 1", "not JSON"]),
    (b'{"word_ratings":\n {"votes": [}', ["line 2", "not JSON"]),
    (b'{"word_ratings":\n {"votes": ["\xff"]}}', ["line 2", "not UTF-8"]),
    (b"[" * 100_000, ["too deep"]),
    (b'{"word_ratings": {"votes": {}}}', ["needed {'word_ratings'"]),
    (b"[]", ["needed {'word_ratings'"]),
], ids=["empty", "broken", "not UTF-8", "too deep", "another layout", "a list"])
def test_bad_json_file(tmp_path, content, expected):
    for options in ((), ("--skip-bad",)):
        result, _ = prepare(tmp_path, content, *options, dataset="cockamamie", name="cockamamie.json")
        assert_stops(tmp_path, result, "raw/cockamamie/cockamamie.json", *expected)


def as_rounds(users=("7", "3")):
    """A good cockamamie file as text, so that a test can break it."""
    words = ", ".join(f'"word {i}": {{"yes_votes": [{users[0]}], "no_votes": [{users[1]}]}}' for i in range(12))
    return f'{{"word_ratings": {{"votes": [{{{words}}}]}}}}'


def test_a_key_that_comes_twice(tmp_path):
    content = as_rounds().replace('"word 4"', '"word 3"')
    place = {"dataset": "cockamamie", "name": "cockamamie.json"}
    result, _ = prepare(tmp_path, content, **place)
    assert_stops(tmp_path, result, "cockamamie.json: a key comes twice in an object")
    result, task = prepare(tmp_path, content, "--skip-bad", **place)
    assert "bad rows: 1;" in result.stdout
    assert {text for text, _ in examples_of(task).values()} == {f"word {i}" for i in range(12) if i != 4}


def test_a_line_with_a_key_that_comes_twice(tmp_path):
    reviews = [f'{{"user_id": "u", "book_id": "{i}", "review_text": "day"}}\n' for i in range(20)]
    reviews[4] = reviews[4].replace('"4",', '"4", "book_id": "5",')
    result, _ = prepare(tmp_path, "".join(reviews), dataset="goodreads", name="goodreads_reviews_spoiler_raw.json")
    assert_stops(tmp_path, result, "spoiler_raw.json, line 5: a key comes twice in an object.")


def test_a_user_as_a_number_and_as_a_string(tmp_path):
    result, _ = prepare(tmp_path, as_rounds(("1", '"1"')), dataset="cockamamie", name="cockamamie.json")
    assert_stops(tmp_path, result, "raw/cockamamie: user '1' of cockamamie is there both as a number and as a string")


@pytest.mark.parametrize("content", [
    as_rounds().replace('"word 4": {"yes_votes": [7', r'"word 4": {"yes_votes": ["\ud800"'),
    as_rounds().replace("word 4", r"word \ud800"),
], ids=["user", "text"])
def test_half_a_character(tmp_path, content):
    place = {"dataset": "cockamamie", "name": "cockamamie.json"}
    result, _ = prepare(tmp_path, content, **place)
    assert_stops(tmp_path, result, "cockamamie.json, round 1, word 5: a string with half a character")
    result, task = prepare(tmp_path, content, "--skip-bad", **place)
    assert "bad rows: 1;" in result.stdout and "word 4" not in {text for text, _ in examples_of(task).values()}


def test_half_a_character_in_a_line(tmp_path):
    reviews = [f'{{"user_id": "u", "book_id": "{i}", "review_text": "day"}}\n' for i in range(20)]
    reviews[4] = reviews[4].replace("day", r"\uDC00")
    result, _ = prepare(tmp_path, "".join(reviews), dataset="goodreads", name="goodreads_reviews_spoiler_raw.json")
    assert_stops(tmp_path, result, "spoiler_raw.json, line 5: a string with half a character")
