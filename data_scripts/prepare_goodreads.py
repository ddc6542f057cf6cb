"""goodreads: what a reader writes about a book. One generative task: the text is a book, the target this user's review.

Source: the UCSD Book Graph, its subset for spoiler detection: 1.38 million reviews of 25 thousand books by 19 thousand
users. Wan and McAuley 2018, "Item Recommendation on Monotonic Behavior Chains" (RecSys); Wan, Misra, Nakashole, McAuley
2019, "Fine-Grained Spoiler Detection from Large-Scale Review Corpora" (ACL). For academic use; not to be passed on.

Raw, in the folder RAW/goodreads, one of

- `goodreads_reviews_spoiler_raw.json` (user_id, book_id, review_text), `goodreads_books.json` (book_id, title,
  description, authors: [{author_id}]) and `goodreads_book_authors.json` (author_id, name): a JSON object a line;
- `goodreads.csv`, the published code's own file, a review a row with its book: of 33 columns user_id, book_id,
  review_text, Name, Authors, Description are read.

The published rules (generative_datasets/goodreads_filter_reviews.py and goodreads_books.py there): first only users
with at least 20 reviews, then only books with a description; so a user may end with fewer than 20. Spoilers stay in,
marked as in the source. The text is `"{title}" by {authors}: {description}`, and an empty review is kept, all as
published. Of two reviews of one book by one user the later one counts.

Not as published: titles, authors and descriptions there come from another collection of books (so do the 10,027 users
with 5.6 reviews each), and the step that joins books and reviews is not in the published code. From the UCSD files,
examples stand in the order of the reviews, and several authors are joined by ", ".
"""

from collections import Counter
from collections.abc import Iterator

from common import Collector, Task, main
from raw_files import RawFile, RawFiles, Source

ADDRESS = "https://mcauleylab.ucsd.edu/public_datasets/gdrive/goodreads/"
SOURCE = Source(
    dataset="goodreads",
    tasks=("goodreads",),
    files=(
        *(RawFile(name, url=ADDRESS + name) for name in (
            "goodreads_reviews_spoiler_raw.json.gz", "goodreads_books.json.gz", "goodreads_book_authors.json.gz",
        )),
        RawFile("goodreads.csv"),
    ),
    licence="academic use only, no redistribution",
    homepage="https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    citation="Wan et al. 2019, Fine-Grained Spoiler Detection from Large-Scale Review Corpora",
    note="Verified on made-up files in the official layout: from the CSV the split is the published code's to the "
         "byte; from the JSON lines the published rules keep the same reviews. The official files were not at hand.",
)
INSTRUCTION = "Here is a book, with its authors and what it is about. Write the review that you would give it."
MIN_USER_REVIEWS = 20


def read_tasks(raw: RawFiles) -> list[Task]:
    """One task; a review is one example. Memory: all reviews, as text."""
    collect, skipped = Collector(), Counter()
    if raw.has("goodreads.csv") and not raw.has("goodreads_reviews_spoiler_raw.json"):
        _read_csv(raw, collect)
    else:
        _read_json_lines(raw, collect, skipped)
    return [Task("goodreads", INSTRUCTION, labels=(), multi_label=False, examples=collect.examples,
                 skipped=dict(skipped), replaced=collect.replaced, generative=True,
                 published_fields=("book_description", "review"))]


def _read_csv(raw: RawFiles, collect: Collector) -> None:
    """The joined file as it is."""
    columns = ("Name", "Authors", "Description", "user_id", "book_id", "review_text")
    for _, row in raw.read_csv("goodreads.csv", columns, filled=("user_id", "book_id")):
        title, authors, description, user, book, review = (row[column] for column in columns)
        collect.add_target(user, book, f'"{title}" by {authors}: {description}', review)


def _read_json_lines(raw: RawFiles, collect: Collector, skipped: Counter[str]) -> None:
    """Reviews, their books, and the rules."""
    fields = ("user_id", "book_id", "review_text")
    reviews = [
        tuple(review[field] for field in fields)
        for _, review in _objects(raw, "goodreads_reviews_spoiler_raw.json", *fields)
    ]
    per_user = Counter(user for user, _, _ in reviews)
    kept = [review for review in reviews if per_user[review[0]] >= MIN_USER_REVIEWS]
    skipped[f"user of fewer than {MIN_USER_REVIEWS} reviews"] += len(reviews) - len(kept)
    texts = _books(raw, {book for _, book, _ in kept})
    for user, book, review in kept:
        if book in texts:
            collect.add_target(user, book, texts[book], review)
        else:
            skipped["book without a description"] += 1


def _books(raw: RawFiles, wanted: set[str]) -> dict[str, str]:
    """{book_id: text} of the wanted books that have a description."""
    books = {}
    for where, book in _objects(raw, "goodreads_books.json", "book_id", "title", "description"):
        authors = book.get("authors")
        if not isinstance(authors, list) or not all(isinstance(author, dict) for author in authors):
            raw.bad(where, "field 'authors' is missing or not a list of objects")
        elif book["book_id"] in wanted and book["description"]:
            author_ids = [author.get("author_id") for author in authors]
            books[book["book_id"]] = (where, book["title"], author_ids, book["description"])

    names = {author_id: None for _, _, author_ids, _ in books.values() for author_id in author_ids}
    for _, author in _objects(raw, "goodreads_book_authors.json", "author_id", "name"):
        if author["author_id"] in names:
            names[author["author_id"]] = author["name"]

    texts = {}
    for book_id, (where, title, author_ids, description) in books.items():
        if any(names[author_id] is None for author_id in author_ids):
            raw.bad(where, "an author who is not in goodreads_book_authors.json")
        else:
            authors = ", ".join(names[author_id] for author_id in author_ids)
            texts[book_id] = f'"{title}" by {authors}: {description}'
    return texts


def _objects(raw: RawFiles, name: str, *fields: str) -> Iterator[tuple[str, dict]]:
    """(where, object) of every line whose `fields` are strings."""
    for where, value in raw.read_json_lines(name):
        wrong = [field for field in fields if not isinstance(value, dict) or not isinstance(value.get(field), str)]
        if wrong:
            raw.bad(where, f"field {wrong[0]!r} is missing or not a string")
        else:
            yield where, value


if __name__ == "__main__":
    raise SystemExit(main(SOURCE, read_tasks))
