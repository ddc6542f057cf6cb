"""Does prepare_stackexchange.py keep the answers that the published filter keeps, and split them as published?"""

import gzip
import hashlib
import json
import tracemalloc
from xml.sax.saxutils import quoteattr

import pytest
from prepare_stackexchange import SITES, SOURCES, read_tasks
from raw_files import RawFiles
from several import main

# sha256 of what the published filter and prepare script make of `posts()`, and the latter of `csv_text()`.
PUBLISHED_SHA256 = {
    "Posts.xml": "4bb0b7c17fd192da9f12ad718cf08de21df7cf316f1b877d110e3bac753c316f",
    "travel.csv": "d3d7732d033e3ff06bb73d416b05375e527a64e353f3815cc04bd3fa6939146e",
}


def question(post_id, num_answers, title="A title, with a comma", tags="<food><guests>"):
    return {"Id": post_id, "PostTypeId": 1, "CreationDate": "2017-06-27T14:15:02.333", "Score": 3, "ViewCount": 90,
            "Body": f'<p>Question {post_id}, "quoted" &amp; more.</p>\n', "OwnerUserId": 900, "Title": title,
            "Tags": tags, "AnswerCount": num_answers, "CommentCount": 0, "ContentLicense": "CC BY-SA 3.0"}


def answer(post_id, question_id, user, body="<p>An answer.</p>"):
    owner = {"OwnerDisplayName": "user17"} if user is None else {"OwnerUserId": user}
    return {"Id": post_id, "PostTypeId": 2, "ParentId": question_id, "CreationDate": "2017-06-28T14:15:02.333",
            "Score": 1, "Body": body, **owner, "CommentCount": 0, "ContentLicense": "CC BY-SA 3.0"}


def answers(question_id, users):
    return [answer(10 * question_id + i, question_id, user) for i, user in enumerate(users)]


def posts():
    """24 questions that users 11 to 15 answer all, 16 the first 20 of and 17 the first 19; then one for each rule."""
    rows = [{"Id": 1, "PostTypeId": 4, "Body": "an excerpt", "OwnerUserId": 11}]
    for number in range(100, 124):
        users = [11, 12, 13, 14, 15, *[16] * (number < 120), *[17] * (number < 119)]
        own = [answer(10 * number + user, number, user, f"<p>Answer of {user}\r\nto {number}, \"so\".</p>\n")
               for user in users[::-1 if number % 3 else 1]]
        early, late = own[:number == 110], own[number == 110:]                  # one answer before its question
        tags = "<food>" if number % 2 else "|food|guests|"
        rows += [*early, question(number, len(users), f"Title {number}, with a comma", tags), *late]
    rows.append(answer(6000, 105, 13, "<p>A second answer of the same user.</p>"))
    rows += [question(200, 4), *answers(200, [11, 12, 13, 17])]                 # four answers
    rows += [question(201, 5), *answers(201, [11, 12, 13, 14, 14])]             # of four users
    rows += [question(202, 5), *answers(202, [11, 12, 13, None, None])]         # nobody counts once
    rows += [question(203, 5), *answers(203, [-1, 12, 13, 14, None])]           # and -1, the site's own user, as one
    return rows


def xml(rows):
    """As in the official dumps: a byte order mark, line ends as entities, two blanks before each row."""
    lines = [
        "  <row " + " ".join(f"{name}={quoteattr(str(value))}" for name, value in row.items()) + " />" for row in rows
    ]
    return "\n".join(['\ufeff<?xml version="1.0" encoding="utf-8"?>', "<posts>", *lines, "</posts>"]).encode()


def csv_text(num_users=3, num_questions=12):
    """As the published filter writes it: users with a point where the dump had gaps, line ends of both kinds."""
    lines = [",UserId,Answer,Title,Tags,Question,QuestionId"]
    for i in range(num_users * num_questions):
        user, number = 11 + i % num_users, 300 - i // num_users
        body = f'"<p>Answer {i}, ""so"".\r\n</p>"'
        lines.append(f'{i},{user}.0,{body},Title {number},<food>,"<p>Q\n{number}</p>",{number}')
    return "\n".join([*lines, lines[5].replace("Answer", "A later answer"), ""]).encode()


def prepare(tmp_path, content, *options, name="Posts.xml", out="out"):
    path = tmp_path / "raw/travel" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / out), "--only", "travel", *options]
    status = main("prepare_stackexchange.py", [(source, read_tasks) for source in SOURCES], argv)
    return status, tmp_path / out / "travel"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name, content", [("Posts.xml", xml(posts())), ("travel.csv", csv_text())], ids=["xml", "csv"])
def test_same_bytes_as_published_code(tmp_path, name, content):
    status, task = prepare(tmp_path, content, "--layout", "original", name=name)
    assert status == 0
    assert sha256(task / "user_data_no_leak.json") == PUBLISHED_SHA256[name]
    assert json.loads((task / "users-with-empty-dataset-splits.json").read_text()) == {"no_leak": {}}
    assert not (task / "user_data_leaked.json").exists()            # as published, of a generative task


def test_what_each_rule_left_out_is_counted(tmp_path):
    _, task = prepare(tmp_path, xml(posts()))
    facts = json.loads((task / "task.json").read_text())["statistics"]
    assert facts["rows_skipped"] == {
        "neither a question nor an answer": 1,
        "not this user's first answer to the question": 3,         # one each of 13, 14 and nobody
        "question of fewer than 5 answers": 4 + 4 + 4,
        "no user": 1,
        "user of fewer than 20 answers": 19 + 1,                    # of 17 and -1
    }
    assert (facts["users"], facts["texts"], facts["pairs"]) == (6, 25, 5 * 24 + 20 + 3)
    assert "krippendorff_alpha_masi" not in facts and "label_counts" not in facts


def test_answers_whose_question_says_it_has_fewer_are_left_out(tmp_path):
    """The published code breaks off at such an answer, as at one whose question is not in the file."""
    rows = [row for row in posts() if row["Id"] != 101]
    next(row for row in rows if row["Id"] == 100)["AnswerCount"] = 4
    _, task = prepare(tmp_path, xml(rows))
    facts = json.loads((task / "task.json").read_text())["statistics"]
    assert facts["rows_skipped"]["no question that says it has 5 answers"] == 6 + 6
    assert facts["pairs"] == 5 * 24 + 20 + 3 - 12


def test_jsonl_has_html_and_line_ends_of_one_kind(tmp_path):
    _, task = prepare(tmp_path, xml(posts()))
    lines = [json.loads(line) for name in ("train", "val", "test")
             for line in (task / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == 143
    assert {"user": "12", "id": "100", "target": '<p>Answer of 12\nto 100, "so".</p>\n',
            "text": 'Title 100, with a comma |food|guests| <p>Question 100, "quoted" &amp; more.</p>\n'} in lines


def test_dump_is_preferred_and_may_be_gzipped(tmp_path):
    prepare(tmp_path, csv_text(), name="travel.csv")
    _, task = prepare(tmp_path, gzip.compress(xml(posts())), name="Posts.xml.gz")
    assert list(json.loads((task / "task.json").read_text())["raw_sha256"]) == ["travel/Posts.xml.gz"]


def test_sampling_users_as_published(tmp_path):
    """`random.seed(7); random.sample(users in order of appearance, 2)`."""
    _, task = prepare(tmp_path, xml(posts()), "--layout", "original", "--users", "2", "--seed", "7")
    assert list(json.loads((task / "user_data_no_leak.json").read_text())) == ["14", "15"]


def test_instruction_and_source_of_every_site():
    assert [source.dataset for source in SOURCES] == list(SITES) and len(SITES) == 7
    for source in SOURCES:
        archive = source.files[0]
        assert archive.url == f"https://archive.org/download/stackexchange/{source.dataset}.stackexchange.com.7z"
        assert archive.unpack in source.where_to_get("Posts.xml") and archive.url in source.where_to_get("Posts.xml")


def broken(**changes):
    """`posts()` with one attribute of row 2, a question, changed, or absent if None."""
    rows = posts()
    rows[1] = {name: value for name, value in (rows[1] | changes).items() if value is not None}
    return xml(rows)


BAD_ROWS = {
    "no id": (broken(Id=None), "<row> 2: attribute 'Id'"),
    "no count": (broken(AnswerCount=None), "<row> 2: attribute 'AnswerCount'"),
    "a count that is none": (broken(AnswerCount="many"), "<row> 2: attribute 'AnswerCount'"),
    "a user that is no number": (broken(OwnerUserId="me"), "<row> 2: attribute 'OwnerUserId'"),
    "no body": (broken(Body=None), "<row> 2: attribute 'Body'"),
    "an answer without a question": (broken(PostTypeId=2), "<row> 2: attribute 'ParentId'"),
}


@pytest.mark.parametrize("content, expected", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_stops_or_is_counted(tmp_path, capsys, content, expected):
    assert prepare(tmp_path, content)[0] == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()
    status, task = prepare(tmp_path, content, "--skip-bad")
    bad_rows = json.loads((task / "task.json").read_text())["statistics"]["bad_rows"]
    assert status == 0 and bad_rows == {f"{expected.split(': ')[1]} is missing or not a number": 1}


BAD_FILES = {
    "cut off": (xml(posts())[:-500], "not well-formed XML (unclosed token)"),
    "another table": (b"<users><row Id='1'/></users>", "needed <posts>"),
    "no rows": (b"<posts></posts>", "no <row>"),
    "not XML": (b"Id,PostTypeId\n1,2\n", "line 1: not well-formed XML"),
    "empty": (b"", "not well-formed XML (no element found)"),
    "not UTF-8": (xml(posts()).replace(b"Title 107", b"Title \xff"), "Posts.xml: not UTF-8"),
}


@pytest.mark.parametrize("content, expected", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_stops(tmp_path, capsys, content, expected):
    assert prepare(tmp_path, content, "--skip-bad")[0] == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message and not (tmp_path / "out").exists()


def test_bad_rows_of_the_csv(tmp_path, capsys):
    content = csv_text().replace(b"\n0,11.0,", b"\n0,nobody,")
    assert prepare(tmp_path, content, name="travel.csv")[0] == 2
    assert "travel.csv, line 2: column 'UserId' is not a number" in capsys.readouterr().err
    content = csv_text().replace(b"QuestionId", b"Question_id")
    assert prepare(tmp_path, content, name="travel.csv")[0] == 2
    assert "missing column 'QuestionId'" in capsys.readouterr().err


def test_archive_that_is_not_unpacked(tmp_path, capsys):
    assert prepare(tmp_path, b"7z", name="travel.stackexchange.com.7z")[0] == 2
    assert "`7z e travel.stackexchange.com.7z Posts.xml`" in capsys.readouterr().err


def test_a_large_dump_does_not_stay_in_memory(tmp_path):
    """Rows that give no example are forgotten: 20 MB of them are read in less than 5 MB."""
    path = tmp_path / "travel/Posts.xml"
    path.parent.mkdir()
    wiki = {"Id": 1, "PostTypeId": 4, "Body": "x" * 10_000}
    path.write_bytes(xml([wiki] * 2_000))
    tracemalloc.start()
    assert sum(1 for _ in RawFiles(tmp_path, SOURCES[4]).read_xml("Posts.xml", "posts", "row")) == 2_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
