"""Does every block of docs/first-steps.md run, and print what the page says it prints?"""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "first-steps.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"# -> (.*)$", re.MULTILINE)


def run_page(page: str) -> int:
    """Run the page's Python blocks in order in one namespace. Returns how many printed lines were compared.

    Every printed line of a block must be shown in it after "# -> ", in order, and nothing else may be shown.
    """
    namespace, compared = {}, 0
    for block in BLOCK.finditer(page):
        code, first_line = block[1], page.count("\n", 0, block.start(1))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines in front, so that an error names the line of the page.
            exec(compile("\n" * first_line + code, str(PAGE), "exec"), namespace)
        shown, got = SHOWN.findall(code), printed.getvalue().splitlines()
        assert got == [line.rstrip() for line in shown], f"{PAGE.name}, the block at line {first_line + 1}"
        compared += len(got)
    return compared


def test_the_page_prints_what_it_shows():
    page = PAGE.read_text()
    assert page.count("```python") == len(BLOCK.findall(page)) > 0
    assert run_page(page) == page.count("# -> ") > 0


@pytest.mark.parametrize(
    "block", ["print(2)  # -> 3", "print(2)", "x = 2  # -> 2", "for i in 1, 2:\n    print(i)\n# -> 1", "assert 2 == 3"]
)
def test_a_page_that_does_not_hold_is_noticed(block):
    right = "```python\ny = 2\n```\ntext\n```python\nprint(y)  # -> 2\n```\n"
    assert run_page(right) == 1
    with pytest.raises(AssertionError):
        run_page(right + f"```python\n{block}\n```\n")
