"""Does prepare_goodreads.py keep the reviews that the published rules keep, and split them as published?"""

import csv
import gzip
import hashlib
import io
import json

import pytest
from common import main
from prepare_goodreads import SOURCE, read_tasks

# sha256 of what the published prepare script makes of `csv_text()`.
PUBLISHED_SHA256 = "29b3ec161ca1c631fcfa3d0740b8a72b8b8fed390a6d1a7c40a0e66a0d5fd781"
COLUMNS = (
    "", "Id", "Name", "Authors", "ISBN", "Rating", "PublishYear", "PublishMonth", "PublishDay", "Publisher",
    "RatingDist5", "RatingDist4", "RatingDist3", "RatingDist2", "RatingDist1", "RatingDistTotal", "CountsOfReview",
    "Language", "PagesNumber", "Description", "pagesNumber", "Count of text reviews", "user_id", "book_id", "review_id",
    "rating", "review_text", "date_added", "date_updated", "read_at", "started_at", "n_votes", "n_comments",
)
REVIEWS, BOOKS, AUTHORS = (f"goodreads_{name}.json" for name in ("reviews_spoiler_raw", "books", "book_authors"))


def csv_text():
    """A row a review, in the order of the books. User "c" has 8 of them; of book 30 two come twice, one is empty."""
    rows = []
    for book in (*range(30, 12, -1), 30):
        for user in "abc"[: 2 if book > 21 or len(rows) > 40 else 3]:
            review = "" if (user, book) == ("a", 20) else f'Well, "so"\r\nof {book}, {user}, {len(rows)}'
            given = {"Name": f"Book {book}", "Authors": "Ann Author", "Description": f"<i>What</i>\nof {book}, then",
                     "Id": book, "user_id": user, "book_id": book, "review_text": review, "rating": 4}
            rows.append([len(rows), *(given.get(column, "") for column in COLUMNS[1:])])
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue().encode()


def review(user, book, text="A review. (view spoiler)[He dies. (hide spoiler)]"):
    return {"user_id": user, "book_id": str(book), "review_id": f"{user}{book}", "rating": 4, "review_text": text,
            "date_added": "Mon Jul 17 08:35:21 -0700 2017", "date_updated": "", "read_at": "", "started_at": "",
            "n_votes": 0, "n_comments": 0}


def raw_files():
    """25 books, of which 3 has no description and 4 is unknown; "ann" reviewed all, "ben" 20, "cid" 19."""
    reviews = [review(user, book) for book in range(25)
               for user, num in (("ann", 25), ("ben", 20), ("cid", 19)) if book < num]
    books = [{"isbn": "", "text_reviews_count": "3", "title": f"Book {book}", "book_id": str(book),
              "description": "" if book == 3 else f"What happens in {book}.\nAnd then.", "popular_shelves": [],
              "authors": [{"author_id": "7", "role": ""}, {"author_id": "8", "role": "Illustrator"}][:1 + book % 2]}
             for book in reversed(range(25)) if book != 4]
    authors = [{"average_rating": "4.0", "author_id": str(number), "name": name, "ratings_count": "1"}
               for number, name in ((7, "Åse A."), (8, "Bo B."), (9, "Nobody's"))]
    return {REVIEWS: reviews, BOOKS: books, AUTHORS: authors}


def write(tmp_path, files):
    folder = tmp_path / "raw/goodreads"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{name}.gz").write_bytes(gzip.compress(lines))


def prepare(tmp_path, *options):
    return main(SOURCE, read_tasks, ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *options])


def facts(tmp_path):
    return json.loads((tmp_path / "out/goodreads/task.json").read_text())["statistics"]


def lines(tmp_path):
    return [json.loads(line) for name in ("train", "val", "test")
            for line in (tmp_path / f"out/goodreads/{name}.jsonl").read_text().splitlines()]


def test_csv_gives_the_bytes_of_the_published_code(tmp_path):
    path = tmp_path / "raw/goodreads/goodreads.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(csv_text())
    assert prepare(tmp_path, "--layout", "original") == 0
    content = (tmp_path / "out/goodreads/user_data_no_leak.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == PUBLISHED_SHA256
    assert facts(tmp_path)["users"] == 3 and facts(tmp_path)["users_kept"] == 2
    assert facts(tmp_path)["annotations_replaced"] == 2


def test_bad_row_of_the_csv(tmp_path, capsys):
    path = tmp_path / "raw/goodreads/goodreads.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(csv_text().replace(b",a,30,", b",,30,", 1))
    assert prepare(tmp_path) == 2
    assert "goodreads.csv, line 2: column 'user_id' is empty" in capsys.readouterr().err


def test_rules_on_the_json_lines(tmp_path):
    write(tmp_path, raw_files())
    assert prepare(tmp_path) == 0
    assert facts(tmp_path)["rows_skipped"] == {"user of fewer than 20 reviews": 19, "book without a description": 4}
    found = {(line["user"], int(line["id"])) for line in lines(tmp_path)}
    assert found == {(user, book) for user, num in (("ann", 25), ("ben", 20)) for book in range(num)
                     if book not in (3, 4)}


def test_text_and_target(tmp_path):
    write(tmp_path, raw_files())
    prepare(tmp_path)
    texts = {line["id"]: line["text"] for line in lines(tmp_path)}
    assert texts["6"] == '"Book 6" by Åse A.: What happens in 6.\nAnd then.'
    assert texts["7"] == '"Book 7" by Åse A., Bo B.: What happens in 7.\nAnd then.'
    assert {line["target"] for line in lines(tmp_path)} == {review("ann", 0)["review_text"]}


def test_reviews_stay_in_their_order_and_the_later_of_two_counts(tmp_path):
    files = raw_files()
    files[REVIEWS].append(review("ann", 0, "Read again."))
    write(tmp_path, files)
    prepare(tmp_path, "--layout", "original")
    own = json.loads((tmp_path / "out/goodreads/user_data_no_leak.json").read_text())["ann"]
    assert [list(part) for part in own.values()] == [sorted(part, key=int) for part in own.values()]
    assert {"review": ["Read again."]}.items() <= next(part["0"] for part in own.values() if "0" in part).items()
    assert facts(tmp_path)["annotations_replaced"] == 1


def without(field):
    return lambda row: {name: value for name, value in row.items() if name != field}


BAD_ROWS = {
    "a review of no book": (REVIEWS, without("book_id"), "field 'book_id'"),
    "a review by a number": (REVIEWS, lambda row: row | {"user_id": 5}, "field 'user_id'"),
    "a review that is a list": (REVIEWS, lambda row: [row], "field 'user_id'"),
    "a book of no title": (BOOKS, without("title"), "field 'title'"),
    "a book of no authors": (BOOKS, without("authors"), "field 'authors'"),
    "an unknown author": (BOOKS, lambda row: row | {"authors": [{"author_id": "99"}]}, "an author who is not in"),
    "an author of no name": (AUTHORS, without("name"), "field 'name'"),
}


@pytest.mark.parametrize("name, change, expected", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_stops_or_is_counted(tmp_path, capsys, name, change, expected):
    files = raw_files()
    files[name][2] = change(files[name][2])
    write(tmp_path, files)
    assert prepare(tmp_path) == 2
    assert f"{name}.gz, line 3: {expected}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert prepare(tmp_path, "--skip-bad") == 0
    assert sum(facts(tmp_path)["bad_rows"].values()) == 1


def test_missing_file_says_where_to_get_it(tmp_path, capsys):
    files = raw_files()
    del files[AUTHORS]
    write(tmp_path, files)
    assert prepare(tmp_path) == 2
    message = capsys.readouterr().err
    assert "https://mcauleylab.ucsd.edu/public_datasets/gdrive/goodreads/goodreads_book_authors.json.gz" in message
