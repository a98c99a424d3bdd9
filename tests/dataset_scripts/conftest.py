"""What the tests of the data preparation share: running a script, and small official files."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "dataset_scripts"
# The scripts' own modules, hub_server.py, official_files.py.
sys.path[:0] = [str(SCRIPTS), str(REPOSITORY / "tests"), str(Path(__file__).parent)]


@dataclass
class Outcome:
    """How a script ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on standard error, after the progress bars."""
        return self.err.replace("\r", "\n").strip().rpartition("\n")[2]


@pytest.fixture
def run_script(monkeypatch):
    """Runs `dataset_scripts/NAME.py ARGUMENTS` in this process."""

    def run(name: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
            except SystemExit as ended:
                return Outcome(ended.code or 0, out.getvalue(), err.getvalue())
        raise AssertionError(f"{name} did not end with an exit status")

    return run


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A drawn sample of 240 pictures."""
    out = tmp_path_factory.mktemp("sample") / "nus_wide"
    script = SCRIPTS / "make_sample.py"
    command = [sys.executable, script, out, "--num_images", "240", "--seed", "7"]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture
def small_nus_wide(tmp_path) -> Path:
    """Twelve kept rows of the train list, four of the test list, and four that are left out."""
    from official_files import Row, write_official_files

    rows = [Row(f"sky/{i:04d}_{100 + i}.jpg", "sky clouds", "sky") for i in range(12)]
    rows += [Row(f"sky/{i:04d}_{200 + i}.jpg", "sun water", "sun", "Test") for i in range(4)]
    rows += [
        Row("sun/0001_301.jpg", "", "sky"),
        Row("sun/0002_302.jpg", "sky", ""),
        Row("sun/0003_303.jpg", "sky", "sky sun"),
        Row("sun/0004_304.jpg", "sky", "sky sun", "Test"),
    ]
    return write_official_files(tmp_path / "nus_wide", rows)
