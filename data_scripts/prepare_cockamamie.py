"""cockamamie: some 1,900 people say which English words are funny.

Content warning: some of the words are vulgar or sexual.

Source: Gultchin, Patterson, Baym, Swinger, Kalai 2019, "Humor in Word Embeddings: Cockamamie Gobbledegook for
Nincompoops" (arXiv:1902.02783); github.com/limorigu/Cockamamie-Gobbledegook, which states no licence.

Raw: cockamamie/cockamamie.json = {"word_ratings": {"votes": [round, ...]}} with further keys that are not read, a
round = {word: {"yes_votes": [user, ...], "no_votes": [user, ...]}}. First, people say of every word shown whether it is
funny; in each of the last rounds they pick the funniest from those that they picked before.

As published, a text id is a number, counted up as words first come; of each word the no-votes come before the
yes-votes; and a later round replaces a user's earlier vote on a word. So a word that was funny but not among the
funniest ends as "no", as do about 95 % of the labels. Words are taken as they stand: the original writes "_" between
the words of an entry, the `.subset` file a blank.
"""

from typing import Any

from common import Collector, Task, main
from raw_files import LONE_SURROGATE, BadInput, RawFile, RawFiles, Source, has_lone_surrogate

SOURCE = Source(
    dataset="cockamamie",
    tasks=("cockamamie",),
    files=(
        RawFile(
            "cockamamie.json",
            git_blob="9386446c3274b3242f130f5ae4f53ef4efa199db",
            url="https://raw.githubusercontent.com/limorigu/Cockamamie-Gobbledegook/master/data/cockamamie_gobbledegook_us_data.json",
        ),
    ),
    licence="none stated",
    homepage="https://github.com/limorigu/Cockamamie-Gobbledegook",
    citation="Gultchin, Patterson, Baym, Swinger, Kalai 2019, arXiv:1902.02783",
    note="Verified on rating rounds 2 to 5: both splits are the published code's to the byte. Round 1, of 120 thousand "
         "words, was not at hand.",
)
LABELS = ("no", "yes")
INSTRUCTION = "Do you find the following word or phrase funny? Answer 'yes' if you do and 'no' if you do not."


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a user's last vote on a word is one example."""
    path, content = raw.read_json("cockamamie.json")
    collect = Collector()
    text_ids: dict[str, int] = {}
    for round_number, votes in enumerate(_rounds(path, content), start=1):
        for word_number, (word, own) in enumerate(votes.items(), start=1):
            where = f"{path}, round {round_number}, word {word_number}"
            if not word.strip():
                raw.bad(where, "no text")
            elif not all(_is_list_of_users(own, field) for field in ("no_votes", "yes_votes")):
                raw.bad(where, "needed 'no_votes' and 'yes_votes', each a list of users")
            elif has_lone_surrogate([word, own]):
                raw.bad(where, LONE_SURROGATE)
            else:
                for label in LABELS:
                    for user in own[f"{label}_votes"]:
                        collect.add(user, text_ids.setdefault(word, len(text_ids)), word, [label])
    return [Task("cockamamie", INSTRUCTION, LABELS, multi_label=False, examples=collect.examples,
                 replaced=collect.replaced)]


def _rounds(path: str, content: Any) -> list[dict[str, Any]]:
    ratings = content.get("word_ratings") if isinstance(content, dict) else None
    rounds = ratings.get("votes") if isinstance(ratings, dict) else None
    if not isinstance(rounds, list) or not all(isinstance(votes, dict) for votes in rounds):
        raise BadInput(f"{path}: needed {{'word_ratings': {{'votes': [{{word: ...}}, ...]}}}}.")
    return rounds


def _is_list_of_users(own: Any, field: str) -> bool:
    users = own.get(field) if isinstance(own, dict) else None
    return isinstance(users, list) and all(type(user) in (int, str) for user in users)


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
