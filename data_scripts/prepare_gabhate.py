"""gabhate: 18 trained annotators say of posts on Gab whether they are hateful.

Content warning: the posts are real hate speech, with slurs.

Source: Kennedy et al. 2022, "Introducing the Gab Hate Corpus: defining and applying hate-based rhetoric to social media
posts at scale" (Language Resources and Evaluation 56).

Raw: gabhate/GabHateCorpus_annotations.tsv with columns ID, Annotator, Text, Hate (0 or 1), and more, tab-separated, a
cell with a tab, a quote or a line end in double quotes. As published, of two annotations of a post by one person the
last counts.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

FILE = "GabHateCorpus_annotations.tsv"
SOURCE = Source(
    dataset="gabhate",
    tasks=("gabhate",),
    files=(
        RawFile(                                         # as the published PEFT-U repository has it
            FILE,
            git_blob="f8b77e3462837e0b9d89799086bc60832a481289",
            url="https://raw.githubusercontent.com/ChrisIsKing/Parameter-Efficient-Personalization/main/data/gabhate/"
                "GabHateCorpus_annotations.tsv",
        ),
    ),
    licence="as stated at its homepage",
    homepage="https://osf.io/edua3",
    citation="Kennedy, Atari, Davani, Yeh, Omrani, Kim, Coombs et al. 2022, Language Resources and Evaluation 56",
    note="Verified on a made-up file in the official layout: both splits are the published code's to the byte. The "
         "official file was not at hand.",
)
LABEL_OF = {"0": "Non-hateful", "1": "Hateful"}
INSTRUCTION = "Do you find the following post hateful? Answer 'Hateful' if you do and 'Non-hateful' if you do not."


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example."""
    collect = Collector()
    filled = ("ID", "Annotator", "Text")
    for where, row in raw.read_csv(FILE, (*filled, "Hate"), delimiter="\t", filled=filled):
        label = LABEL_OF.get(row["Hate"])
        if label is None:
            raw.bad(where, "column 'Hate' is neither 0 nor 1")
        else:
            collect.add(row["Annotator"], row["ID"], row["Text"], [label])
    return [Task("gabhate", INSTRUCTION, tuple(LABEL_OF.values()), multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
