"""Does prepare_cockamamie.py give the published task: rounds in order, later ones on top, ids as words come?"""

import hashlib
import json

import prepare_cockamamie
import pytest
from common import main
from prepared import RAW, needs_raw

# sha256 of what the published code writes of the `.subset` file: of all users, and of 50 as it samples them.
PUBLISHED_SHA256 = {
    (): {
        "user_data_leaked.json": "832e9a7d8dc8afcce4ae6d7c290638a579af94d58d7cfd2096394ef02661ac45",
        "user_data_no_leak.json": "cfff5d1d90c600f4fad88ec6e00a90fa6e63eb8bb5f7d95cdaaf33da7347b1da",
        "users-with-empty-dataset-splits.json": "211668c9655e83f5f00c271641c6c1b8738281b4557a0e324328b968a6c19336",
    },
    ("--users", "50"): {
        "user_data_leaked.json": "0e579c21d9f3e3ba60ab181044d902c1779e4507af82475ec71f2a255fd4b366",
        "user_data_no_leak.json": "657bf1c66f2764a6a46526e29f4a33568f9df57775367829e65a0b9e8c46cc3b",
    },
}

WORDS = ["teapot", "a wobbly stool", "under_score", *(f"word {i}" for i in range(12))]
ROUNDS = [
    {word: {"yes_votes": [7, 3], "no_votes": [12]} for word in WORDS},
    {"a wobbly stool": {"yes_votes": [7], "no_votes": [3]}, "noodle": {"yes_votes": [12], "no_votes": [7]}},
]


def prepare(folder, rounds, *options, raw=None):
    if raw is None:
        raw = folder / "raw"
        (raw / "cockamamie").mkdir(parents=True, exist_ok=True)
        content = {"workers": {}, "word_ratings": {"votes": rounds}}
        (raw / "cockamamie/cockamamie.json").write_text(json.dumps(content))
    argv = ["--raw", str(raw), "--out", str(folder / "out"), *options]
    return main(prepare_cockamamie.SOURCE, prepare_cockamamie.read_tasks, argv), folder / "out/cockamamie"


def examples_of(task):
    """{user: {text id: (text, label)}} of the original layout, each user's in the order of the ids."""
    splits = json.loads((task / "user_data_leaked.json").read_text())
    merged = {user: own["train"] | own["val"] | own["test"] for user, own in splits.items()}
    return {user: {int(i): (own[i]["text"], *own[i]["label"]) for i in sorted(own, key=int)}
            for user, own in merged.items()}


@needs_raw("cockamamie")
@pytest.mark.parametrize("options", PUBLISHED_SHA256, ids=["all users", "50 users"])
def test_real_files_are_those_of_the_published_code(tmp_path, options):
    _, task = prepare(tmp_path, None, "--layout", "original", *options, raw=RAW)
    for name, sha256 in PUBLISHED_SHA256[options].items():
        assert hashlib.sha256((task / name).read_bytes()).hexdigest() == sha256, name
    facts = json.loads((task / "task.json").read_text())
    assert facts["subset"] and facts["labels"] == ["no", "yes"] and not facts["multi_label"]
    facts = facts["statistics"]
    if not options:
        assert (facts["users"], facts["texts"], facts["pairs"], facts["users_kept"]) == (1783, 8120, 487421, 1783)
        assert facts["label_counts"] == {"no": 465066, "yes": 22355}
        assert round(facts["krippendorff_alpha_masi"], 3) == 0.146
        assert facts["annotations_replaced"] == 559352 - 487421


def test_later_rounds_replace_votes_in_their_place_and_ids_count_words_as_they_come(tmp_path):
    status, task = prepare(tmp_path, ROUNDS, "--layout", "original")
    assert status == 0
    examples = examples_of(task)
    assert list(examples) == ["12", "7", "3"]              # no-votes come before yes-votes
    assert [text for text, _ in examples["7"].values()] == [*WORDS, "noodle"]
    assert list(examples["7"]) == list(range(16))
    assert examples["7"][1] == ("a wobbly stool", "yes") and examples["3"][1] == ("a wobbly stool", "no")
    assert examples["12"][15] == ("noodle", "yes") and examples["7"][15] == ("noodle", "no")
    assert examples["3"][2] == ("under_score", "yes")      # a word is kept as it is written
    facts = json.loads((task / "task.json").read_text())
    assert facts["statistics"]["annotations_replaced"] == 2 and not facts["subset"]


def test_of_two_votes_in_one_round_yes_counts(tmp_path):
    both = [{word: {"yes_votes": [7], "no_votes": [7]} for word in WORDS}]
    _, task = prepare(tmp_path, both, "--layout", "original")
    assert {label for _, label in examples_of(task)["7"].values()} == {"yes"}


BAD_WORDS = {
    "no text": {" ": {"yes_votes": [7], "no_votes": []}},
    "needed 'no_votes' and 'yes_votes', each a list of users": {"kettle": {"yes_votes": [7]}},
    "needed 'no_votes' and 'yes_votes', each a list of users ": {"kettle": {"yes_votes": [7], "no_votes": [None]}},
    "needed 'no_votes' and 'yes_votes', each a list of users  ": {"kettle": [7]},
}


@pytest.mark.parametrize("reason, word", BAD_WORDS.items())
def test_a_bad_word_stops_or_is_counted(tmp_path, capsys, reason, word):
    rounds = [ROUNDS[0], word | ROUNDS[1]]
    assert prepare(tmp_path, rounds)[0] == 2
    error = capsys.readouterr().err
    assert f"cockamamie.json, round 2, word 1: {reason.strip()}." in error and "kettle" not in error
    status, task = prepare(tmp_path, rounds, "--skip-bad")
    assert status == 0
    facts = json.loads((task / "task.json").read_text())["statistics"]
    assert facts["bad_rows"] == {reason.strip(): 1} and facts["texts"] == len(WORDS) + 1
