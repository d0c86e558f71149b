"""Catastrophic overfitting in half a minute: two networks that ship with the project, attacked on embedded images.

    python -m paper.demo

Both were trained on the complete CIFAR-10 at eps 16/255, as results/RESULTS.md says. No download, no GPU.
"""

import json
import time
from pathlib import Path

import torch

import common
from eval_attacks import fgsm, percent, pgd, predict
from wrn import load_model

RUNS = Path(__file__).parent.parent / "results/cpu/runs"
DATA = Path(__file__).parent.parent / "data/cifar10_tiny.npz"
N, EPS = 200, 16


def main():
    start = time.perf_counter()
    arrays, classes = common.load_arrays(str(DATA), None)
    x, y = common.Data("", classes, {key: arrays[key] for key in ("test_x", "test_y")}, "cpu").test()
    chosen = torch.arange(len(y))[:: len(y) // N][:N]  # the file is sorted by class or not: take all parts of it
    x, y, eps = x[chosen], y[chosen], EPS / 255
    precision = "bf16" if common.has_bf16("cpu") else "fp32"
    print(f"Two networks, trained on the same images to withstand eps {EPS}/255, one with FGSM,")
    print(f"one with SLAT. Accuracy in % on {N} test images, clean and under attack:\n")
    print(f"{'trained with':<14}{'clean':>8}{'FGSM':>8}{'PGD-50-10':>12}", flush=True)
    line = common.StatusLine()
    for method in ("fgsm", "slat"):
        run = RUNS / f"{method}_wrn10-2_epochs8_eps{EPS}_seed0"
        assert json.loads((run / "config.json").read_text())["eps"] == EPS

        def report(done, left, robust, method=method):
            if line.due():
                line.show(f"PGD on {method.upper()}'s network: {int(robust.sum())} of {len(robust)} still right")

        model = load_model(run)
        clean = percent(predict(model, x) == y)
        one = percent(fgsm(model, x, y, eps)[0])
        fifty = percent(pgd(model, x, y, eps, precision=precision, report=report)[0])
        line.clear()
        print(f"{method.upper():<14}{clean:>8.1f}{one:>8.1f}{fifty:>12.1f}", flush=True)
    print(f"""
The first network survives the single step of FGSM, which it was trained on, and
falls to many small steps of PGD: catastrophic overfitting. SLAT's training costs
the same and stands. ({common.clock(time.perf_counter() - start)} on this machine)""")


if __name__ == "__main__":
    common.launch(main)
