"""Does the table say what task.json says, and can the plot's names be read?"""

import io
import itertools
import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_statistics import main, markdown_table, plot_disagreement, read_statistics, spread

FACTS = {"users": 20, "users_kept": 18, "texts": 200, "pairs": 4000, "examples_per_user": 200.0, "users_per_text": 20.0,
         "krippendorff_alpha_masi": 0.1484, "label_counts": {"yes": 2632, "no": 1368}}
TASK = {"name": "apples", "labels": ["no", "yes"], "multi_label": False, "generative": False, "subset": False}
OF_LABELS = ("krippendorff_alpha_masi", "label_counts")
GENERATIVE_FACTS = {name: value for name, value in FACTS.items() if name not in OF_LABELS}


def write(tasks, name="apples", facts=FACTS, **changes):
    (tasks / name).mkdir(parents=True)
    (tasks / name / "task.json").write_text(json.dumps(TASK | {"name": name, "statistics": facts} | changes))
    return tasks / name


def row(**changes):
    return {"task": "apples", "users": 20, "alpha": 0.15, "subset": False} | changes


def test_row_of_a_task(tmp_path):
    assert read_statistics(write(tmp_path)) == {
        "task": "apples", "labels": 2, "multi_label": False, "generative": False, "subset": False, "users": 20,
        "users_kept": 18, "texts": 200, "examples": 4000, "examples_per_user": 200.0, "users_per_text": 20.0,
        "alpha": 0.1484, "largest_label": "yes", "largest_share": 0.658,
    }


def test_table(tmp_path):
    write(tmp_path)
    write(tmp_path, "letters", GENERATIVE_FACTS, generative=True, labels=[])
    write(tmp_path, "moods", FACTS | {"krippendorff_alpha_masi": None}, multi_label=True, subset=True)
    rows = [read_statistics(tmp_path / name) for name in ("apples", "letters", "moods")]
    assert markdown_table(rows).splitlines()[2:] == [
        "| apples | 2 | 20 | 18 | 200 | 4,000 | 200.0 | 20.00 | 0.148 | yes 66% |",
        "| letters | free text | 20 | 18 | 200 | 4,000 | 200.0 | 20.00 |  |  |",
        "| moods (subset) | 2 (several) | 20 | 18 | 200 | 4,000 | 200.0 | 20.00 |  | yes 66% |",
    ]


def test_what_a_killed_run_left_is_no_task(tmp_path, capsys):
    write(tmp_path)
    write(tmp_path, ".apples.0011aabb.old")
    assert main(["--tasks", str(tmp_path)]) == 0
    assert capsys.readouterr().out == markdown_table([read_statistics(tmp_path / "apples")]) + "\n"


def test_command_prints_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("pears", "apples"):
        write(tmp_path / "tasks", name)
    assert main(["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "out/statistics.md").read_text() == table
    rows = json.loads((tmp_path / "out/statistics.json").read_text())
    assert [each["task"] for each in rows] == ["apples", "pears"] and markdown_table(rows) + "\n" == table
    assert (tmp_path / "out/disagreement.png").read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib_names_the_extra_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tmp_path / "tasks")
    assert main(["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "minipeft[report]" in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()
    assert main(["--tasks", str(tmp_path / "tasks")]) == 0          # the table needs none


NOT_A_TASK = [("{", "JSONDecodeError"), ('{"name": "a"}', "KeyError"), ("[]", "TypeError")]


@pytest.mark.parametrize("content, reason", NOT_A_TASK)
def test_bad_task_json_is_one_line(tmp_path, capsys, content, reason):
    (write(tmp_path) / "task.json").write_text(content)
    assert main(["--tasks", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "apples/task.json: not a task.json of these scripts" in message and reason in message
    assert message.count("\n") == 1


def test_no_tasks(tmp_path, capsys):
    assert main(["--tasks", str(tmp_path / "nowhere")]) == 2
    assert "no prepared task in it" in capsys.readouterr().err


@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0.001, 1))
def test_spread_keeps_order_and_distance(wanted, gap):
    gap = min(gap, 1 / max(len(wanted), 1))
    places = spread(sorted(wanted), gap)
    assert all(-1e-9 <= place <= 1 for place in places)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))


def test_spread_moves_nobody_who_has_room():
    assert spread([0.1, 0.5, 0.9], 0.2) == [0.1, 0.5, 0.9]


MANY = {
    "one place": [row(task=f"task {i}", alpha=0.01) for i in range(30)],
    "at the top": [row(task=f"a task of a long name, number {i}", alpha=0.9, users=10 ** (i % 5)) for i in range(9)],
    "below chance": [row(task="a", alpha=-0.3, users=1), row(task="b", alpha=1.0, users=9999, subset=True)],
    "none has an alpha": [row(alpha=None)],
}


@pytest.mark.parametrize("rows", MANY.values(), ids=MANY.keys())
def test_names_in_the_plot_do_not_overlap_and_are_inside(rows):
    Text = pytest.importorskip("matplotlib.text").Text               # an annotation's own extent has its line in it
    figure = plot_disagreement(rows)
    figure.savefig(io.BytesIO())                                      # places everything
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == sum(each["alpha"] is not None for each in rows)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 + 1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1
    low, high = figure.axes[0].get_ylim()
    left, right = figure.axes[0].get_xlim()
    for each in rows:
        assert each["alpha"] is None or (low < each["alpha"] < high and left <= each["users"] <= right)
    assert math.log10(right / left) >= 1
