"""measuringhatespeech: 7,912 people say of comments from YouTube, Twitter and Reddit whether they are hate speech.

Content warning: the comments are real hate speech, with slurs.

Source: Kennedy, Bacon, Sahn, von Vacano 2020, "Constructing interval variables via faceted Rasch measurement and
multitask deep learning: a hate speech application" (arXiv:2009.10277); Sachdeva et al. 2022 (NLPerspectives at LREC).

Raw: measuringhatespeech/measuring-hate-speech.parquet, one person's view of one comment a row, with columns
comment_id, annotator_id, text, hatespeech (0.0 no, 1.0 unclear, 2.0 yes), and more. Parquet needs pyarrow (`pip install
pyarrow`); measuring-hate-speech.csv with the same columns does without. As published, labels are the strings 0, 1 and
2, and of two annotations of a comment by one person the last counts.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

PARQUET, CSV = "measuring-hate-speech.parquet", "measuring-hate-speech.csv"
SOURCE = Source(
    dataset="measuringhatespeech",
    tasks=("measuringhatespeech",),
    files=(RawFile(PARQUET, url="https://huggingface.co/datasets/ucberkeley-dlab/measuring-hate-speech/resolve/main/"
                                "measuring-hate-speech.parquet"),),
    licence="CC-BY-4.0",
    homepage="https://huggingface.co/datasets/ucberkeley-dlab/measuring-hate-speech",
    citation="Kennedy, Bacon, Sahn, von Vacano 2020, arXiv:2009.10277",
    note="Verified on made-up files, Parquet and CSV: both splits are the published code's to the byte. The columns "
         "are those of an excerpt of 99 rows. The official file was not at hand.",
)
LABELS = ("0", "1", "2")
LABEL_OF = {spelling: label for label in LABELS for spelling in (label, f"{label}.0")}
INSTRUCTION = (
    "Is the following comment hate speech? Answer '2' if you think so, '0' if you do not, and '1' if you find it "
    "unclear."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example."""
    filled = ("comment_id", "annotator_id", "text")
    columns = (*filled, "hatespeech")
    collect = Collector()
    for where, row in (raw.read_csv(CSV, columns, filled=filled, line_ends_as_they_are=True) if raw.has(CSV)
                       else raw.read_parquet(PARQUET, columns, filled)):
        label = LABEL_OF.get(str(row["hatespeech"]))
        if label is None:
            raw.bad(where, "column 'hatespeech' is none of 0, 1, 2")
        else:
            collect.add(str(row["annotator_id"]), str(row["comment_id"]), row["text"], [label])
    return [Task("measuringhatespeech", INSTRUCTION, LABELS, multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
