"""studemo: 25 people name the emotions in consumer reviews; several labels per example.

Source: Ngo et al. 2022, "StudEmo: A Non-aggregated Review Dataset for Personalized Emotion Recognition" (workshop
NLPerspectives at LREC), by CLARIN-PL. The files are those in the published PEFT-U repository, which states no licence.

Raw: studemo/text_data.csv with columns text_id, text; studemo/annotation_data.csv with columns text_id, annotator_id
and one number per label, 0 to 3 for how much (valence: -3 to 3). As published, a label counts when its number is at
least 1, so that negative valence is no label, and an annotation without any label is skipped (task.json counts them).
"""

from collections import Counter
from math import isfinite, nan

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

SOURCE = Source(
    dataset="studemo",
    tasks=("studemo",),
    files=(
        RawFile(
            "annotation_data.csv",
            size=365191,
            sha256="41ea03cdb09839c1c3f643a02fb3419abbcea71d5b49fefcbe19d663ec52a828",
            url="https://raw.githubusercontent.com/ChrisIsKing/Parameter-Efficient-Personalization/master/data/studemo/annotation_data.csv",
        ),
        RawFile(
            "text_data.csv",
            size=4054674,
            sha256="1edd45a0b43c94a44519d85948310c163a541f4e661736143e9fb31c173369e1",
            url="https://raw.githubusercontent.com/ChrisIsKing/Parameter-Efficient-Personalization/master/data/studemo/text_data.csv",
        ),
    ),
    licence="none stated",
    homepage="https://github.com/ChrisIsKing/Parameter-Efficient-Personalization",
    citation="Ngo et al. 2022, StudEmo: A Non-aggregated Review Dataset for Personalized Emotion Recognition",
)
LABELS = ("joy", "trust", "anticipation", "surprise", "fear", "sadness", "disgust", "anger", "valence", "arousal")
INSTRUCTION = (
    "Name every emotion that you find in the following text. Answer with one or more of "
    f"{', '.join(sorted(LABELS))}, separated by commas."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of annotation_data.csv is one user's example. Of a user's labels of one text the first count."""
    texts = {}
    for where, row in raw.read_csv("text_data.csv", columns=("text_id", "text"), filled=("text_id", "text")):
        if row["text_id"] in texts:
            raw.bad(where, "a text of the same text_id came before")
        else:
            texts[row["text_id"]] = row["text"]

    collect, skipped = Collector(), Counter({"no label at 1 or above": 0, "labelled before by this user": 0})
    columns = ("text_id", "annotator_id", *LABELS)
    for where, row in raw.read_csv("annotation_data.csv", columns=columns, filled=("annotator_id",)):
        text_id, user = row["text_id"], row["annotator_id"]
        numbers = {label: _number(row[label]) for label in LABELS}
        wrong = [label for label, number in numbers.items() if not isfinite(number)]
        labels = [label for label, number in numbers.items() if number >= 1]
        if text_id not in texts:
            raw.bad(where, "text_data.csv has no text of this text_id")
        elif wrong:
            raw.bad(where, f"column {wrong[0]!r} is not a number")
        elif (user, text_id) in collect:
            skipped["labelled before by this user"] += 1
        elif not labels:
            skipped["no label at 1 or above"] += 1
        else:
            collect.add(user, text_id, texts[text_id], labels)
    return [Task("studemo", INSTRUCTION, LABELS, multi_label=True, examples=collect.examples, skipped=dict(skipped))]


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return nan


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
