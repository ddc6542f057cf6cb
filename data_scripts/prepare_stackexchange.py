"""interpersonal, judaism, parenting, philosophy, travel, workplace, worldbuilding: what a user answers to a question.

Seven sites of Stack Exchange, one generative task each: the text is a question, the target this user's answer to it.

Source: the sites' data dumps, archive.org/details/stackexchange, whose posts are licensed CC BY-SA (2.5, 3.0 or 4.0:
each row's ContentLicense says which). PEFT-U's published code draws on a dump of an unknown date, so its counts of
users (57, 99, 88, 145, 93, 435, 926) need not come out of another one.

Raw, in the folder RAW/<site>, one of

- `Posts.xml` out of `<site>.stackexchange.com.7z`: <posts> of one <row> for each post, with attributes Id, PostTypeId
  (1 question, 2 answer), ParentId (an answer's question), OwnerUserId (none if the account is gone), Body, Title, Tags,
  AnswerCount;
- `<site>.csv` as the published code writes it after the filter below: (index), UserId, Answer, Title, Tags, Question,
  QuestionId.

The filter, in the published order (generative_datasets/filter_stackexchange_data.py there):

1. of several answers of one user to one question the first counts; answers of nobody count as of one user;
2. only questions that say of themselves, in AnswerCount, that they have at least 5 answers;
3. only answers to questions with at least 5 answers after (1);
4. only users with at least 20 answers after (3), which leaves out nobody's;
5. each answer with its question: one that lost it in (2), on which the published code breaks off, is left out.

Bodies stay the HTML they are and tags stay as they are written (`<a><b>`, in newer dumps `|a|b|`), as published; the
text is title, tags and question with a space between. An empty body is kept, also as published. Task.json counts the
answers left out under each rule.
"""

from collections import Counter

from common import Collector, Task
from raw_files import RawFile, RawFiles, Source
from several import main

SITES = ("interpersonal", "judaism", "parenting", "philosophy", "travel", "workplace", "worldbuilding")
SOURCES = tuple(
    Source(
        dataset=site,
        tasks=(site,),
        files=(
            RawFile(
                f"{site}.stackexchange.com.7z",
                url=f"https://archive.org/download/stackexchange/{site}.stackexchange.com.7z",
                holds="Posts.xml",
                unpack=f"7z e {site}.stackexchange.com.7z Posts.xml",
            ),
            RawFile(f"{site}.csv"),
        ),
        licence="CC BY-SA 4.0 (older posts 3.0 or 2.5)",
        homepage="https://archive.org/details/stackexchange",
        citation=f"Stack Exchange data dump, {site}.stackexchange.com",
        note="Verified on a made-up dump and CSV in the official layout: filter and split are the published code's to "
             "the byte, but for a body that is exactly `NA`, which becomes empty there and stays here. The official "
             "files were not at hand.",
    )
    for site in SITES
)
QUESTION, ANSWER = "1", "2"                              # PostTypeId
REQUIRED = {QUESTION: ("Id", "AnswerCount", "Body"), ANSWER: ("ParentId", "Body")}
NUMBERS = ("Id", "ParentId", "OwnerUserId", "AnswerCount")
MIN_QUESTION_ANSWERS = 5
MIN_USER_ANSWERS = 20


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; an answer is one example. Memory: all posts of the site, as text."""
    site = raw.source.dataset
    collect, skipped = Collector(), Counter()
    if raw.has(f"{site}.csv") and not raw.has("Posts.xml"):
        _read_csv(raw, collect)
    else:
        _read_dump(raw, collect, skipped)
    instruction = f"Answer the following question, asked on {site}.stackexchange.com, as you would answer it there."
    return [Task(site, instruction, labels=(), multi_label=False, examples=collect.examples, skipped=dict(skipped),
                 replaced=collect.replaced, generative=True, published_fields=("question", "answer"))]


def _read_csv(raw: RawFiles, collect: Collector) -> None:
    """The filtered file, as it is; of two answers of a user to a question the later one counts, as published."""
    columns = ("UserId", "Answer", "Title", "Tags", "Question", "QuestionId")
    for where, row in raw.read_csv(f"{raw.source.dataset}.csv", columns):
        user, question = _number(row["UserId"]), _number(row["QuestionId"])
        if user is None or question is None:
            raw.bad(where, f"column {'UserId' if user is None else 'QuestionId'!r} is not a number")
        else:
            collect.add_target(user, question, f"{row['Title']} {row['Tags']} {row['Question']}", row["Answer"])


def _read_dump(raw: RawFiles, collect: Collector, skipped: Counter[str]) -> None:
    """The site's posts, and the filter."""
    questions: dict[int, str | None] = {}                # id -> text, None of those with too few answers
    answers: dict[tuple[int | None, int], str] = {}      # (user, question) -> the first answer, in the file's order
    for where, post in raw.read_xml("Posts.xml", "posts", "row"):
        kind = post.get("PostTypeId")
        if kind not in REQUIRED:
            skipped["neither a question nor an answer"] += 1
            continue
        numbers = {name: _number(post[name]) for name in NUMBERS if name in post}
        wrong = [name for name in (*REQUIRED[kind], *numbers) if name not in post or numbers.get(name, 0) is None]
        if wrong:
            raw.bad(where, f"attribute {wrong[0]!r} is missing or not a number")
        elif kind == QUESTION:
            enough = numbers["AnswerCount"] >= MIN_QUESTION_ANSWERS
            text = f"{post.get('Title', '')} {post.get('Tags', '')} {post['Body']}" if enough else None
            questions.setdefault(numbers["Id"], text)
        else:
            key = (numbers.get("OwnerUserId"), numbers["ParentId"])
            skipped["not this user's first answer to the question"] += key in answers
            answers.setdefault(key, post["Body"])

    per_question = Counter(question for _, question in answers)
    kept = {key: body for key, body in answers.items() if per_question[key[1]] >= MIN_QUESTION_ANSWERS}
    skipped[f"question of fewer than {MIN_QUESTION_ANSWERS} answers"] += len(answers) - len(kept)
    per_user = Counter(user for user, _ in kept)
    for (user, question), body in kept.items():
        if user is None:
            skipped["no user"] += 1
        elif per_user[user] < MIN_USER_ANSWERS:
            skipped[f"user of fewer than {MIN_USER_ANSWERS} answers"] += 1
        elif questions.get(question) is None:
            skipped[f"no question that says it has {MIN_QUESTION_ANSWERS} answers"] += 1
        else:
            collect.add_target(user, question, questions[question], body)


def _number(value: str) -> int | None:
    """None if it is none. A column of the filtered file that has gaps is written with a point: "12.0"."""
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        return None


if __name__ == "__main__":
    raise SystemExit(main("prepare_stackexchange.py", [(source, read_tasks) for source in SOURCES]))
