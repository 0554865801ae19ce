"""The guides work: what they tell a reader to write and run is written and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))

# A fenced block: its language, and its lines.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A python block that is a file begins with its name.
FILE = re.compile(r"# (\S+\.py)\n")


@pytest.fixture
def folder(tmp_path):
    """A fresh folder with the programs and recipes, as a reader has them where commands are run."""
    for name in ("train.py", "eval.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(commands, folder):
    """The output of shell commands, which must succeed."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def assert_shown(expected, output):
    """Each expected line is in the output, '…' standing for anything.

    A column may be wider or narrower: it is as wide as its longest number, which training decides.
    """
    for line in expected.splitlines():
        pattern = " +".join(map(re.escape, line.split())).replace("…", ".*")
        assert re.search(f"^{pattern}$", output, re.MULTILINE), f"{line!r} is not in\n{output}"


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=[guide.stem for guide in GUIDES])
def test_a_guide_does_what_it_says(guide, folder):
    output = None
    for language, block in BLOCK.findall(guide.read_text()):
        if language == "python":
            name = FILE.match(block)
            assert name, f"a python block of {guide.name} does not begin with the name of its file"
            (folder / name[1]).write_text(block)
        elif language == "sh":
            output = run(block, folder)
        else:
            assert language == "text", f"{guide.name} has a block of {language}, which is not run"
            assert_shown(block, output)
    assert output is not None, f"{guide.name} runs nothing"


def test_there_are_guides():
    assert GUIDES
