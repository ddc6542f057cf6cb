"""studemo: 25 people name the emotions in consumer reviews; several labels per example.

Source: Ngo et al. 2022, "StudEmo: A Non-aggregated Review Dataset for Personalized Emotion Recognition" (workshop
NLPerspectives at LREC), by CLARIN-PL. The files are those in the published PEFT-U repository, which states no licence.

Raw: studemo/text_data.csv with columns text_id, text; studemo/annotation_data.csv with columns text_id, annotator_id
and one number per label, 0 to 3 for how much (valence: -3 to 3). As published, a label counts when its number is at
least 1, so that negative valence is no label, and an annotation without any label is skipped (task.json counts them).
"""

from math import isfinite, nan

from common import BadInput, RawFiles, Task, main

LABELS = ("joy", "trust", "anticipation", "surprise", "fear", "sadness", "disgust", "anger", "valence", "arousal")
INSTRUCTION = (
    "Name every emotion that you find in the following text. Answer with one or more of "
    f"{', '.join(sorted(LABELS))}, separated by commas."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of annotation_data.csv is one user's example."""
    texts = {}
    for where, row in raw.read_csv("text_data.csv", columns=("text_id", "text")):
        if row["text_id"] in texts:
            raise BadInput(f"{where}: this text id came before.")
        texts[row["text_id"]] = row["text"]

    examples, seen, num_unlabelled = {}, set(), 0
    for where, row in raw.read_csv("annotation_data.csv", columns=("text_id", "annotator_id", *LABELS)):
        text_id, user = row["text_id"], row["annotator_id"]
        if text_id not in texts:
            raise BadInput(f"{where}: text_data.csv has no text of this text_id.")
        if (user, text_id) in seen:
            raise BadInput(f"{where}: this annotator labelled this text before.")
        seen.add((user, text_id))
        labels = [label for label in LABELS if _number(row[label], where, label) >= 1]
        if labels:
            examples.setdefault(user, {})[text_id] = {"text": texts[text_id], "label": labels}
        else:
            num_unlabelled += 1
    return [Task("studemo", INSTRUCTION, LABELS, multi_label=True, examples=examples,
                 skipped={"no label at 1 or above": num_unlabelled})]


def _number(value: str, where: str, column: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise BadInput(f"{where}, column {column!r}: not a number.")
    return number


if __name__ == "__main__":
    raise SystemExit(main("studemo", read_tasks))
