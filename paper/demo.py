"""Catastrophic overfitting in a minute: two networks that ship with the project, attacked on bundled images.

    python -m paper.demo
    python -m paper.demo runs/demo        draws what eval_attacks.py --save-adv runs/demo/adv.npz found

Both were trained on the complete CIFAR-10 at eps 16/255, as results/RESULTS.md says. No download, no GPU.
"""

import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import common
import console
from bookkeeping import overfitting
from eval_attacks import load_model, percent, pgd, predict
from train_fgsm import fgsm

RUNS = Path(__file__).parent.parent / "results/cpu/runs"
DATA = Path(__file__).parent.parent / "data/cifar10_tiny.npz"
N, EPS = 100, 16


def picture(run):
    """RUN/examples.png, a column for each broken image: clean, perturbation (smoothed, scaled), adversarial."""
    console.check_outputs({"RUN": run / "examples.png"}, [run / "adv.npz", run / "model.pt"])
    try:
        with np.load(run / "adv.npz", allow_pickle=False) as file:
            x_adv, y, broken = torch.from_numpy(file["x"]).permute(0, 3, 1, 2), file["y"], file["adversarial"]
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged file
        console.fail(f"no {run}/adv.npz as eval_attacks.py --save-adv writes it: {error}")
    data, model = common.Data(str(DATA), None, "cpu", ("test",)), load_model(run)
    (x, labels), classes = data.test(len(y)), data.classes
    if y.tolist() != labels.tolist() or x_adv.shape != x.shape or broken.shape != y.shape:
        console.fail(f"{run}/adv.npz is not of the images in {DATA.name}")
    shown = (broken & (predict(model, x).numpy() == y)).nonzero()[0][:10]
    x, x_adv = x[shown], x_adv[shown]
    change = F.avg_pool2d((x_adv - x).mean(1, keepdim=True), 3, stride=1, padding=1)
    change = change / change.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-9)
    red_blue = torch.cat([1 - (-change).clamp(min=0), 1 - change.abs(), 1 - change.clamp(min=0)], 1)
    rows = F.interpolate(torch.cat([x, red_blue, x_adv]), scale_factor=4, mode="bicubic").clamp(0, 1)
    file = io.BytesIO()
    save_image(rows, file, format="png", nrow=max(len(shown), 1), padding=6, pad_value=1.0)
    console.write_file(run / "examples.png", file.getvalue())
    print(f"\n{run}/examples.png: clean; perturbation (red is brighter, blue is darker); adversarial")
    for column, (label, guess) in enumerate(zip(y[shown], predict(model, x_adv).tolist()), 1):
        print(f"  column {column:>2}: {classes[label]} is taken for {classes[guess]}")


def measure(method, line):
    """Of a committed network, in per cent: clean accuracy, accuracy on FGSM images, robust accuracy under PGD-50-10.

    The second is the plain accuracy on x + eps sign(grad_x L) of all images, also of those that are wrong when clean,
    so that it can exceed the first. The third counts an image only if it is right when clean.
    """
    run = RUNS / f"{method}_wrn10-2_epochs8_eps{EPS}_seed0"
    (x, y), eps, model = common.Data(str(DATA), None, "cpu", ("test",)).test(N), EPS / 255, load_model(run)
    precision = "bf16" if common.has_bf16("cpu") else "fp32"

    def report(share, robust):
        if line.due():
            line.show(f"PGD on {method.upper()}'s network: {int(robust.sum())} of {len(robust)} unbroken")

    clean, one_step = (percent(predict(model, images) == y) for images in (x, fgsm(model, x, y, eps, eps)))
    return clean, one_step, percent(pgd(model, x, y, eps, precision=precision, report=report)[0])


def verdict(name, clean, one_step, fifty):
    """What these accuracies say, and only that: lines of at most 80 columns."""
    found = overfitting({"test_clean": clean, "test_fgsm": one_step, "test_pgd10": fifty}, classes=10) or ""
    if "label leaking" in found:
        first = f"{name}: {one_step:.0f} % right on FGSM images, only {clean:.0f} % on clean ones. It reads the label"
        lines = [first, "off the very step that should mislead it: label leaking."]
    else:
        lines = [f"{name}: {one_step:.0f} % right on FGSM images, {clean:.0f} % on clean ones: no label leaking."]
    end = "catastrophic overfitting" if "catastrophic overfitting" in found else "not collapsed"
    return [*lines, f"Many small steps leave {fifty:.0f} %: {end}."]


def main():
    parser = console.Parser(prog="python -m paper.demo", description=__doc__.split("\n")[0])
    add, picked = parser.add_argument, "draw what eval_attacks.py --save-adv RUN/adv.npz found"
    add("run", nargs="?", type=console.given, help=picked)
    args = parser.parse_args()
    if args.run:
        return picture(Path(args.run))
    start, line, found = time.perf_counter(), console.StatusLine(), []
    print("Two networks that ship with the project. Both were trained on all of CIFAR-10 to")
    print(f"withstand eps {EPS}/255, one with FGSM, one with SLAT. Accuracy on {N} images, %:\n")
    print(f"{'trained with':<16}{'clean':>9}{'on FGSM images':>18}{'under PGD-50-10':>19}", flush=True)
    for method in ("fgsm", "slat"):
        numbers = measure(method, line)
        line.clear()
        print("{:<16}{:>9.1f}{:>18.1f}{:>19.1f}".format(method.upper(), *numbers), flush=True)
        found += ["", *verdict(method.upper(), *numbers)]
    print("\nFGSM images: one step of eps along the sign of the gradient. PGD-50-10: 50 small")
    print("steps from each of 10 random starts.", *found, sep="\n")
    print(f"({console.clock(time.perf_counter() - start)} on this machine)")


if __name__ == "__main__":
    console.launch(main)
