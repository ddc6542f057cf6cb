"""hatexplain: 253 people say of posts from Twitter and Gab whether they are hate speech, offensive or normal.

Content warning: the posts are real hate speech, with slurs.

Source: Mathew et al. 2021, "HateXplain: A Benchmark Dataset for Explainable Hate Speech Detection" (arXiv:2012.10289).

Raw: hatexplain/dataset.json, {post id: {"post_id": str, "post_tokens": [str, ...], "rationales": [[0 or 1 for each
token], ...], "annotators": [{"label": str, "annotator_id": int, "target": [str, ...]}, ...]}}. As published, posts come
in sorted order of their ids, a text is its tokens joined by a space, and an example keeps what else is known of the
annotation: the groups that this person saw addressed, the tokens they marked, and the majority's view. The published
code also reads post_id_divisions.json; nothing in a user's examples depends on it.
"""

from collections import Counter
from itertools import groupby

from common import Collector, Task, main
from raw_files import LONE_SURROGATE, BadInput, RawFile, RawFiles, Source, has_lone_surrogate

SOURCE = Source(
    dataset="hatexplain",
    tasks=("hatexplain",),
    files=(RawFile("dataset.json", git_blob="741bc082c38f4f8ee45cebdc868b3768e3901089",
                   url="https://raw.githubusercontent.com/hate-alert/HateXplain/master/Data/dataset.json"),),
    licence="MIT (repository); CC-BY-4.0 (its card on Hugging Face)",
    homepage="https://github.com/hate-alert/HateXplain",
    citation="Mathew, Saha, Yimam, Biemann, Goyal, Mukherjee 2021, arXiv:2012.10289",
    note="Verified on 3,846 of the 20,148 posts: both splits are the published code's to the byte. None of those posts "
         "has three different labels; at such a post the published code stops if anyone marked tokens, ours goes on.",
)
LABELS = ("hatespeech", "normal", "offensive")
INSTRUCTION = (
    "How do you judge the following post? Answer 'hatespeech' if it attacks people for what they are, 'offensive' if "
    "it insults without doing so, and 'normal' if it does neither."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; an annotator's label of a post is one example. A post with anything amiss is left out as a whole."""
    collect = Collector()
    path, posts = raw.read_json("dataset.json")
    if not isinstance(posts, dict):
        raise BadInput(f"{path}: needed an object of posts by their ids.")
    for key in sorted(posts):
        where = f"{path}, post {key!r}"
        if has_lone_surrogate(posts[key]):
            raw.bad(where, LONE_SURROGATE)
            continue
        try:
            annotations = list(_annotations(posts[key]))
        except (KeyError, TypeError, AttributeError):
            raw.bad(where, "not a post: needed post_id, post_tokens, rationales, and annotators with label, "
                           "annotator_id and target")
            continue
        except ValueError as error:
            raw.bad(where, str(error))
            continue
        for user, example in annotations:
            collect.add_example(user, posts[key]["post_id"], example)
    return [Task("hatexplain", INSTRUCTION, LABELS, multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


def _annotations(post: dict):
    """(user, example) of everyone who labelled this post; raises ValueError with the reason if it cannot be used."""
    tokens, annotators, rationales = post["post_tokens"], post["annotators"], post["rationales"]
    labels = [annotator["label"] for annotator in annotators]
    users = [annotator["annotator_id"] for annotator in annotators]
    if not isinstance(post["post_id"], str) or not all(type(user) in (int, str) for user in users):
        raise ValueError("an id is neither a string nor a number")
    if not labels:
        raise ValueError("nobody labelled it")
    if not set(labels) <= set(LABELS):
        raise ValueError(f"a label is none of {', '.join(LABELS)}")
    if any(len(rationale) < len(tokens) for rationale in rationales):
        raise ValueError("a rationale is shorter than the post")
    text = " ".join(tokens) if isinstance(tokens, list) else ""
    if not text.strip():
        raise ValueError("no text")
    groups = Counter(group for annotator in annotators for group in annotator["target"])
    majority = {
        "majority_label": [_majority(labels)],
        "majority_group": [group for group, count in groups.items() if count > 1] or ["None"],
    }
    for index, (user, annotator) in enumerate(zip(users, annotators)):
        marks = rationales[index] if index < len(rationales) else []
        example = {
            "post_tokens": tokens,
            "text": text,
            "label": [annotator["label"]],
            "target_group": annotator["target"],
            "rationale_spans": [
                " ".join(token for _, token in run)
                for marked, run in groupby(zip(marks, tokens), key=lambda pair: bool(pair[0])) if marked
            ],
            **majority,
        }
        if rationales:                                   # of a post that most found normal, nobody marked tokens
            example["rationale"] = marks
            example["rationale_tokens"] = [token for mark, token in zip(marks, tokens) if mark == 1]
        yield user, example


def _majority(labels: list[str]) -> str:
    (first, count), *others = Counter(labels).most_common(2)
    return "undecided" if others and others[0][1] == count else first


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
