"""tweeteval: 20 people say of the same 200 tweets whether they are hateful.

Content warning: the texts are real hate speech.

Source: Röttger, Vidgen, Hovy, Pierrehumbert 2022, "Two Contrasting Data Annotation Paradigms for Subjective NLP Tasks"
(arXiv:2112.07475), annotator group G3; github.com/paul-rottger/annotation-paradigms, CC0-1.0. The tweets are a sample
of those of Davidson et al. 2017 (arXiv:1703.04009). The name `tweeteval` is PEFT-U's.

Raw: tweeteval/annotations_g3.csv with columns id, text and one column per user, whose name is the user id.
"""

from common import BadInput, RawFiles, Task, main

LABELS = ("Hateful", "Non-hateful")
INSTRUCTION = "Do you find the following text hateful? Answer 'Hateful' if you do and 'Non-hateful' if you do not."


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example for every user."""
    examples, seen = {}, set()
    for where, row in raw.read_csv("annotations_g3.csv", columns=("id", "text")):
        text_id, text = row.pop("id"), row.pop("text")
        if not row:
            raise BadInput(f"{where}: no column of a user beside 'id' and 'text'.")
        if text_id in seen:
            raise BadInput(f"{where}: this text id came before.")
        seen.add(text_id)
        for user, label in row.items():
            if label not in LABELS:
                raise BadInput(f"{where}, column {user!r}: neither {LABELS[0]!r} nor {LABELS[1]!r}.")
            examples.setdefault(user, {})[text_id] = {"text": text, "label": [label]}
    return [Task("tweeteval", INSTRUCTION, LABELS, multi_label=False, examples=examples)]


if __name__ == "__main__":
    raise SystemExit(main("tweeteval", read_tasks))
