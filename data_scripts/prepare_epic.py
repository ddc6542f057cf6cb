"""epic: 74 people from five English-speaking countries say whether a reply is ironic.

Content warning: posts from Reddit and Twitter, some of them vulgar.

Source: Frenda et al. 2023, "EPIC: Multi-Perspective Annotation of a Corpus of Irony" (ACL 2023).

Raw: epic/EPICorpus.csv with columns user, id_original, label (iro or not), text (the reply), parent_text (the post it
replies to), and more. As published, a text is both, each in double quotes after its role. The published code reads with
pandas, which takes cells such as "NA", "null" and the empty one for missing, so that they appear as nan; so they do
here. Of two labels of a reply by one person the last counts.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

SOURCE = Source(
    dataset="epic",
    tasks=("epic",),
    files=(RawFile("EPICorpus.csv", git_blob="619a7b9e8e5c300c40281f6f4087115eeb981215",
                   url="https://huggingface.co/datasets/Multilingual-Perspectivist-NLU/EPIC/resolve/main/EPICorpus.csv"),),
    licence="CC-BY-NC-SA-4.0",
    homepage="https://huggingface.co/datasets/Multilingual-Perspectivist-NLU/EPIC",
    citation="Frenda, Pedrani, Basile, Lo, Cignarella, Panizzon, Marco, Scarlini, Patti, Bosco, Bernardi 2023, ACL",
    note="Verified on 1,079 of about 3,000 texts, all 74 users: both splits are the published code's to the byte. The "
         "official file has other columns beside those read; its users are Prolific ids, and handles are not masked.",
)
LABEL_OF = {"iro": "Ironic", "not": "Non-ironic"}
INSTRUCTION = (
    "Someone wrote a message and someone else replied. Do you find the reply ironic? Answer 'Ironic' if you do and "
    "'Non-ironic' if you do not."
)

# What pandas.read_csv, version 2 or later, takes for missing unless told otherwise.
MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
))


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example."""
    collect = Collector()
    columns = ("user", "id_original", "label", "text", "parent_text")
    for where, row in raw.read_csv("EPICorpus.csv", columns, line_ends_as_they_are=True):
        user, text_id, label = row["user"], row["id_original"], LABEL_OF.get(row["label"])
        if user in MISSING or text_id in MISSING:
            raw.bad(where, "no user or no id_original")
        elif label is None:
            raw.bad(where, "column 'label' is neither 'iro' nor 'not'")
        else:
            post, reply = ("nan" if row[column] in MISSING else row[column] for column in ("parent_text", "text"))
            collect.add(user, text_id, f'message: "{post}"\n\nreply: "{reply}"', [label])
    return [Task("epic", INSTRUCTION, tuple(LABEL_OF.values()), multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
