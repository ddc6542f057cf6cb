"""subjectivediscourse: 68 people read answers given in congressional hearings; three tasks from one file.

    subjectivediscourse_response              what does the answer do: answer, shift the question, decline ...
    subjectivediscourse_question_sentiment    how did the questioner feel towards the witness?
    subjectivediscourse_response_sentiment    how did the witness feel towards the questioner?

Source: Ferracane, Durrett, Li, Erk 2021, "Did they answer? Subjective acts and intents in conversational discourse"
(arXiv:2104.04470).

Raw: subjectivediscourse/with_features_annotated_questions_responses_gold.tsv, or the gold_full_data.tar.gz that it
comes in, read as it is; one question and its answer a row; the cells of people and of their labels hold Python tuples
of strings, in the same order. As published, the text is who asks, the question, who answers and the answer, joined by
" \\n ".
"""

import ast

from common import Collector, Task, main
from raw_files import LONE_SURROGATE, RawFile, RawFiles, Source, has_lone_surrogate

FILE = "with_features_annotated_questions_responses_gold.tsv"
SOURCE = Source(
    dataset="subjectivediscourse",
    tasks=("subjectivediscourse_response", "subjectivediscourse_question_sentiment",
           "subjectivediscourse_response_sentiment"),
    files=(
        RawFile(
            "gold_full_data.tar.gz",
            size=2717950,
            sha256="5533179c5129fed368595011bd5785bca55f97f6e9aa3a7da03d692b22aa0ae2",
            url="https://raw.githubusercontent.com/elisaF/subjective_discourse/master/data/gold/gold_full_data.tar.gz",
            holds=FILE,
        ),
        RawFile(FILE, size=6901248, sha256="6760e97c8a201cf5cd2064e34feccc2f1024431c2d368bc5e7c7d4927aeeac94"),
    ),
    licence="none stated for the data",
    homepage="https://github.com/elisaF/subjective_discourse",
    citation="Ferracane, Durrett, Li, Erk 2021, arXiv:2104.04470",
    note="Verified on the official file: the splits of all three tasks are the published code's to the byte.",
)
RESPONSES = ("answer", "answer_overans-sway", "cant-answer-lying", "cant-answer-sincere", "shift-correct",
             "shift-dodge")
SENTIMENTS = ("very-negative", "negative", "somewhat-negative", "neutral", "somewhat-positive", "positive",
              "very-positive")
TEXT_COLUMNS = ("q_speaker_detail", "q_text", "r_speaker_detail", "r_text")
USERS_COLUMN = "gold_workers"

# As the file spells a label -> the label.
RESPONSE_OF = {label: label for label in RESPONSES}
SENTIMENT_OF = {label: label for label in SENTIMENTS} | {
    "veryNegative": "very-negative", "somewhatNegative": "somewhat-negative",
    "somewhatPositive": "somewhat-positive", "veryPositive": "very-positive",
}

# (task, column of its labels, spellings, labels, instruction)
TASKS = (
    ("subjectivediscourse_response", "gold_coarse_labels", RESPONSE_OF, RESPONSES,
     "A witness is asked something in a congressional hearing. What do you think the response does? Reply 'answer' if "
     "it answers, 'answer_overans-sway' if it says more than was asked in order to persuade, 'shift-correct' if it "
     "corrects the question, 'shift-dodge' if it evades it, and, if it declines to answer, 'cant-answer-sincere' or "
     "'cant-answer-lying' by whether you believe that the witness cannot."),
    ("subjectivediscourse_question_sentiment", "gold_q_sentiments", SENTIMENT_OF, SENTIMENTS,
     "A witness is asked something in a congressional hearing. How do you think the person asking feels towards the "
     f"witness? Reply with one of {', '.join(SENTIMENTS)}."),
    ("subjectivediscourse_response_sentiment", "gold_sentiments", SENTIMENT_OF, SENTIMENTS,
     "A witness is asked something in a congressional hearing. How do you think the witness feels towards the person "
     f"asking? Reply with one of {', '.join(SENTIMENTS)}."),
)


def read_tasks(raw: RawFiles) -> list[Task]:
    """Three tasks; everyone's label of a question and answer is one example of each. A row is used whole or not."""
    collected = [Collector() for _ in TASKS]
    columns = ("qa_index", USERS_COLUMN, *TEXT_COLUMNS, *(column for _, column, *_ in TASKS))
    for where, row in raw.read_csv(FILE, columns, delimiter="\t", filled=columns[:2]):
        text = " \n ".join(row[column] for column in TEXT_COLUMNS)
        if not text.replace("\n", "").strip():
            raw.bad(where, "no text")
            continue
        try:
            users = _tuple_of_strings(row[USERS_COLUMN], USERS_COLUMN)
            labels = [
                [label_of[spelling] for spelling in _tuple_of_strings(row[column], column, num=len(users))]
                for _, column, label_of, *_ in TASKS
            ]
        except KeyError:
            raw.bad(where, "an unknown label")
            continue
        except ValueError as error:
            raw.bad(where, str(error))
            continue
        for collect, own_labels in zip(collected, labels):
            for user, label in zip(users, own_labels):
                collect.add(user, row["qa_index"], text, [label])
    return [
        Task(name, instruction, labels, multi_label=False, examples=collect.examples, replaced=collect.replaced)
        for (name, _, _, labels, instruction), collect in zip(TASKS, collected)
    ]


def _tuple_of_strings(cell: str, column: str, num: int | None = None) -> tuple[str, ...]:
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"column {column!r}: not a tuple of strings")
    if has_lone_surrogate(value):                        # an escape in a Python string can spell one
        raise ValueError(f"column {column!r}: {LONE_SURROGATE}")
    if num is not None and len(value) != num:
        raise ValueError(f"column {column!r}: not as many labels as people in {USERS_COLUMN!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
