"""paper.bench times the scripts as they are; nothing here asserts a time."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS, train
from paper import bench, sweep

TINY_STEPS = "--depth 10 --width 1 --batch-size 4 --rounds 2 --seconds 0 --no-memory --device cpu"


def test_every_contestant_makes_a_step(cli, tmp_path):
    code, out, err = cli(bench, f"{TINY_STEPS} --json {tmp_path / 'bench.json'}")
    assert code == 0 and all(line.startswith("note: --") for line in err.splitlines())
    rows = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]
    assert set(rows) == {"standard", "naive", *SCRIPTS} and rows["standard"]["measured"] == 1
    assert [round(rows[name]["counted"], 2) for name in ("fgsm", "pgd", "fgsm_ga")] == [1.67, 5.67, 3.67]
    assert all(row["images_per_second"] > 0 for row in rows.values())


def test_peak_memory_is_measured_in_a_process_of_its_own(cli, tmp_path):
    flags = f"{TINY_STEPS} --only standard --json {tmp_path / 'bench.json'}".replace("--no-memory ", "")
    flags = flags.replace("--batch-size 4", "--batch-size 256")
    assert cli(bench, flags)[0] == 0
    peak = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]["standard"]["peak_bytes"]
    assert 1e6 < peak < 2e9


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_other_parts(cli, tmp_path, part):
    flags = f"--part {part} --rounds 1 --seconds 0 --device cpu --json {tmp_path / 'bench.json'}"
    if part == "evaluation":
        flags += f" --run {train('slat', 1, tmp_path / 'run')} --n 4 --attacks pgd"
    code, out, err = cli(bench, flags)
    assert code == 0 and not err and "images/s" in out
    result = json.loads((tmp_path / "bench.json").read_text())["result"]
    if part == "evaluation":
        assert result["pgd, plain loop"]["robust"] == result["pgd fp32"]["robust"] == result["pgd bf16"]["robust"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--only sgd", "'sgd' is not one of"), ("--part evaluation", "--run"), ("--depth 11", "6n + 4")],
)
def test_errors_are_one_line(cli, flags, message):
    code, _, err = cli(bench, flags)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_a_new_script_is_found(monkeypatch, tmp_path):
    """By the sweep and the bench, without an entry anywhere; conftest finds it for the tests in the same way."""
    source = (ROOT / "train_fgsm.py").read_text()
    (tmp_path / "train_zzz.py").write_text(source.replace("def fgsm(", "def zzz(").replace(" fgsm(model", " zzz(model"))
    command = "from paper import bench, sweep; print(sweep.METHODS, [m for m, _ in sweep.SWEEPS['eps16']], end=' '); "
    command += "print(bench.CONTESTANTS, sweep.epochs_of('zzz', 8))"
    paths = {"PYTHONPATH": str(ROOT), "PATH": ""}
    out = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert out.stdout == "['zzz'] ['zzz'] ('standard', 'zzz', 'naive') 8\n", out.stderr
    assert set(sweep.METHODS) == SCRIPTS.keys()
