"""Does docs/methods.md show what its command prints?"""

import sys
from pathlib import Path

from minipeft.methods import METHODS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_counts_are_what_the_command_prints(capsys):
    import methods

    methods.counts()
    assert capsys.readouterr().out in (ROOT / "docs" / "methods.md").read_text()


def test_counts_are_the_benchmarks_to_the_number():
    import methods

    flan_t5_base = methods.shapes()["Flan-T5-base"]
    for method, published in [*methods.PEFTU.items(), *methods.EQUAL.items()]:
        method.check(flan_t5_base)
        assert method.count(flan_t5_base) == published, method


def test_every_method_has_a_row():
    page = (ROOT / "docs" / "methods.md").read_text()
    for name in METHODS.keys() - {"stack"}:
        assert f"| `{name}` |" in page, name
