"""Does a store that an enemy or a broken disk has changed ever do worse than say so?

    python benchmarks/fuzz_store.py [--cases N] [--quick] [--seed N] [--folder DIR]

Each case takes a small store of float32, bfloat16 or int8 rows, spoils it, and then does with it all that can be done:
open, list, read everybody, verify, add, delete, compact. Every call must end well or with an InputError of one line; a
row that is read must be the one that was kept, to the bit; no case may take 20 seconds or a gigabyte. In a third of the
cases the enemy has computed the checksums anew, so that they find nothing: then only the rest is asked.

Every second case sets a column to a nasty value, one pair after the other, so that 2,500 cases have had them all. The
others spoil at random: bytes, pages and whole files of the index, of its log and of shards; several values at once; the
schema; headers that lie; links, folders and pipes in place of files.

`crashes`: cases in which another exception came, a process died, or a wrong row was handed out. Each is printed with
its number: `--first CASE --cases 1` runs it again.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minipeft import archive, shards
from minipeft.default_base import initialise
from minipeft.errors import InputError
from minipeft.methods import LoRA, PromptTuning
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin
from minipeft.packing import Packing
from minipeft.schedule import Adapter
from minipeft.shards import KINDS, decoded, encoded
from minipeft.store import Store

SECONDS, MEMORY = 20, 1 << 30  # that a case may take
METHODS = (PromptTuning(2), LoRA(1, sites=("q", "v")), LoRA(3, sites=("k",)))
NASTY = (None, -1, 0, 1, 2, 3, 7, 255, 2**31, 2**32, 2**60, 2**63 - 1, -(2**63), 1.5, float("inf"), "", "x", "[]", "{}",
         "null", "[[" * 5000, '{"name": "lora"}', '{"name": "stack", "members": []}', '{"name": "lora", "rank": "x"}',
         '{"name": "prompt", "tokens": 1152921504606846976}', '{"name": "ptuning", "layers": 1152921504606846976}',
         '{"name": "vera", "rank": 1099511627776}', "<" + "d" * 40, "<1152921504606846976d", b"", b"\0", b"\xff" * 40,
         b"x" * 70_000, "../../x", "a\0b", '{"a": ' * 100_000, "[" + "{}," * 30_000 + "{}]",
         '{"name": "' + "x" * 2_000_000 + '"}', "[" + "[],[[[]]]," * 1_000_000 + "0]")  # fmt: skip
LIES = ({"shape": [2**60, 128], "data_offsets": [0, 2**69]}, {"shape": [3, 2**60]}, {"data_offsets": [0, 2**63]},
        {"dtype": "F64"}, {"data_offsets": [8, 0]}, {"shape": [-1, -1]}, {"shape": []}, {"rows": {}})  # fmt: skip

# ---- A small store, whole ------------------------------------------------------------------------------------------


def base_of() -> Decoder:
    base = initialise(Decoder(DecoderConfig(8, 32, 2, 2, 1, 16, 32, max_positions=96)), seed=0)
    base.origin = Origin(Path("base"), "base", base)
    return base


def users(base: Decoder) -> list[Adapter]:
    made = []
    for i in range(14):
        method = METHODS[i % len(METHODS)]
        under = made[0] if i % 5 == 4 else None
        metrics = {"best_epoch": 1, "val_loss": [0.5, 1 / (i + 1)], "of": "training"} if i % 4 else {}
        made.append(Adapter(f"user {i}", method, method.initial_row(base, i, "fuzz"), metrics, under))
    return made


def as_kept(adapter: Adapter, rows: str, base: Decoder) -> Adapter:
    """What comes back out of a store of such rows."""
    packing = Packing(adapter.method, base)
    data = encoded(packing.packed(adapter.row), rows, packing.spans).view(np.uint8)
    under = as_kept(adapter.under, rows, base) if adapter.under else None
    return replace(adapter, row=packing.row(decoded(data, rows, packing.spans)), under=under)


def make(folder: Path, base: Decoder, rows: str = "float32") -> None:
    """Two shards of each method, with rows that nobody has any more; the last users' rows wait in the index."""
    store, waiting = Store.make(folder, base, rows=rows), archive.MAX_WAITING
    archive.MAX_WAITING = 0
    store.add_many(users(base)[:6], base)
    store.add_many(users(base)[3:11], base)
    archive.MAX_WAITING = waiting
    store.add_many(users(base)[11:], base)
    store.delete("user 2")
    shutil.copytree(folder, folder.with_name("log"))  # as a writer leaves it that was killed: most is in the log
    store.close()


# ---- Ways to spoil it ----------------------------------------------------------------------------------------------


def bytes_of(path: Path, draw: random.Random) -> None:
    """A few bytes, most often where a page, a file or a header begins."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(content))
        at = at // 4096 * 4096 + draw.randrange(120) if draw.random() < 0.5 else at
        content[min(at, len(content) - 1)] = draw.choice((0, 1, 255, draw.randrange(256)))
    path.write_bytes(content)


def bit_of(path: Path, draw: random.Random) -> None:
    """One, anywhere: in a shard, most often a user's."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def pages_of(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    pages = [content[i : i + 4096] for i in range(0, len(content), 4096)]
    i, j = draw.randrange(len(pages)), draw.randrange(len(pages))
    pages[i] = draw.choice((pages[j], bytes(4096), draw.randbytes(4096), pages[j][:2048] + pages[i][2048:]))
    path.write_bytes(b"".join(pages))


def length_of(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    keep = draw.choice((0, 1, 8, 100, len(content) - 1, draw.randrange(len(content)), len(content)))
    path.write_bytes(content[:keep] + draw.randbytes(draw.choice((0, 1, 4096))))


def kind_of(path: Path, draw: random.Random) -> None:
    """Something else in place of a file."""
    elsewhere = path.parent.with_name("elsewhere")
    path.rename(elsewhere)
    {"gone": lambda: None, "link": lambda: path.symlink_to(elsewhere), "circle": lambda: path.symlink_to(path),
     "folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "empty": path.touch,
     "zero": lambda: path.symlink_to("/dev/zero")}[draw.choice(
         ("gone", "link", "circle", "folder", "pipe", "empty", "zero"))]()  # fmt: skip


def spoil_index(folder: Path, draw: random.Random) -> None:
    draw.choice((bytes_of, bytes_of, bytes_of, pages_of, length_of))(folder / "index.sqlite", draw)


def spoil_log(folder: Path, draw: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("log"), folder)
    name = draw.choice(("index.sqlite-wal", "index.sqlite-wal", "index.sqlite-shm", "index.sqlite"))
    draw.choice((bytes_of, bytes_of, pages_of, length_of, kind_of))(folder / name, draw)


def spoil_values(folder: Path, draw: random.Random) -> None:
    """Nasty values in any column of any table, which SQLite itself finds nothing wrong with."""
    index = sqlite3.connect(folder / "index.sqlite")
    with index:
        tables = [name for (name,) in index.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        for _ in range(draw.choice((1, 1, 2, 4))):
            table = draw.choice(tables)
            columns = [row[1] for row in index.execute(f"PRAGMA table_info({table})")]
            column, value = draw.choice(columns), draw.choice(NASTY)
            where = draw.choice(("", f" WHERE {columns[0]} = (SELECT {columns[0]} FROM {table} ORDER BY random())"))
            other = f"(SELECT {draw.choice(columns)} FROM {table} ORDER BY random())"
            cast = f"CAST({column} AS {draw.choice(('TEXT', 'BLOB', 'INTEGER', 'REAL'))})"
            how = draw.choice((f"DELETE FROM {table}", *(f"UPDATE OR REPLACE {table} SET {column} = {new}"
                                                         for new in ("?", other, cast))))  # fmt: skip
            try:
                index.execute(how + where, (value,) if "?" in how else ())
            except sqlite3.Error:
                continue  # the enemy's own mistake, e.g. text for a number that must be one
    index.close()


def all_spots(folder: Path, seed: int) -> list[tuple[str, str, object]]:
    """Every (table, column, nasty value that it can take), in random order."""
    index, spots = sqlite3.connect(folder / "index.sqlite", isolation_level=None), []
    for (table,) in index.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        for column in [row[1] for row in index.execute(f"PRAGMA table_info({table})")]:
            for value in NASTY:
                index.execute("BEGIN")
                try:
                    index.execute(f"UPDATE OR REPLACE {table} SET {column} = ?", (value,))
                    spots.append((table, column, value))
                except sqlite3.Error:
                    continue  # e.g. text for a number that must be one
                finally:
                    index.execute("ROLLBACK")
    index.close()
    random.Random(seed).shuffle(spots)
    return spots


def spoil_spot(folder: Path, draw: random.Random, table: str, column: str, value: object) -> None:
    """Everywhere, or in one row."""
    index = sqlite3.connect(folder / "index.sqlite")
    key = index.execute(f"PRAGMA table_info({table})").fetchone()[1]
    where = draw.choice(("", f" WHERE {key} = (SELECT {key} FROM {table} ORDER BY random())"))
    with index:
        index.execute(f"UPDATE OR REPLACE {table} SET {column} = ?{where}", (value,))
    index.close()


def spoil_schema(folder: Path, draw: random.Random) -> None:
    index = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    index.execute("PRAGMA writable_schema=ON")
    index.execute(draw.choice((
        "CREATE VIEW more AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        "CREATE TRIGGER t AFTER INSERT ON adapters BEGIN DELETE FROM adapters; END", "DROP TABLE adapters",
        "DROP TABLE shards", "CREATE TABLE more (x)", "CREATE INDEX more ON adapters (shard)", "DROP INDEX waiting_of",
        "ALTER TABLE adapters ADD COLUMN more", "PRAGMA journal_mode=DELETE", "PRAGMA journal_mode=TRUNCATE",
        f"UPDATE sqlite_schema SET rootpage = {draw.randrange(12)} WHERE name = 'adapters'",
        f"UPDATE sqlite_schema SET rootpage = {draw.randrange(12)} WHERE name = 'sqlite_autoindex_waiting_1'",
        "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = 'forms')",
        "UPDATE sqlite_schema SET sql = replace(sql, 'BLOB', 'TEXT')", "DELETE FROM sqlite_schema WHERE name = 'forms'",
        "UPDATE sqlite_schema SET type = 'view' WHERE name = 'about'", "UPDATE sqlite_schema SET sql = NULL",
        "UPDATE sqlite_schema SET sql = 'CREATE VIEW adapters AS SELECT 1', type = 'view', rootpage = 0 "
        "WHERE name = 'adapters'",
    )))  # fmt: skip
    index.close()


def spoil_shard(folder: Path, draw: random.Random) -> None:
    paths = sorted((folder / "shards").iterdir())
    path = draw.choice(paths)
    if draw.random() < 0.2:
        path.rename(draw.choice((*paths, path.with_name("00000099.safetensors"))))
    elif draw.random() < 0.3:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header["rows"] |= draw.choice(LIES)
        text = draw.choice((json.dumps(header), "[" * 100_000, "", json.dumps({**header, "__metadata__": {"a": "b"}})))
        length = draw.choice((len(text), len(text), 2**63, 2**40, 0))
        path.write_bytes(length.to_bytes(8, "little") + text.encode() + content[8 + size :])
    else:
        draw.choice((bit_of, bit_of, bytes_of, length_of, kind_of))(path, draw)


def spoil_sizes(folder: Path, draw: random.Random) -> None:
    """A shard of rows as long as the index says, which takes no disk: a header, and a hole."""
    index = sqlite3.connect(folder / "index.sqlite")
    with index:
        n, width = draw.choice(((1, 2**24), (3, 2**28), (1, 4_000_000_000), (2**20, 2**10), (1, 2**40)))
        ((number, configuration),) = index.execute("SELECT number, configuration FROM shards ORDER BY random() LIMIT 1")
        index.execute("UPDATE configurations SET width = ? WHERE number = ?", (width, configuration))
        index.execute("UPDATE shards SET n = ? WHERE number = ?", (n, number))
        ((kind,),) = index.execute("SELECT value FROM about WHERE name = 'rows'")
    index.close()
    header = shards._header(n, width, kind)
    with open(shards.shard_path(folder / "shards", number), "wb") as file:
        file.write(header)
        file.truncate(min(len(header) + n * width * KINDS[kind][1], 2**43))  # more than many file systems hold


def spoil_files(folder: Path, draw: random.Random) -> None:
    kind_of(folder / draw.choice(("index.sqlite", "shards", "writer.lock")), draw)


WAYS = (spoil_index, spoil_log, spoil_values, spoil_schema, spoil_shard, spoil_files, spoil_sizes)

# ---- What is done with it -------------------------------------------------------------------------------------------


def use(folder: Path, base: Decoder, kept: dict[str, Adapter], right: Callable) -> None:
    """Everything. Raises what no caller should see. right: compares what is read with what was kept."""
    store = told(lambda: Store(folder, timeout=0.1))
    if store is None:
        told(lambda: Store.make(folder, base, timeout=0.1))
        return
    new = Adapter("new", METHODS[0], METHODS[0].initial_row(base, 99, "fuzz"), {"x": 1})
    told(store.users)
    told(lambda: list(store.everybody()))
    told(lambda: store.get_many(list(kept), base))
    for user, adapter in kept.items():
        told(lambda: store.about(user))  # noqa: B023
        right(told(lambda: store.get(user, base)), adapter)  # noqa: B023
    told(store.verify)
    if told(lambda: store.add(new, base)) is not None:
        raise AssertionError("add returns something")
    told(lambda: store.delete("user 5"))
    told(store.compact)
    for user, adapter in kept.items():
        right(told(lambda: store.get(user, base)), adapter)  # noqa: B023
    told(lambda: store.add_many([new, *list(kept.values())[:3]], base))
    told(store.verify)
    store.close()


def told(call: Callable):
    """What it returns; None if it said in one line what is wrong."""
    try:
        return call()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2_000, "one line, and no endless one"
        return None


def same(found: Adapter | None, expected: Adapter) -> None:
    if found is not None:
        assert found.user == expected.user and torch.equal(found.row, expected.row), "a wrong row"
        assert found.method == expected.method and found.metrics == expected.metrics, "a wrong description"
        assert (found.under is None) == (expected.under is None), "over another adapter"
        same(found.under, expected.under)


CHECKSUM = archive.Archive._checksum


def forged_checksum(self: archive.Archive, configuration: int, of: archive.Entry | archive.Item, row: object) -> int:
    """Whatever the index says."""
    return of.checksum if isinstance(of, archive.Entry) else 0


def cases(
    numbers: range, seed: int, base: Decoder, folder: Path, spots: list[tuple[str, str, object]], report: int
) -> None:
    """Run these cases, and say of each, before it begins, its number; and "crash" if it went wrong."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    kept = {rows: {adapter.user: as_kept(adapter, rows, base) for adapter in users(base) if adapter.user != "user 2"}
            for rows in KINDS}  # fmt: skip
    for number in numbers:
        os.write(report, f"{number}\n".encode())
        draw = random.Random(f"{seed} {number}")
        work, rows, forged = folder / "work", draw.choice([*KINDS]), draw.random() < 1 / 3
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / rows, work)
        if number % 2:
            spoil_spot(work / "whole", draw, *spots[number // 2 % len(spots)])
        else:
            draw.choices(WAYS, weights=(4, 2, 2, 2, 4, 1, 1))[0](work / "whole", draw)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody catches it: the process dies
        archive.Archive._checksum = forged_checksum if forged else CHECKSUM
        try:
            use(work / "whole", base, kept[rows], (lambda found, expected: None) if forged else same)
        except BaseException:
            traceback.print_exc()
            os.write(report, b"crash\n")
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(numbers: range, seed: int, folder: Path) -> list[int]:
    """The cases that went wrong. Processes run them; when one dies, that case did it, and the next goes on after it."""
    base, crashes = base_of(), []
    for rows in KINDS:
        make(folder / rows / "whole", base, rows)
    spots = all_spots(folder / "float32" / "whole", seed)
    while numbers:
        reports, pipe = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reports)
            cases(numbers, seed, base, folder, spots, pipe)
            os._exit(0)
        os.close(pipe)
        with open(reports) as file:
            for line in file:
                if line == "crash\n":
                    crashes.append(last)  # noqa: F821
                    print(f"case {last} went wrong", file=sys.stderr)  # noqa: F821
                else:
                    last = int(line)
                    if last % 1000 == 999:
                        print(f"{last + 1} cases, {len(crashes)} crashes", flush=True)
        _, status = os.waitpid(process, 0)
        if status:
            crashes.append(last)
            print(f"case {last}: the process died, status {status}", file=sys.stderr)
        numbers = range(last + 1, numbers.stop)
    return crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="how many (default: 10000; with --quick 2500)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="the first case's number")
    parser.add_argument("--seed", type=int, default=0)
    memory = Path("/dev/shm")
    parser.add_argument("--folder", type=Path, default=memory if memory.is_dir() else Path(tempfile.gettempdir()))
    args = parser.parse_args()
    number = args.cases or (2_500 if args.quick else 10_000)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        crashes = fuzz(range(args.first, args.first + number), args.seed, Path(folder))
    print(json.dumps({"cases": number, "crashes": len(crashes)}))


if __name__ == "__main__":
    main()
