"""wikidetox: 4,053 people say of comments on Wikipedia's talk pages whether they are aggressive.

Content warning: some comments are real abuse.

Source: Wulczyn, Thain, Dixon 2017, "Ex Machina: Personal Attacks Seen at Scale" (arXiv:1610.08914), the set "Wikipedia
Talk Labels: Aggression".

Raw: wikidetox/aggression_annotated_comments.tsv with columns rev_id, comment, and more, and
wikidetox/aggression_annotations.tsv, 1.4 million rows, with columns rev_id, worker_id, aggression (0 or 1, perhaps
written 0.0 or 1.0), and more; tab-separated. A comment has NEWLINE_TOKEN and TAB_TOKEN for its line ends and tabs, and
the published code leaves them as they are; so do we. As published, of two annotations of a comment by one person the
first counts. The comments are held in memory once, the annotations never as rows.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

TEXTS, ANNOTATIONS = "aggression_annotated_comments.tsv", "aggression_annotations.tsv"
SOURCE = Source(
    dataset="wikidetox",
    tasks=("wikidetox",),
    files=(
        RawFile(TEXTS, git_blob="91a33cfaa4184db0c968b2472ad24b5d8dff1d26",
                url="https://ndownloader.figshare.com/files/7038038"),
        RawFile(ANNOTATIONS, git_blob="60b5a82479e4a42d2ea71f7935e5848e0890e416",
                url="https://ndownloader.figshare.com/files/7394506"),
    ),
    licence="as stated at its homepage (labels: CC0-1.0; the comments are Wikipedia's: CC-BY-SA-3.0)",
    homepage="https://figshare.com/articles/dataset/Wikipedia_Talk_Labels_Aggression/4267550",
    citation="Wulczyn, Thain, Dixon 2017, arXiv:1610.08914",
    note="Verified on made-up files in the official layout: both splits are the published code's to the byte. The "
         "official files were not at hand.",
)
LABEL_OF = {"0": "Normal", "0.0": "Normal", "1": "Aggressive", "1.0": "Aggressive"}
INSTRUCTION = (
    "Do you find the following comment on a talk page aggressive? Answer 'Aggressive' if you do and 'Normal' if you do "
    "not."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the annotations is one example."""
    texts: dict[str, str] = {}
    columns = ("rev_id", "comment")
    for where, row in raw.read_csv(TEXTS, columns, delimiter="\t", filled=columns):
        if row["rev_id"] in texts:
            raw.bad(where, "a text of the same rev_id came before")
        else:
            texts[row["rev_id"]] = row["comment"]

    collect, num_again = Collector(), 0
    columns = ("rev_id", "worker_id", "aggression")
    for where, row in raw.read_csv(ANNOTATIONS, columns, delimiter="\t", filled=columns):
        label, text = LABEL_OF.get(row["aggression"]), texts.get(row["rev_id"])
        if label is None:
            raw.bad(where, "column 'aggression' is neither 0 nor 1")
        elif text is None:
            raw.bad(where, f"{TEXTS} has no text of this rev_id")
        elif (row["worker_id"], row["rev_id"]) in collect:
            num_again += 1
        else:
            collect.add(row["worker_id"], row["rev_id"], text, [label])
    return [Task("wikidetox", INSTRUCTION, ("Aggressive", "Normal"), multi_label=False,
                 examples=collect.examples, skipped={"labelled before by this user": num_again})]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
