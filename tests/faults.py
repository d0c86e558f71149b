"""Kill training runs and evaluations at random moments, resume them, and compare with what was never killed.

    python tests/faults.py --kills 50          SIGKILL, 50 times each for SLAT, Free-AT, YOPO and an evaluation

Every write is slowed down, so that many a kill lands inside one. Weights, optimiser, metrics.jsonl and verdicts
must be those of the uninterrupted run, bit for bit, with no epoch missing or doubled. The suite runs a short version.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import common
import eval_attacks
import train_slat
from conftest import SMALL, assert_same_run, rows, run_main


class SlowFile(io.FileIO):
    """A file whose content arrives in pieces."""

    def write(self, content):
        for i in range(8):
            super().write(content[i * len(content) // 8 : (i + 1) * len(content) // 8])
            time.sleep(0.002)


def child(script, arguments):
    """Run a script in a fork of this process, which has torch imported: its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        common.open = SlowFile
        code = run_main(importlib.import_module(script), arguments)
    finally:
        os._exit(code)


def whole_run(script, arguments):
    """Run a script to its end: its seconds. Kills come within a share of that."""
    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child(script, arguments), 0)[1]) == 0
    return time.monotonic() - start


def kill_until_done(script, first, again, folder, dice, longest):
    """Start with `first`, kill, start with `again`, kill, ... to the end: (kills, of them inside a write)."""
    kills, inside, arguments = 0, 0, first
    while True:
        pid = child(script, arguments)
        end = time.monotonic() + dice.uniform(0.02, longest * 1.05**kills)  # a machine that has become slow gets on
        done = 0
        while time.monotonic() < end and not done:
            time.sleep(0.003)
            done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"{script} {arguments} ended with {status}"
            return kills, inside
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills, inside = kills + 1, inside + any(folder.glob("*.new"))
        if (folder / "config.json").exists() or not again.endswith("--resume"):
            arguments = again


def training(method, folder, run, epochs=4):
    """A training run and one that is killed and resumed: (script, whole's flags, first, again, its folder, compare)."""
    flags, whole, killed = f"{SMALL} --epochs {epochs} --seed {run}", folder / f"{method}{run}", folder / f"killed{run}"

    def compare():
        assert_same_run(whole, killed)
        assert [row["epoch"] for row in rows(killed)] == list(range(1, epochs + 1))
        assert not list(killed.glob("*.new")), "a half-written file is left"

    first = f"{flags} --out {killed}"
    return f"train_{method}", f"{flags} --out {whole}", first, f"{first} --resume", killed, compare


def evaluation(folder, run):
    """The same for an evaluation of SLAT's first run; all have a state, so that they take as long."""
    here, flags = folder / f"eval{run}", f"--attack fgsm,pgd,apgd-ce --steps 3 --restarts 1 --n 10 --eps 1 --seed {run}"

    def command(name):
        files = f"--state {here / name}.state --json {here / name}.json --save-adv {here / name}.npz"
        return f"{folder / 'slat0'} {flags} {files}"

    def compare():
        results = [json.loads((here / f"{name}.json").read_text())["attacks"] for name in ("whole", "killed")]
        assert results[0] == results[1]
        assert (here / "whole.npz").read_bytes() == (here / "killed.npz").read_bytes()

    return "eval_attacks", command("whole"), command("killed"), command("killed"), here, compare


def faults(name, kills, folder, seed=0):
    """Run a job with that many kills or more, run after run with seeds 0, 1, ...: (kills, inside a write, runs)."""
    dice, total, inside, runs = random.Random(seed), 0, 0, 0
    while total < kills:
        job = evaluation(folder, runs) if name == "evaluation" else training(name, folder, runs)
        script, whole, first, again, here, compare = job
        here.mkdir()
        more, within = kill_until_done(script, first, again, here, dice, 0.7 * whole_run(script, whole))
        compare()
        total, inside, runs = total + more, inside + within, runs + 1
    return total, inside, runs


def warm_up(folder):
    """Train and evaluate once in this process, so that its forks begin with every module imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        run_main(train_slat, f"{SMALL} --epochs 1 --out {folder}")
        run_main(eval_attacks, f"{folder} --n 10 --steps 1 --restarts 1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="slat,free,yopo,evaluation", help="the evaluation is of slat's first run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        warm_up(f"{folder}/warm")
        for name in args.only.split(","):
            start = time.monotonic()
            kills, inside, runs = faults(name, args.kills, Path(folder), args.seed)
            print(f"{name:<11}{kills:>4} kills, {inside} of them inside a write, {runs} runs,", end=" ")
            print(f"all as uninterrupted, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
