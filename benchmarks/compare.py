"""Did an op become slower beside the others? Two runs of `pytest benchmarks`, compared as ratios.

    pytest benchmarks --benchmark-json now.json
    python benchmarks/compare.py now.json                 against baseline.json; exit code 1 if ours lost more than 25 %
                                                          or a group of it was not measured
    python benchmarks/compare.py now.json --write         now.json becomes the baseline

Seconds belong to a machine; how ours stands beside the other ways of the same group, timed in the same run, belongs
much less to it. So a baseline keeps, of every group, each way's median over ours. pytest-benchmark's own
--benchmark-compare compares seconds, of one machine.
"""

import argparse
import json
import sys
from pathlib import Path

BASELINE = Path(__file__).with_name("baseline.json")
OURS = "ours"
SLOWER = 1.25  # times as slow beside another way as in the baseline: more than noise


def ratios(path: Path) -> dict[str, dict[str, float]]:
    """Group -> way -> its median time over ours. Groups where ours is alone say nothing and are left out."""
    groups: dict[str, dict[str, float]] = {}
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["way"]] = benchmark["stats"]["median"]
    return {group: {way: median / medians[OURS] for way, median in medians.items() if way != OURS}
            for group, medians in groups.items() if OURS in medians and len(medians) > 1}  # fmt: skip


def slower(before: dict[str, dict[str, float]], now: dict[str, dict[str, float]]) -> dict[str, float]:
    """Group -> how many times as slow as before, beside the way that says least so: one noisy rival is no proof."""
    found = {}
    for group in before.keys() & now.keys():
        changes = [before[group][way] / now[group][way] for way in before[group].keys() & now[group].keys()]
        if changes:
            found[group] = min(changes)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("now", type=Path, help="what pytest benchmarks --benchmark-json wrote")
    parser.add_argument("--write", action="store_true", help="make it the baseline")
    args = parser.parse_args()
    now = ratios(args.now)
    if args.write:
        machine = json.loads(args.now.read_text())["machine_info"]["cpu"]
        content = {"cpu": f"{machine.get('brand_raw')}, {machine.get('count')} cores", "ratios": now}
        BASELINE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        print(f"written: {BASELINE.name}, {len(now)} groups")
        return 0
    before = json.loads(BASELINE.read_text())["ratios"]
    changes = slower(before, now)
    for group, change in changes.items():
        print(f"{change:6.2f}x  {group}{'   SLOWER' if change > SLOWER else ''}")
    for group in sorted(before.keys() ^ now.keys()):
        print(f"{'':8}{group}: only {'in the baseline' if group in before else 'now'}")
    return int(any(change > SLOWER for change in changes.values()) or bool(before.keys() - now.keys()))


if __name__ == "__main__":
    sys.exit(main())
