"""Does benchmarks/compare.py see an op that became slower, and no slow machine?"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare


def write(path, medians):
    """medians: group -> way -> seconds."""
    benchmarks = [{"group": group, "params": {"way": way}, "stats": {"median": median}}
                  for group, ways in medians.items() for way, median in ways.items()]  # fmt: skip
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {"cpu": {"brand_raw": "x", "count": 2}}}))
    return str(path)


BEFORE = {"lora": {"ours": 1.0, "loop": 4.0, "grouped_mm": 2.0}, "ia3": {"ours": 1.0, "loop": 3.0},
          "alone": {"ours": 1.0}}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")

    def run(medians, *options):
        monkeypatch.setattr(sys, "argv", ["compare.py", write(tmp_path / "now.json", medians), *options])
        return compare.main()

    assert run(BEFORE, "--write") == 0
    return run


def test_a_slower_machine_is_no_slower_op(run):
    assert run({group: {way: 3 * median for way, median in ways.items()} for group, ways in BEFORE.items()}) == 0


def test_a_slower_op_is_named(run, capsys):
    assert run(BEFORE | {"lora": {"ours": 1.5, "loop": 4.0, "grouped_mm": 2.0}}) == 1
    assert "1.50x  lora   SLOWER" in capsys.readouterr().out


def test_one_noisy_rival_is_no_proof(run):
    assert run(BEFORE | {"lora": {"ours": 1.0, "loop": 2.0, "grouped_mm": 2.0}}) == 0


def test_a_group_that_only_one_side_has_is_said(run, capsys):
    """One that was not measured may be as slow as it likes; a new one has no past."""
    assert run(BEFORE | {"new": {"ours": 1.0, "loop": 2.0}}) == 0
    assert run({"lora": BEFORE["lora"], "new": {"ours": 1.0, "loop": 2.0}}) == 1
    out = capsys.readouterr().out
    assert "ia3: only in the baseline" in out and "new: only now" in out
