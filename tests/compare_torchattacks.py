"""AutoAttack here against torchattacks' on one network and the same images: robust images and seconds, by component.

    python tests/compare_torchattacks.py runs/slat --dataset cifar10.npz --n 200

torchattacks runs with the standard budgets (its own defaults are 10 steps) and on a network of torch's default memory
format, or, as theirs-channels-last, on the one that wrn.load_model returns. Not a test: it takes 10 minutes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torchattacks

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import load_test_data
from eval_attacks import ATTACKS, AUTOATTACK, is_adversarial, predict
from wrn import load_model


def theirs(model, eps):
    options = {"eps": eps, "seed": 0}
    return {
        "apgd-ce": torchattacks.APGD(model, steps=100, loss="ce", n_restarts=1, **options),
        "apgd-t": torchattacks.APGDT(model, steps=100, n_classes=10, **options),
        "fab-t": torchattacks.FAB(model, steps=100, multi_targeted=True, n_classes=10, **options),
        "square": torchattacks.Square(model, n_queries=5000, n_restarts=1, resc_schedule=False, **options),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--who", default="bf16,fp32,theirs,theirs-channels-last")
    args = parser.parse_args()
    x, y = load_test_data(args.dataset, args.data_dir, "cpu").test(args.n)
    x, eps, left, total = x.contiguous(), args.eps / 255, {}, {}
    for who in args.who.split(","):
        model = load_model(args.run)
        if who == "theirs":
            model = model.to(memory_format=torch.contiguous_format)
        robust, total[who] = predict(model, x) == y, 0.0
        for name in AUTOATTACK:
            todo = robust.nonzero().flatten()
            start = time.perf_counter()
            if who.startswith("theirs"):
                x_adv = theirs(model, eps)[name](x[todo], y[todo]).detach()
            else:
                x_adv = ATTACKS[name](model, x[todo], y[todo], eps, precision=who)[1]
            seconds = time.perf_counter() - start
            verdict = is_adversarial(model, x[todo], x_adv, y[todo], eps)
            invalid = int((predict(model, x_adv) != y[todo]).sum() - verdict.sum())
            robust[todo[verdict]] = False
            total[who] += seconds
            print(f"{who:<22}{name:<9}{int(robust.sum()):>5} robust {seconds:>7.1f} s, {invalid} invalid", flush=True)
        left[who] = robust
        print(f"{who:<22}{'total':<9}{int(robust.sum()):>5} robust {total[who]:>7.1f} s", flush=True)
    for other in [who for who in left if who.startswith("theirs")]:
        for who in [who for who in left if not who.startswith("theirs")]:
            differ, times = int((left[who] != left[other]).sum()), total[other] / total[who]
            print(f"{who} against {other}: {times:.2f} times as fast, another verdict on {differ} of {args.n} images")


if __name__ == "__main__":
    main()
