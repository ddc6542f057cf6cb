"""unhealthyconversations: 588 people say whether a comment below a news article has a place in a healthy conversation.

Content warning: some comments are hostile or insulting.

Source: Price et al. 2020, "Six Attributes of Unhealthy Conversations" (arXiv:2010.07410).

Raw: unhealthyconversations/unhealthy_full.csv with columns _unit_id, comment, _worker_id, healthy (1 if it is), and
more. As published, of two annotations of a comment by one person the first counts.
"""

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

FILE = "unhealthy_full.csv"
SOURCE = Source(
    dataset="unhealthyconversations",
    tasks=("unhealthyconversations",),
    files=(
        RawFile(
            FILE,
            git_blob="983a803d4a4d87d84c35199a6257ff559b0159c5",
            url="https://raw.githubusercontent.com/conversationai/unhealthy-conversations/main/unhealthy_full.csv",
        ),
    ),
    licence="CC-BY-NC-SA-4.0",
    homepage="https://github.com/conversationai/unhealthy-conversations",
    citation="Price, Gifford-Moore, Flemming, Musker, Roichman, Sylvain, Thain, Dixon, Sorensen 2020, arXiv:2010.07410",
    note="Verified on a made-up file in the official layout: both splits are the published code's to the byte. The "
         "official file was not at hand.",
)
LABEL_OF = {"1": "healthy", "0": "unhealthy"}
INSTRUCTION = (
    "Does the following comment have a place in a healthy online conversation? Answer 'healthy' if you think so and "
    "'unhealthy' if you do not."
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a row of the file is one example."""
    collect, num_again = Collector(), 0
    filled = ("_unit_id", "comment", "_worker_id")
    for where, row in raw.read_csv(FILE, (*filled, "healthy"), filled=filled):
        label = LABEL_OF.get(row["healthy"])
        if label is None:
            raw.bad(where, "column 'healthy' is neither 0 nor 1")
        elif (row["_worker_id"], row["_unit_id"]) in collect:
            num_again += 1
        else:
            collect.add(row["_worker_id"], row["_unit_id"], row["comment"], [label])
    return [Task("unhealthyconversations", INSTRUCTION, tuple(LABEL_OF.values()), multi_label=False,
                 examples=collect.examples, skipped={"labelled before by this user": num_again})]


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
