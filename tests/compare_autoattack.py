"""AutoAttack here against its authors' code on one network and some images: who is robust, and CPU seconds.

    pip install pyautoattack    # the authors' package, as RobustBench uses it
    python tests/compare_autoattack.py runs/slat cifar10.npz 200 8

The arguments: run, data set, images, eps. Take OMP_NUM_THREADS=1: seconds are of all threads.
Not a test: it takes half an hour.
"""

import sys
import time
from pathlib import Path

from pyautoattack import AutoAttack

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Data
from eval_attacks import ATTACKS, AUTOATTACK, is_adversarial, load_model, predict


def main(run, dataset, n, eps):
    (x, y), eps, model = Data(dataset, "data", "cpu", ("test",)).test(int(n)), float(eps) / 255, load_model(run)
    x = x.contiguous()

    def package(name, x, y):
        attack = AutoAttack(model, eps=eps, seed=0)  # "standard"
        attack.attacks_to_run = [name]
        return attack.run_standard_evaluation(x, y)[0]

    def here(precision):
        return lambda name, x, y: ATTACKS[name](model, x, y, eps, precision=precision)[1]

    contestants = {"bf16": here("bf16"), "fp32": here("fp32"), "package": package}
    robust = {who: predict(model, x) == y for who in contestants}
    total = dict.fromkeys(contestants, 0.0)
    for name in AUTOATTACK:
        for who, attack in contestants.items():
            left, start = robust[who].nonzero().flatten(), time.process_time()
            x_adv = attack(name, x[left], y[left])
            seconds = time.process_time() - start
            total[who] += seconds
            robust[who][left[is_adversarial(model, x[left], x_adv, y[left], eps)]] = False
            print(f"{who:<8}{name:<9}{int(robust[who].sum()):>5} robust {seconds:>7.1f} s", flush=True)
    for who, mask in robust.items():
        other = int((mask != robust["package"]).sum())
        print(f"{who:<8}all      {int(mask.sum()):>5} robust {total[who]:>7.1f} s, {other} images unlike the package")


if __name__ == "__main__":
    main(*sys.argv[1:])
