"""Kill training runs and evaluations at random moments, resume them, and compare with what was never killed.

    python tests/faults.py --kills 50          SIGKILL, 50 times each for SLAT, Free-AT, YOPO and an evaluation

Every write is slowed down, so that many a kill lands inside one. Weights, optimiser, metrics.jsonl and verdicts
must be those of the uninterrupted run, bit for bit, with no epoch missing or doubled. The suite runs a short version.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch

import common
import eval_attacks
from conftest import SMALL, assert_same_run, rows


class SlowFile:
    """A file whose content arrives in pieces."""

    def __init__(self, *args):
        self.file = open(*args)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        for i in range(8):
            self.file.write(content[i * len(content) // 8 : (i + 1) * len(content) // 8])
            self.file.flush()
            time.sleep(0.002)

    def __getattr__(self, name):
        return getattr(self.file, name)


def child(script, arguments):
    """Run a script in a fork of this process, which has torch imported: its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        common.open = SlowFile
        sys.argv = [script, *arguments.split()]
        common.launch(importlib.import_module(script.removesuffix(".py")).main)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def warm_up(folder):
    """Train and evaluate once in this process, so that its forks begin with every module imported."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for method in ("slat", "free", "yopo"):
            sys.argv = [f"train_{method}.py", *f"{SMALL} --epochs 1 --out {folder}/warm-{method}".split()]
            importlib.import_module(f"train_{method}").main()
        sys.argv = ["eval_attacks.py", *f"{folder}/warm-slat --n 20 --steps 1 --restarts 1".split()]
        eval_attacks.main()


def kill_until_done(script, first, again, folder, dice, longest):
    """Start with `first`, kill, start with `again`, kill, ... to the end: (kills, of them inside a write)."""
    kills, inside, arguments = 0, 0, first
    while True:
        pid = child(script, arguments)
        end = time.monotonic() + dice.uniform(0.02, longest)
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


def compare_runs(a, b, epochs):
    assert_same_run(a, b)
    assert [row["epoch"] for row in rows(b)] == list(range(1, epochs + 1))
    assert not list(b.glob("*.new")), "a half-written file is left"


def whole_run(script, arguments):
    """Run a script to its end: its seconds. Kills come within a share of that, so that slow machines get on too."""
    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child(script, arguments), 0)[1]) == 0
    return time.monotonic() - start


def train_faults(method, kills, folder, epochs=4, seed=0):
    """Train with that many kills or more, run after run with seeds 0, 1, ...: (kills, inside a write, runs)."""
    dice, total, inside, runs = random.Random(seed), 0, 0, 0
    while total < kills:
        flags = f"{SMALL} --epochs {epochs} --seed {runs}"
        whole, killed = folder / f"{method}{runs}", folder / f"{method}{runs}-killed"
        longest = 0.7 * whole_run(f"train_{method}.py", f"{flags} --out {whole}")
        killed.mkdir()
        first = f"{flags} --out {killed}"
        more, within = kill_until_done(f"train_{method}.py", first, f"{first} --resume", killed, dice, longest)
        compare_runs(whole, killed, epochs)
        total, inside, runs = total + more, inside + within, runs + 1
    return total, inside, runs


def evaluation_faults(run, kills, folder, seed=0):
    """Evaluate with that many kills or more: (kills, inside a write, evaluations)."""
    dice, total, inside, runs = random.Random(seed), 0, 0, 0
    while total < kills:
        here = folder / f"eval{runs}"
        here.mkdir()
        flags = f"{run} --attack fgsm,pgd,apgd-ce --steps 3 --restarts 1 --n 10 --eps 1 --seed {runs}"
        # With a state as the others, so that it takes as long.
        state = f"--state {here / 'whole.state'}"
        longest = whole_run(
            "eval_attacks.py", f"{flags} {state} --json {here / 'whole.json'} --save-adv {here / 'whole.npz'}"
        )
        again = f"{flags} --state {here / 'state'} --json {here / 'killed.json'} --save-adv {here / 'killed.npz'}"
        more, within = kill_until_done("eval_attacks.py", again, again, here, dice, longest)
        results = [json.loads((here / f"{name}.json").read_text())["attacks"] for name in ("whole", "killed")]
        assert results[0] == results[1]
        assert (here / "whole.npz").read_bytes() == (here / "killed.npz").read_bytes()
        total, inside, runs = total + more, inside + within, runs + 1
    return total, inside, runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="slat,free,yopo,evaluation", help="the evaluation is of slat's first run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        warm_up(folder)
        for name in args.only.split(","):
            start = time.monotonic()
            if name == "evaluation":
                kills, inside, runs = evaluation_faults(folder / "slat0", args.kills, folder, args.seed)
            else:
                kills, inside, runs = train_faults(name, args.kills, folder, seed=args.seed)
            print(f"{name:<11}{kills:>4} kills, {inside} of them inside a write, {runs} runs,", end=" ")
            print(f"all as uninterrupted, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
