"""Does the report say what result.json and the records say, does it work in a browser, and is every id in it inert?"""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_records import NAMES, simulate

from minipeft.errors import InputError
from minipeft.peftu import charts
from minipeft.peftu.charts import pareto, shown
from minipeft.peftu.protocol import GRID, MOST_RATES
from minipeft.peftu.records import save_record
from minipeft.peftu.report import luck, plain, ranked_by, single_user_lines, write_report
from minipeft.peftu.summary import outcomes, summarise
from minipeft.peftu.tables import (
    accuracy_table,
    at_edge,
    at_edges,
    best_baseline,
    configuration,
    movement_table,
    names_table,
    notes_table,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
FEW = {name: NAMES[name] for name in ("lora", "prompt", "shared", "own_majority", "others_vote", "probe_pooled_user")}


def write_run(out: Path, records: list) -> dict:
    """What a finished run leaves: records and result.json."""
    for record in records:
        save_record(out, record)
    result = summarise(records) | {
        "mode": "fixed", "seeds": [0, 1], "model": "tiny", "command": "python -m minipeft.bench peftu --seeds 2",
        "versions": {"torch": "9.8.7"}, "ceilings": {"synthetic": {"shared": 70.0, "personal": 90.0}},
        "audit": {"synthetic": {"test_examples_fitted": 0, "examples_fitted": {"adapters": 345}}},
        "left_out": {"synthetic": {"ptuning": "no place for virtual tokens"}}, "options": {"top layers": 3},
        "calls": [{"began": "1999-12-31 23:59:59 UTC", "command": "",
                   "versions": {"minipeft": "0.0, commit abc", "cpu": "CPU 9000"},
                   "seconds": {"synthetic": 4321.0}, "records": {"synthetic": ["lora-s0", "prompt-s1"]}}],
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result))
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks, one with a name and a user that try to be more than data. Returns the folder and the result."""
    out = tmp_path_factory.mktemp("run")
    records = simulate("synthetic", names=FEW, seeds=2) + simulate(EVIL, users=30, multi_label=True, seeds=1, names={
        name: FEW[name] for name in ("lora", "shared", "own_majority")}, ids=EVIL + "{}")  # fmt: skip
    result = write_run(out, records)
    assert write_report(out) == out / "report.html"
    return out, result


def test_both_reports_hold_the_figures_of_the_result(run):
    out, result = run
    lora = result["tasks"]["synthetic"]["lora"]
    for text in ((out / "report.html").read_text(), (out / "report.md").read_text().replace("\\", "")):
        assert f"{lora['accuracy']:.1f} [{lora['ci'][0]:.1f} to {lora['ci'][1]:.1f}]" in text
        assert "personal 90.0 %" in text and "shared 70.0 %" in text                              # ceilings
        for said in ("python -m minipeft.bench peftu --seeds 2", "9.8.7", "no place for virtual tokens", "HARDLY MOVED",
                     "users without a label of anybody else", "adapters", "345", "All comparisons", "top layers",
                     "Cold start: new users", "picked of 2 after the fact",
                     "seconds are shared out by rows", "C is 1, fixed", "with the network that writes",
                     "on these alone", "Tasks are families", "1999-12-31 23:59:59", "0.0, commit abc", "CPU 9000",
                     "4,321", "lora-s0, prompt-s1"):
            assert said in text, said


def test_no_figure_is_shown_without_its_uncertainty(run):
    """Every line of the summary that names an accuracy or a difference names an interval too."""
    lines = re.findall(r"<p>(Highest|Against)(.*?)</p>", (run[0] / "report.html").read_text())
    assert len(lines) == 7 and all(re.search(r"\d to \S*\d", rest) for _, rest in lines)


def test_the_html_needs_nothing_else(run):
    text = (run[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', re.sub(r"&lt;.*?&gt;", "", text))
    assert all(source.startswith(("data:image/svg+xml;base64,", "#s")) for source in sources)
    pictures = [source for source in sources if source.startswith("data:")]
    assert len(pictures) == 12 and all(b"</svg>" in base64.b64decode(each.split(",")[1]) for each in pictures)


def test_markdown_links_to_pictures_that_are_there(run):
    out, _ = run
    links = re.findall(r"\]\((figures/[\w.-]+)\)", (out / "report.md").read_text())
    assert len(links) == 12 and all((out / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert sorted(links) == sorted(f"figures/{file.name}" for file in (out / "figures").iterdir())


def test_ids_and_names_are_data(run):
    html, markdown = ((run[0] / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("<script>") == 1 and "<img src=x" not in html and html.count("&lt;img src=x") > 30
    assert "<script>" not in markdown and "<img" not in markdown
    assert plain("a|b *c* <d>\n# e_f") == "a\\|b \\*c\\* &lt;d&gt; \\# e\\_f"


def test_written_again_it_is_the_same_to_the_byte_and_old_pictures_go(tmp_path):
    write_run(tmp_path, simulate("one", names={"own_majority": FEW["own_majority"]}))
    before = write_report(tmp_path).read_bytes()
    for name in ("7-gains.png", "8-mine.png"):
        (tmp_path / "figures" / name).write_bytes(b"of a task that is gone, or of somebody else")
    with open(tmp_path / "report.md", "a") as report:
        report.write("\n![Gain](figures/7-gains.png)\n")
    assert write_report(tmp_path).read_bytes() == before
    assert not (tmp_path / "figures" / "7-gains.png").exists() and (tmp_path / "figures" / "8-mine.png").exists()


def test_baselines_alone_make_a_report_too(tmp_path):
    write_run(tmp_path, simulate("one", names={name: FEW[name] for name in ("own_majority", "others_vote")}))
    text = write_report(tmp_path).read_text()
    assert "Highest of the personal" not in text and text.count("<figure>") == 2


@pytest.mark.parametrize("damage, message", [
    (lambda out: (out / "result.json").unlink(), r"result\.json: cannot be read"),
    (lambda out: (out / "result.json").write_text("{"), r"result\.json is damaged: not JSON"),
    (lambda out: (out / "result.json").write_text("[]"), r"result\.json is damaged: field 'tasks'"),
    (lambda out: shutil.rmtree(out / "records"), "no records in it"),
    (lambda out: (out / "records" / "one" / "lora-s0.json").unlink(), "disagree about 'lora' of task 'one'"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_one_clear_line(tmp_path, damage, message):
    write_run(tmp_path, simulate("one", names={name: FEW[name] for name in ("lora", "shared")}, seeds=1))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_what_did_not_train_is_flagged():
    records = simulate("one", names={name: FEW[name] for name in ("lora", "prompt", "shared")}, seeds=1)
    still = {tensor: {"median": 0.0, "min": 0.0} for tensor in records[2].movement}
    table = movement_table(outcomes([*records[:2], replace(records[2], movement=still)])["one"])
    assert {row[0].text: row[1].text for row in table.rows} == {
        "lora": "trained", "prompt": "HARDLY MOVED", "shared": "DID NOT TRAIN"}  # fmt: skip
    assert [row[5].text for row in table.rows] == ["0", "6", "6"]


@pytest.mark.parametrize(("moved", "said"), [
    ({"prompt": (0.0, 0)}, "DID NOT TRAIN"), ({"q.A": (0.3, 0), "q.B": (0.0, 1)}, "PARTS DID NOT TRAIN"),
    ({"q.A": (0.001, 0), "q.B": (0.002, 1)}, "trained"), ({"q.A": (0.001, 0), "q.B": (5e-5, 1)}, "HARDLY MOVED"),
])  # fmt: skip
def test_a_head_that_trained_hides_nothing(moved, said):
    """On an encoder a head stands beside every method, and always trains."""
    movement = {kind: {"median": size, "min": size, "from_zero": zero} for kind, (size, zero) in moved.items()}
    head = {f"head.{name}": {"median": 0.5, "min": 0.1} for name in ("weight", "bias")}
    (record,) = simulate("one", names={"lora": FEW["lora"]}, seeds=1)
    names = outcomes([replace(record, movement=movement | head)])
    (row,) = movement_table(names["one"]).rows
    assert row[1].text == said
    (alone,) = movement_table(outcomes([replace(record, movement=head)])["one"]).rows
    assert alone[1].text == "trained"


def test_a_best_rate_at_the_end_of_the_grid_is_flagged():
    assert [at_edge({1e-4: low, 1e-3: 0.5, 1e-2: high}) for low, high in ((0.6, 0.6), (0.4, 0.6), (0.6, 0.4))] == [
        "", "lowest", "highest"]  # fmt: skip
    assert at_edge({1e-3: 0.5}) == ""


def test_the_report_says_whose_rate_is_at_the_end_and_how_far_grids_go(tmp_path):
    names = {name: FEW[name] for name in ("lora", "prompt", "shared")}
    grids = {"lora": {1e-3: 0.5, 1e-2: 0.6, 1e-1: 0.7}, "prompt": {1e-3: 0.7, 1e-2: 0.6, 1e-1: 0.5},
             "shared": {1e-3: 0.6, 1e-2: 0.5, 1e-1: 0.7}}  # fmt: skip
    records = [replace(record, lr_grid=grids[record.name]) for record in simulate("one", names=names, seeds=1)]
    write_run(tmp_path, records)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text().replace("\\", "")
    assert "a better one may lie beyond, or the next was given up: lora (lowest), prompt (highest)." in text
    assert f"every method tries {len(GRID)}, and where the best lies at an end those beyond" in text
    assert f"up to {MOST_RATES} in all" in text and "whole process's peak memory" in text
    inside = [replace(record, lr_grid=grids["shared"]) for record in records]
    assert at_edges(outcomes(inside)["one"]) == ""


def test_a_half_is_rounded_away_from_zero():
    figures = [shown(value, ".1f") for value in (70.25, 70.249, 67.35, -2.25, 0.05, 1e6)]
    assert figures == ["70.3", "70.2", "67.4", "\N{MINUS SIGN}2.3", "0.1", "1000000.0"]
    assert shown(-0.02, "+.1f") == shown(0.02, "+.1f") == "+0.0" and shown(0, ",d") == "0"


def test_a_method_is_told_as_it_was_configured():
    stack = {"name": "stack", "members": [{"name": "lora", "rank": 8}, {"name": "head"}]}
    assert configuration(stack) == "lora (rank 8) + head"


def test_of_one_or_two_seeds_the_report_says_how_little_is_known_of_luck():
    assert "no p-value" in luck({"seeds": [0]}) and "no p-value" not in luck({"seeds": [0, 1]})
    assert "too few" in luck({"seeds": [0, 1]}) and "too few" not in luck({"seeds": [0, 1, 2]})


def test_of_a_single_user_the_report_says_that_intervals_are_nothing():
    assert single_user_lines({"lora": {"num_users": 1}}) and not single_user_lines({"lora": {"num_users": 2}})


def test_the_report_says_which_scoring_the_mode_ranks_by_and_shows_both(run):
    for text in ((run[0] / "report.html").read_text(), (run[0] / "report.md").read_text().replace("\\", "")):
        assert "Mode fixed ranks by the fixed scoring" in text
        assert "fixed scoring, %" in text and "published scoring, %" in text
    assert "ranks by the published scoring" in ranked_by("paper")


def test_in_mode_paper_the_report_says_what_is_published(tmp_path):
    """Several labels: one right one is enough. Zero-shot: with the user's own examples."""
    result = write_run(tmp_path, simulate("one", names=FEW, seeds=1))
    first = {}
    for mode in ("fixed", "paper"):
        (tmp_path / "result.json").write_text(json.dumps(result | {"mode": mode}))
        write_report(tmp_path)
        first[mode] = (tmp_path / "report.md").read_text().split("\n")[2]
    assert "Jaccard" in first["fixed"] and "Jaccard" not in first["paper"] and "one right one" in first["paper"]
    fixed, paper = (names_table(["zero_shot"], mode).rows[0][1].text for mode in ("fixed", "paper"))
    assert "own examples" in paper and "own examples" not in fixed


def test_who_answers_a_part_only_is_not_on_the_line_of_costs(monkeypatch):
    shown = []
    monkeypatch.setattr(charts, "pareto", lambda points: shown.append({*points}) or [])
    entries = summarise([each if each.name != "others_vote" else replace(
        each, correct=[own[:5] for own in each.correct], answered=[[*range(5)] for _ in each.users])
        for each in simulate("one", names=FEW, seeds=1)])["tasks"]["one"]  # fmt: skip
    charts.costs({name: entry for name, entry in entries.items() if entry})
    assert all("others_vote" not in names and "own_majority" in names for names in shown) and len(shown) == 2


def answering(num: int | None) -> dict[str, dict]:
    """Figures of a run in which others' vote answers so many of each user's test examples; None: all of all users."""
    records = {each.name: each for each in simulate("one", names=FEW, seeds=1)}
    vote, own = records["others_vote"], records["own_majority"]
    records["others_vote"] = replace(own, name="others_vote", bytes_per_user=0) if num is None else replace(
        vote, correct=[scores[:num] for scores in vote.correct], answered=[[*range(num)] for _ in vote.users])
    return {name: entry for name, entry in summarise([*records.values()])["tasks"]["one"].items() if entry}


def test_others_vote_is_not_on_the_line_of_costs_where_it_answers_all_either(monkeypatch):
    shown = []
    monkeypatch.setattr(charts, "pareto", lambda points: shown.append({*points}) or [])
    charts.costs(answering(None))
    assert all("others_vote" not in names and "own_majority" in names for names in shown) and len(shown) == 2


def test_who_answers_a_part_is_marked_where_the_figure_stands(tmp_path):
    """17 of 20 users, 5 of their 20 test examples."""
    part = "21 % of test examples"
    marked = {row[0].text: row[2].text for row in accuracy_table(answering(5)).rows}
    assert [name for name, text in marked.items() if text.endswith(f" on {part}")] == ["others vote"]
    ticks = [each.get_text() for each in charts.accuracies(answering(5), {}).axes[0].get_yticklabels()]
    assert [tick for tick in ticks if part in tick] == [f"others vote\n{part}"]
    assert charts.covered(answering(None)) == {}
    write_run(tmp_path, simulate("one", names=FEW, seeds=1))
    write_report(tmp_path)
    overview = (tmp_path / "report.md").read_text().split("\n## ")[0].replace("\\", "")
    (row,) = re.findall(r"^\| others vote \|.*%.*$", overview, re.MULTILINE)
    assert row.endswith("] on 85 % of test examples |")


def test_the_best_baseline_is_compared_with_whichever_it_is(tmp_path):
    """Retrieval is none of those that a personal method has to beat in any case."""
    names = {name: NAMES[name] for name in ("lora", "own_majority", "others_vote", "probe_pooled_user", "retrieval")}
    names |= {"retrieval": ("baseline", 0.3, 0.02, 0), "others_vote": ("baseline", 0.9, 0.0, 0)}
    result = write_run(tmp_path, simulate("one", names=names, seeds=1))
    figures = {name: entry for name, entry in result["tasks"]["one"].items() if entry}
    assert max(figures, key=lambda name: figures[name]["accuracy"]) == "others_vote"  # of those it answers
    assert best_baseline(figures) == "retrieval" and best_baseline({"lora": figures["lora"]}) is None
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text().replace("\\", "")
    (said,) = re.findall(r"^Against retrieval, the highest baseline.*$", text, re.MULTILINE)
    assert re.search(r"\d to \S*\d", said)
    table = text.split("### Personal methods against what they have to beat")[1].split("###")[0]
    assert "| lora | retrieval |" in table and "| lora | own majority |" in table


def test_ceilings_are_drawn_where_they_lie():
    axes = charts.accuracies(answering(5), {"shared": 71.25, "personal": 91.5}).axes[0]
    upright = {line.get_label(): line for line in axes.lines if len({*line.get_xdata()}) == 1 < len(line.get_xdata())}
    assert {name: line.get_xdata()[0] for name, line in upright.items()} == {
        "shared ceiling 71.3": 71.25, "personal ceiling 91.5": 91.5}  # fmt: skip
    assert len({line.get_linestyle() for line in upright.values()}) == 2
    for line in upright.values():  # from the bottom to the top of the axes
        assert list(line.get_ydata()) == [0, 1] and line.get_transform() == axes.get_xaxis_transform(which="grid")
    assert not [line for line in charts.accuracies(answering(5), {}).axes[0].lines if "ceiling" in line.get_label()]


def test_new_users_have_a_panel_a_name_and_the_others_behind():
    figures = answering(None)
    panels = charts.cold_start(figures).axes
    names = [name for name, entry in figures.items() if entry["cold_start"]]
    assert [panel.get_title() for panel in panels] == [charts.label(name) for name in names] and len(names) > 2
    for name, panel in zip(names, panels):
        *behind, own = panel.lines
        curve = figures[name]["cold_start"]
        assert [*own.get_ydata()] == [point["accuracy"] for point in curve.values()] and len(behind) == len(names)
        assert panel.get_ylim()[0] < min(point["ci"][0] for point in curve.values())
        assert [tick.get_text() for tick in panel.get_xticklabels()] == [f"{k}\n20" for k in curve]
    figures["shared"]["cold_start"] = {"0": figures["shared"]["cold_start"]["0"]}  # it knows no more examples
    fewer = charts.cold_start(figures).axes
    assert len(fewer) == len(panels) - 1 and len(fewer[0].lines) == len(panels[0].lines)
    alone = {name: entry | {"cold_start": None} for name, entry in figures.items() if name != "shared"}
    assert charts.cold_start(alone) is None and charts.cold_start(alone | {"shared": figures["shared"]}) is None


def test_what_is_true_of_several_stands_once():
    names = outcomes(simulate("one", names=FEW, seeds=2))["one"]
    rows = notes_table(names, {name: {} for name in names} | {"retrieval": None}, {}).rows
    said = {row[0].text: (row[1].text, row[2].text) for row in rows}
    assert said["texts cut to 512 positions"] == ("4", "lora, prompt, shared")
    assert said["not made: does not apply here, or was not asked for"][1] == "retrieval"


def test_the_front_holds_what_nothing_cheaper_beats():
    points = {"free": (0, 50), "free too": (0, 40), "cheap": (10, 60), "dear": (100, 60), "best": (1000, 61)}
    assert pareto(points) == ["free", "cheap", "best"]


def test_a_dollar_in_a_name_is_a_dollar():
    """As a formula this name cannot be set."""
    figures = {"$\\nothing$": {"kind": "baseline", "accuracy": 50.0, "ci": [40.0, 60.0], "num_answered": 1}}
    with charts.style():
        assert charts.written(charts.accuracies(figures, {}), "png").startswith(b"\x89PNG")


# ---- In a browser --------------------------------------------------------------------------------------------------

PROBE = """
<script>
const problems = [];
addEventListener("error", event => problems.push(event.message), true);
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
addEventListener("load", () => {
  const table = [...document.querySelectorAll("table")].find(each => each.tHead.textContent.includes("worst tenth"));
  const headers = [...table.tHead.rows[0].cells];
  const column = name => headers.findIndex(header => header.textContent.trim().startsWith(name));
  const read = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent.trim());
  const click = name => { headers[column(name)].querySelector("button").click(); return read(column(name)); };
  const found = {
    accuracy: click("accuracy"), turned: click("accuracy"), method: click("method"),
    unknown: click("users below shared"),
    sort: headers.map(header => header.getAttribute("aria-sort")),
    focusable: headers.every(header => header.querySelector("button").tabIndex === 0),
    wide: document.documentElement.scrollWidth, window: innerWidth, title: document.title,
    pictures: [...document.images].every(image => image.complete && image.naturalWidth > 0), problems,
  };
  document.body.innerHTML = "";
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  document.body.append(out);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_tables_sort_nothing_fails_and_the_page_keeps_its_width(run, width, tmp_path):
    """Chromium windows have a least width: the page lies in a frame as wide as asked, on a page of the same origin."""
    page = tmp_path / "probed.html"
    page.write_text((run[0] / "report.html").read_text().replace("<title>", PROBE + "<title>", 1))
    outer = tmp_path / "outer.html"
    outer.write_text(f"""<iframe src="probed.html" style="width:{width}px;height:800px;border:0"></iframe><script>
        addEventListener("load", () => {{
          document.body.append(document.querySelector("iframe").contentDocument.getElementById("found")); }});
        </script>""")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--enable-logging=stderr",
         "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120)  # fmt: skip
    answer = re.search(r'<pre id="found">([\w+/=]+)</pre>', done.stdout)
    assert answer, done.stdout[-500:] + done.stderr[-2000:]
    found = json.loads(base64.b64decode(answer[1]))
    assert found["problems"] == [] and "CONSOLE" not in done.stderr and found["title"].startswith("Protocol report")
    figures = run[1]["tasks"][EVIL]
    accuracies = sorted(f"{each['accuracy']:.1f}" for each in figures.values() if each)
    assert found["accuracy"] == accuracies and found["turned"] == accuracies[::-1]
    assert found["method"] == sorted(found["method"])
    assert found["unknown"][-1] == "\N{EN DASH}"
    assert [sort for sort in found["sort"] if sort] == ["ascending"] and found["focusable"] and found["pictures"]
    assert found["window"] == width and found["wide"] <= width
