"""tweeteval: 20 people say of the same 200 tweets whether they are hateful.

Content warning: the texts are real hate speech.

Source: Röttger, Vidgen, Hovy, Pierrehumbert 2022, "Two Contrasting Data Annotation Paradigms for Subjective NLP Tasks"
(arXiv:2112.07475), annotator group G3; github.com/paul-rottger/annotation-paradigms, CC0-1.0. The tweets are a sample
of those of Davidson et al. 2017 (arXiv:1703.04009). The name `tweeteval` is PEFT-U's.

Raw: tweeteval/annotations_g3.csv with columns id, text and one column per user, whose name is the user id.
"""

from common import Collector, Task, main
from raw_files import BadInput, RawFile, RawFiles, Source

SOURCE = Source(
    dataset="tweeteval",
    tasks=("tweeteval",),
    files=(
        RawFile(
            "annotations_g3.csv",
            size=52264,
            sha256="9e2a8578adb1446154aef2f5ea7c60702a97992369faa48aa06dd8b8045e7915",
            url="https://raw.githubusercontent.com/paul-rottger/annotation-paradigms/main/0_data/annotations_g3.csv",
        ),
    ),
    licence="CC0-1.0",
    homepage="https://github.com/paul-rottger/annotation-paradigms",
    citation="Röttger, Vidgen, Hovy, Pierrehumbert 2022, arXiv:2112.07475",
)
LABELS = ("Hateful", "Non-hateful")
INSTRUCTION = "Do you find the following text hateful? Answer 'Hateful' if you do and 'Non-hateful' if you do not."


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example for every user, and a bad cell makes the whole row bad."""
    collect = Collector()
    for where, row in raw.read_csv("annotations_g3.csv", columns=("id", "text"), filled=("id", "text")):
        text_id, text = row.pop("id"), row.pop("text")
        if not row:
            raise BadInput(f"{where}: no column of a user beside 'id' and 'text'.")
        unknown = [user for user, label in row.items() if label not in LABELS]
        if unknown:
            raw.bad(where, f"column {unknown[0]!r} is neither {LABELS[0]!r} nor {LABELS[1]!r}")
            continue
        for user, label in row.items():
            collect.add(user, text_id, text, [label])
    return [Task("tweeteval", INSTRUCTION, LABELS, multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
