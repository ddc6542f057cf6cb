"""Does prepare_hatexplain.py give the published task, with all that its examples hold, and refuse broken posts?"""

import copy
import json

import prepare_hatexplain
import pytest
from prepared import (
    RAW,
    assert_bad_row,
    assert_counts,
    assert_published,
    assert_refused,
    facts,
    labels,
    needs_raw,
    prepare,
)

# First digits of the sha256 of the published code's files: on the real subset, and on `POSTS`.
REAL_SHA256 = {"hatexplain": {"leaked": "932e9393e06d3465", "no_leak": "6c450c6bb348b649"}}
MADE_UP_SHA256 = {"hatexplain": {"leaked": "13e3789e6cbe4298", "no_leak": "bd5f08575edd96b8"}}

KINDS = ("hatespeech", "offensive", "normal")


def post(number, names, users=(1, 2, 3), rationales=(), targets=((), (), ())):
    """A post of six tokens, in the format of dataset.json."""
    key = f"{number % 7}_{number}_gab"
    return key, {
        "post_id": key,
        "annotators": [
            {"label": label, "annotator_id": user, "target": list(target)}
            for label, user, target in zip(names, users, targets)
        ],
        "rationales": [list(marks) for marks in rationales],
        "post_tokens": ["the", "<number>", "soup", "was", "<user>", f"näive{number}"],
    }


MARKS = ([1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0])
POSTS = dict([
    *(post(i, ("normal", "normal", KINDS[i % 3]), targets=(("A",), ("A", "B"), ("B",))) for i in range(30, 12, -1)),
    *(post(i, ("hatespeech",) * 3, users=(4, 2, 1), rationales=MARKS, targets=(("A",), ("B",), ())) for i in range(5)),
    *(post(i, ("offensive", KINDS[i % 2], "offensive"), rationales=MARKS[:2]) for i in range(5, 9)),
    post(31, ("offensive", "normal", "hatespeech")),                      # undecided
    post(32, ("offensive", "offensive", "normal"), users=(1, 2, 1), rationales=(*MARKS[:2], [1, 0, 0, 1, 1, 1, 1])),
])


def write_raw(folder, posts=POSTS):
    path = folder / "hatexplain/dataset.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(posts))
    return path


@needs_raw("hatexplain")
def test_real_files_are_those_of_the_published_code(tmp_path):
    assert_published(prepare_hatexplain, RAW, tmp_path, REAL_SHA256)
    assert json.loads((tmp_path / "hatexplain/task.json").read_text())["subset"]


@needs_raw("hatexplain")
def test_real_statistics(tmp_path):
    assert_counts(prepare(prepare_hatexplain, RAW, tmp_path), users=236, texts=3846, pairs=11538, kept=120, alpha=0.503,
                  labels={"normal": 4716, "hatespeech": 3412, "offensive": 3410})


def test_made_up_files_are_those_of_the_published_code(tmp_path):
    write_raw(tmp_path / "raw")
    assert_published(prepare_hatexplain, tmp_path / "raw", tmp_path / "out", MADE_UP_SHA256)


def test_an_example_has_text_label_marks_targets_and_the_majoritys_view(tmp_path):
    write_raw(tmp_path / "raw")
    leaked = json.loads((prepare(prepare_hatexplain, tmp_path / "raw", tmp_path / "out", "--layout", "original")
                         / "user_data_leaked.json").read_text())
    found = {(user, key): example for user, own in leaked.items() for part in own.values()
             for key, example in part.items()}
    marked = found["1", "2_2_gab"]
    assert marked["text"] == "the <number> soup was <user> näive2"
    assert marked["rationale_spans"] == ["<number>", "was"] == marked["rationale_tokens"]
    assert marked["majority_label"] == ["hatespeech"] and marked["majority_group"] == ["None"]
    assert marked["target_group"] == []
    assert found["1", "3_31_gab"]["majority_label"] == ["undecided"] and "rationale" not in found["1", "3_31_gab"]
    assert found["1", "6_20_gab"]["majority_group"] == ["A", "B"]
    assert found["3", "6_6_gab"]["rationale"] == []                       # only two of the three marked tokens
    assert found["1", "4_32_gab"]["rationale_spans"] == ["the", "was <user> näive32"]


def test_a_second_annotation_of_a_post_replaces_the_first(tmp_path):
    write_raw(tmp_path / "raw")
    task = prepare(prepare_hatexplain, tmp_path / "raw", tmp_path / "out")
    assert labels(task)["1", "4_32_gab"] == ["normal"] and facts(task)["annotations_replaced"] == 1


def change(edit):
    posts = copy.deepcopy(POSTS)
    edit(posts["4_18_gab"])
    return posts


NOT_A_POST = "not a post: needed post_id, post_tokens"
BAD_POSTS = {
    "unknown label": (lambda post: post["annotators"][1].update(label="rude"), "a label is none of hatespeech, normal"),
    "no annotator id": (lambda post: post["annotators"][1].pop("annotator_id"), NOT_A_POST),
    "no tokens": (lambda post: post.pop("post_tokens"), NOT_A_POST),
    "tokens are numbers": (lambda post: post.update(post_tokens=[1, 2]), NOT_A_POST),
    "user is a list": (lambda post: post["annotators"][1].update(annotator_id=[2]), "an id is neither"),
    "post id is a number": (lambda post: post.update(post_id=3), "an id is neither"),
    "nobody": (lambda post: post.update(annotators=[]), "nobody labelled it"),
    "tokens in one": (lambda post: post.update(post_tokens="soup"), "no text"),
    "no text": (lambda post: post.update(post_tokens=[]), "no text"),
    "short rationale": (lambda post: post.update(rationales=[[1, 0]]), "a rationale is shorter than the post"),
}


@pytest.mark.parametrize("edit, reason", BAD_POSTS.values(), ids=BAD_POSTS.keys())
def test_a_bad_post_is_named_or_left_out_whole_and_counted(tmp_path, capsys, edit, reason):
    write_raw(tmp_path / "raw", change(edit))
    task = assert_bad_row(prepare_hatexplain, tmp_path, capsys, "dataset.json, post '4_18_gab'", reason)
    assert not any(text_id == "4_18_gab" for _, text_id in labels(task))


def test_a_file_that_is_not_of_posts(tmp_path, capsys):
    path = write_raw(tmp_path / "raw", posts=list(POSTS.values()))
    assert_refused(prepare_hatexplain, tmp_path, capsys, "needed an object of posts")
    path.write_text("{")
    assert_refused(prepare_hatexplain, tmp_path, capsys, "dataset.json, line 1", "not JSON")
    path.unlink()
    assert_refused(prepare_hatexplain, tmp_path, capsys, "dataset.json", "hate-alert", "MIT")
