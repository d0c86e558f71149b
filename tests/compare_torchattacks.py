"""AutoAttack here against torchattacks' on one network and the same images: robust images and seconds, by component.

    python tests/compare_torchattacks.py runs/slat cifar10.npz 200 8

The arguments: run, data set, images, eps. torchattacks gets the standard budgets; its own defaults are 10 steps.
Not a test: it takes 10 minutes.
"""

import sys
import time
from pathlib import Path

import torchattacks

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Data
from eval_attacks import ATTACKS, AUTOATTACK, is_adversarial, predict
from wrn import load_model


def main(run, dataset, n, eps):
    (x, y), eps, model = Data(dataset, "data", "cpu", ("test",)).test(int(n)), float(eps) / 255, load_model(run)
    x, targeted = x.contiguous(), {"eps": eps, "seed": 0, "steps": 100, "n_classes": 10}
    theirs = {
        "apgd-ce": torchattacks.APGD(model, eps=eps, steps=100, seed=0),
        "apgd-t": torchattacks.APGDT(model, **targeted),
        "fab-t": torchattacks.FAB(model, multi_targeted=True, **targeted),
        "square": torchattacks.Square(model, eps=eps, n_queries=5000, resc_schedule=False, seed=0),
    }
    for who in ("bf16", "fp32", "theirs"):
        robust, total = predict(model, x) == y, 0.0
        for name in AUTOATTACK:
            left, start = robust.nonzero().flatten(), time.perf_counter()
            if who == "theirs":
                x_adv = theirs[name](x[left], y[left]).detach()
            else:
                x_adv = ATTACKS[name](model, x[left], y[left], eps, precision=who)[1]
            seconds = time.perf_counter() - start
            robust[left[is_adversarial(model, x[left], x_adv, y[left], eps)]] = False
            total += seconds
            print(f"{who:<8}{name:<9}{int(robust.sum()):>5} robust {seconds:>7.1f} s", flush=True)
        print(f"{who:<8}all      {int(robust.sum()):>5} robust {total:>7.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
