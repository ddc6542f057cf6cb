"""Does one run prepare what is there, say where to get the rest, and survive what fails? Does --download feed it?"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import common
import prepare_all
import pytest
import several
from common import Task
from file_server import serving
from raw_files import RawFile, Source

ROOT = Path(__file__).resolve().parents[1]


def source(dataset, *files):
    return Source(dataset=dataset, tasks=(dataset,), files=files or (RawFile("votes.csv"),), licence="CC0-1.0",
                  homepage=f"https://example.org/{dataset}", citation=f"{dataset} 2020")


def read_votes(raw):
    examples = {}
    for where, row in raw.read_csv("votes.csv", ("user", "text", "vote")):
        if row["vote"] in ("yes", "no"):
            examples.setdefault(row["user"], {})[row["text"]] = {"text": row["text"], "label": [row["vote"]]}
        else:
            raw.bad(where, "neither yes nor no")
    yield Task(raw.source.dataset, "Yes or no?", ("yes", "no"), multi_label=False, examples=examples)


def read_with_a_bug(raw):
    raise KeyError("a bug of ours")


ROWS = [f"{user},text {i},{'no' if i % 3 else 'yes'}" for user in "ab" for i in range(12)]
VOTES = "\n".join(["user,text,vote", *ROWS])
JOBS = [(source("apples"), read_votes), (source("pears", RawFile("votes.csv", 7, "5" * 64, None, "https://a.b/c")),
                                         read_votes), (source("plums"), read_votes)]


def write(tmp_path, dataset, text=VOTES):
    (tmp_path / "raw" / dataset).mkdir(parents=True)
    (tmp_path / "raw" / dataset / "votes.csv").write_text(text)


def argv(tmp_path, *options):
    return ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *options]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_prepared_and_what_is_absent_is_named(tmp_path, capsys):
    write(tmp_path, "apples")
    write(tmp_path, "plums")
    assert several.main("prepare_all.py", JOBS, argv(tmp_path)) == 0
    captured = capsys.readouterr()
    assert [line.split(" | ")[0] for line in captured.out.splitlines()[2:]] == ["| apples", "| plums"]
    assert "pears: absent." in captured.err and "licence: CC0-1.0" in captured.err
    assert f"votes.csv, 7 bytes, sha256 {'5' * 64}, https://a.b/c" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["apples", "plums"]


def test_same_bytes_as_each_script_alone(tmp_path):
    for dataset in ("apples", "plums"):
        write(tmp_path, dataset)
    several.main("prepare_all.py", JOBS, argv(tmp_path, "--users", "1", "--seed", "3"))
    together = files_of(tmp_path / "out")
    for job_source, read_tasks in (JOBS[0], JOBS[2]):
        assert common.main(job_source, read_tasks, argv(tmp_path, "--users", "1", "--seed", "3")) == 0
    assert files_of(tmp_path / "out") == together != {}


@pytest.mark.parametrize("broken", ["bad input", "a bug"])
def test_a_failure_does_not_stop_the_others(tmp_path, capsys, broken):
    write(tmp_path, "apples", VOTES if broken == "a bug" else VOTES.replace("yes", "maybe"))
    write(tmp_path, "plums")
    jobs = [(source("apples"), read_with_a_bug if broken == "a bug" else read_votes), *JOBS[1:]]
    assert several.main("prepare_all.py", jobs, argv(tmp_path, "--json")) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [row["task"] for row in report["prepared"]] == ["plums"] and list(report["failed"]) == ["apples"]
    assert report["absent"]["pears"]["files"][0]["url"] == "https://a.b/c"
    assert report["absent"]["pears"]["licence"] == "CC0-1.0"
    assert ("Traceback" in captured.err) == (broken == "a bug")
    assert "votes.csv, line 2: neither yes nor no" in captured.err or broken == "a bug"


def test_nothing_there(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert several.main("prepare_all.py", JOBS, argv(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count(": absent.") == 3


def test_no_raw_folder_is_one_line(tmp_path, capsys):
    assert several.main("prepare_all.py", JOBS, argv(tmp_path)) == 2
    assert capsys.readouterr().err == f"prepare_all.py: {tmp_path}/raw: no such folder. --raw must hold one folder " \
                                      "per dataset.\n"


def test_only_some(tmp_path, capsys):
    for dataset in ("apples", "plums"):
        write(tmp_path, dataset)
    assert several.main("prepare_all.py", JOBS, argv(tmp_path, "--only", "plums")) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plums"]
    with pytest.raises(SystemExit):
        several.main("prepare_all.py", JOBS, argv(tmp_path, "--only", "cherries"))
    assert "cherries" in capsys.readouterr().err


def test_download_then_prepare(tmp_path, capsys):
    """All that has an address is fetched, once; the rest is named, and read if it is there."""
    fruit = source("apples", RawFile("votes.csv", url="https://example.org/votes.csv"), RawFile("users.csv"))
    with serving({"/apples/votes.csv": VOTES.encode()}) as server:
        for _ in range(2):
            assert common.main(fruit, read_votes, argv(tmp_path, "--download", "--mirror", server.url)) == 0
        assert server.asked == [("/apples/votes.csv", None)]
    lines = capsys.readouterr().out.splitlines()
    assert "fetching" in lines[0] and "bytes from http://127.0.0.1" in lines[1] and "already there" in lines[4]
    assert "users.csv: no official address" in lines[2] and "https://example.org/apples" in lines[2]


@pytest.mark.parametrize("there", ["votes.csv.gz", "all.csv", "votes.subset.csv", "all.subset.csv.gz"])
def test_what_is_there_in_another_form_is_not_fetched(tmp_path, capsys, there):
    fruit = source("apples", RawFile("votes.csv", url="https://example.org/votes.csv", holds="all.csv", unpack="untar"))
    write(tmp_path, "apples")
    (tmp_path / "raw/apples/votes.csv").rename(tmp_path / "raw/apples" / there)
    with serving({}) as server:
        common.main(fruit, read_votes, argv(tmp_path, "--download", "--mirror", server.url))
        assert server.asked == []
    assert f"{there}: already there, so votes.csv is not fetched" in capsys.readouterr().out


def test_one_failed_download_does_not_stop_the_others(tmp_path, capsys):
    jobs = [(source(name, RawFile("votes.csv", url="https://example.org/votes.csv")), read_votes)
            for name in ("apples", "pears")]
    with serving({"/pears/votes.csv": VOTES.encode()}) as server:
        assert several.main("prepare_all.py", jobs, argv(tmp_path, "--json", "--download", "--mirror", server.url)) == 2
    report = json.loads(capsys.readouterr().out)
    assert "404" in report["failed"]["apples"] and report["prepared"][0]["task"] == "pears"


def run(script, *options):
    command = [sys.executable, str(ROOT / "data_scripts" / script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def test_no_network_is_one_line_and_status_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    options = argv(tmp_path, "--download", "--mirror", f"http://127.0.0.1:{port}")
    result = run("prepare_tweeteval.py", *options)
    assert result.returncode == 2 and "cannot be reached" in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout.endswith("fetching\n") and not (tmp_path / "out").exists()


def test_real_command_on_an_empty_folder_names_every_source(tmp_path):
    (tmp_path / "raw").mkdir()
    result = run("prepare_all.py", *argv(tmp_path))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for each, _ in prepare_all.jobs():
        assert f"{each.dataset}: absent." in result.stderr


def test_every_script_is_a_job():
    """A script has one source or several; each has a folder and tasks of its own, and all that one should know."""
    scripts = {path.stem for path in (ROOT / "data_scripts").glob("prepare_*.py")} - {"prepare_all"}
    sources = [each for each, _ in prepare_all.jobs()]
    assert {read_tasks.__module__ for _, read_tasks in prepare_all.jobs()} == scripts
    tasks = [task for each in sources for task in each.tasks]
    assert len(set(tasks)) == len(tasks) and len({each.dataset for each in sources}) == len(sources)
    for each in sources:
        assert each.licence and each.citation and each.note and each.homepage.startswith("https://")
        assert all(file.url is None or file.url.startswith("https://") for file in each.files)


def test_readme_has_the_table_of_all_sources():
    """`python data_scripts/prepare_all.py --list` prints it."""
    printed = run("prepare_all.py", "--list").stdout
    assert printed == prepare_all.markdown_list([each for each, _ in prepare_all.jobs()]) + "\n"
    assert printed in (ROOT / "data_scripts/README.md").read_text(encoding="utf-8")
