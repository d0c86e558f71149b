"""paper.bench times the scripts as they are; nothing here asserts a time."""

import json
import subprocess
import sys

from conftest import ROOT, SCRIPTS
from paper import bench, sweep

TINY_STEPS = "--depth 10 --width 1 --rounds 1 --steps 1 --device cpu --precision fp32"


def test_every_contestant_makes_a_step(cli, tmp_path):
    assert cli(bench, f"{TINY_STEPS} --batch-size 4 --no-memory --json {tmp_path / 'bench.json'}")[::2] == (0, "")
    rows = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]
    assert rows.keys() == {"standard", *SCRIPTS} and rows["standard"]["measured"] == 1
    assert all(row["images_per_second"] > 0 and row["peak_bytes"] is None for row in rows.values())
    # A forward pass is 1, a backward pass 1 for activations and 1 for weights, less the gradient at the input.
    for name, passes in {"standard": 3, "fgsm": 5, "slat": 5, "n_aaer": 5, "pgd": 17, "elle": 14, "free": 3}.items():
        assert passes - 0.2 < rows[name]["passes"] <= passes, name
    assert rows["free"]["passes"] == 3 and 15 < rows["yopo"]["passes"] < 16.5 and 11 < rows["fgsm_ga"]["passes"] < 11.5


def test_peak_memory(cli, tmp_path):
    assert cli(bench, f"{TINY_STEPS} --batch-size 256 --only standard,slat --json {tmp_path / 'bench.json'}")[0] == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]
    assert 1e8 < rows["standard"]["peak_bytes"] < rows["slat"]["peak_bytes"] < 5e8


def test_errors_are_one_line(cli):
    for flags, message in (("--only sgd", "'sgd' is not one of"), ("--depth 11", "choose from 10, 16")):
        code, _, err = cli(bench, flags)
        assert code == 2 and err.count("\n") == 1 and message in err


def test_a_new_script_is_found(tmp_path):
    """By the sweep and the bench, without an entry anywhere; conftest finds it for the tests in the same way."""
    source = (ROOT / "train_fgsm.py").read_text()
    (tmp_path / "train_zzz.py").write_text(source.replace("def fgsm(", "def zzz(").replace(" fgsm(model", " zzz(model"))
    command = "from paper import bench, sweep; print(sweep.METHODS, [m for m, _ in sweep.SWEEPS['eps16']], end=' '); "
    command += "print(bench.CONTESTANTS, sweep.epochs_of('zzz', 8))"
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT), "PATH": ""}, "capture_output": True, "text": True}
    out = subprocess.run([sys.executable, "-c", command], **options)
    assert out.stdout == "['zzz'] ['zzz'] ('standard', 'zzz') 8\n", out.stderr
    assert set(sweep.METHODS) == SCRIPTS.keys()
