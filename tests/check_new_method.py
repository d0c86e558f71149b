"""A new method is one new file: with a train_mine.py nothing else has to be edited for the tests to pass."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FOR_EVERY_METHOD = "mine or another_method or contestant or sweep or script or printed or committed or tables"


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="copies what git knows")
def test_a_new_method_is_one_new_file(tmp_path):
    """In a copy: the tests that run every method or list them all, and the check of README and results."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(os.path.exists, files.stdout.splitlines()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fgsm = (ROOT / "train_fgsm.py").read_text()
    mine = fgsm.replace("def fgsm(", "def mine(").replace("= fgsm(", "= mine(")
    (tmp_path / "train_mine.py").write_text(mine)
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "tests", "tests/check_results.py"]
    command += ["-k", f"({FOR_EVERY_METHOD}) and not new_method", "-n", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "[mine]" in done.stdout, done.stdout[-3000:]
