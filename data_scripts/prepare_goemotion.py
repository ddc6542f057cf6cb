"""goemotion: 82 people name the emotions in Reddit comments; several labels per example.

Content warning: the comments are unfiltered and some of them vulgar or abusive.

Source: Demszky et al. 2020, "GoEmotions: A Dataset of Fine-Grained Emotions" (arXiv:2005.00547).

Raw: goemotion/goemotions_{1,2,3}.csv with columns text, id, rater_id, one column of 0 and 1 for each of 27 emotions and
for neutral, and more. As published, the emotions become the six of Ekman by the data set's own map, an annotation that
names none (the comment was unclear) or says neutral (even beside an emotion) is left out, and of two annotations of a
comment by one person the first counts. The published code leaves the order of an example's labels to a set of strings,
which differs from run to run; here they are sorted. The splits do not depend on it.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

ADDRESS = "https://storage.googleapis.com/gresearch/goemotions/data/full_dataset/"
SOURCE = Source(
    dataset="goemotion",
    tasks=("goemotion",),
    files=(
        RawFile("goemotions_1.csv", git_blob="9d2a090e3ff0a626c2ca6e572f07b0c4614bee71",
                url=ADDRESS + "goemotions_1.csv"),
        RawFile("goemotions_2.csv", git_blob="4aa09a16a323b49bacefbf785faaca5b7e8f5d3d",
                url=ADDRESS + "goemotions_2.csv"),
        RawFile("goemotions_3.csv", git_blob="3c42521b338a07407806b0d2659e674ac762d76d",
                url=ADDRESS + "goemotions_3.csv"),
    ),
    licence="Apache-2.0 (its card on Hugging Face)",
    homepage="https://github.com/google-research/google-research/tree/master/goemotions",
    citation="Demszky, Movshovitz-Attias, Ko, Cowen, Nemade, Ravi 2020, arXiv:2005.00547",
    note="Verified on made-up files in the official layout: both splits are the published code's to the byte, but for "
         "the order of an example's labels. The map to Ekman's emotions is the official one. The official files were "
         "not at hand.",
)
EKMAN = {
    "anger": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fear": ("fear", "nervousness"),
    "joy": ("joy", "amusement", "approval", "excitement", "gratitude", "love", "optimism", "relief", "pride",
            "admiration", "desire", "caring"),
    "sadness": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
}
LABELS = tuple(EKMAN)
LABEL_OF = {emotion: label for label, emotions in EKMAN.items() for emotion in emotions}
INSTRUCTION = (
    "Which emotions does the following comment express? Answer with one or more of "
    f"{', '.join(LABELS)}, separated by commas."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task from three files; a row is one example."""
    collect = Collector()
    skipped = {"neutral": 0, "no emotion": 0, "labelled before by this user": 0}
    filled, columns = ("text", "id", "rater_id"), (*LABEL_OF, "neutral")
    for file in SOURCE.files:
        for where, row in raw.read_csv(file.name, (*filled, *columns), filled=filled):
            labels = sorted({LABEL_OF[emotion] for emotion in LABEL_OF if row[emotion] == "1"})
            if not all(row[column] in ("0", "1") for column in columns):
                raw.bad(where, "a column of an emotion is neither 0 nor 1")
            elif row["neutral"] == "1":
                skipped["neutral"] += 1
            elif not labels:
                skipped["no emotion"] += 1
            elif (row["rater_id"], row["id"]) in collect:
                skipped["labelled before by this user"] += 1
            else:
                collect.add(row["rater_id"], row["id"], row["text"], labels)
    return [Task("goemotion", INSTRUCTION, LABELS, multi_label=True, examples=collect.examples, skipped=skipped)]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
