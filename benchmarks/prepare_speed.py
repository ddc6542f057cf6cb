"""How long does preparing the two largest tasks take, and how much memory? On made-up raw files of their official size.

    python benchmarks/prepare_speed.py [--raw DIR]      seconds and peak memory; one JSON object as the last line

cockamamie: half a million votes in JSON. wikidetox: 1.4 million annotations of 116 thousand comments in two TSV files.
If --raw is given, the cockamamie file there is prepared as well. Each command runs alone, in a process of its own, and
writes to a temporary folder (about 3 GB for wikidetox).
"""

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"
VOTES = {"words": 8120, "users": 1783, "users_per_word": 60}
ANNOTATIONS = {"comments": 115_864, "users": 4053, "rows": 1_365_217, "characters": 400}


def write_cockamamie(folder: Path) -> None:
    rng = random.Random(0)
    votes = {}
    for word in range(VOTES["words"]):
        users = rng.sample(range(VOTES["users"]), VOTES["users_per_word"])
        votes[f"word {word}"] = {"yes_votes": users[:3], "no_votes": users[3:]}
    (folder / "cockamamie.json").write_text(json.dumps({"word_ratings": {"votes": [votes]}}))


def write_wikidetox(folder: Path) -> None:
    rng = random.Random(0)
    comments = range(ANNOTATIONS["comments"])
    with open(folder / "aggression_annotated_comments.tsv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["rev_id", "comment"])
        for comment in comments:
            length = int(rng.expovariate(1 / ANNOTATIONS["characters"])) + 1
            table.writerow([37_675 + comment, "".join(rng.choices("etaoin shrdlu", k=length)) + "é."])
    with open(folder / "aggression_annotations.tsv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["rev_id", "worker_id", "aggression", "aggression_score"])
        for row in range(ANNOTATIONS["rows"]):
            comment = row * len(comments) // ANNOTATIONS["rows"]
            table.writerow([37_675 + comment, rng.randrange(ANNOTATIONS["users"]), float(rng.random() < 0.17), "0.0"])


def measure(dataset: str, raw: Path, layout: str) -> dict[str, float | str]:
    """The command's time on the clock, its own processor time, and its largest resident memory."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(SCRIPTS / f"prepare_{dataset}.py"), "--raw", str(raw), "--out", out]
        began = time.perf_counter()
        process = subprocess.Popen([*command, "--layout", layout], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"prepare_{dataset}.py ended with status {process.returncode}")
        facts = json.loads(Path(out, dataset, "task.json").read_text())["statistics"]
    return {"dataset": dataset, "layout": layout, "examples": facts["pairs"], "wall_s": round(wall_s, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_mib": round(used.ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="the folder that holds a real 'cockamamie'")
    args = parser.parse_args()
    result = {"python": platform.python_version(), "cockamamie": VOTES, "wikidetox": ANNOTATIONS, "runs": []}
    with tempfile.TemporaryDirectory() as made_up:
        places = [("made up", "cockamamie", Path(made_up)), ("made up", "wikidetox", Path(made_up))]
        if args.raw is not None:
            places.append(("real", "cockamamie", args.raw))
        for write, dataset in ((write_cockamamie, "cockamamie"), (write_wikidetox, "wikidetox")):
            (Path(made_up) / dataset).mkdir()
            write(Path(made_up) / dataset)
        for files, dataset, raw in places:
            for layout in ("jsonl", "original"):
                run = {"files": files} | measure(dataset, raw, layout)
                print(f"{files:>8} {dataset:>10} {layout:>8} {run['examples']:>9,} examples {run['wall_s']:6.1f} s "
                      f"({run['cpu_s']:.1f} s of them computing) {run['peak_mib']:5} MiB", flush=True)
                result["runs"].append(run)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
