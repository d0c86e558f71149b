#!/usr/bin/env python3
"""Print the commands that make up a table or figure, one a line: each trains a network and evaluates it.

    python sweep.py table1 --seeds 0,1,2,3 --small | sh                         one after the other
    python sweep.py table1 --seeds 0,1,2,3 | xargs -P 4 -d '\\n' -I{} sh -c {}    four at a time
    python analyze.py table results/*.json                                      what came out

A line says what is left to do: nothing is printed for a run whose result is there, a run that was broken off is
resumed, a trained network is evaluated only. So after a crash, print and run the commands again.
"""

import argparse
import shlex
import sys
from pathlib import Path

import common

# Method and flags of every row, beside those that all rows share; defaults are left out, so tables share their runs.
ALL = ("pgd", "fgsm_ga", "yopo", "free", "fgsm", "fgsm_rs", "fgsm_ckpt", "n_fgsm", "slat")
SWEEPS = {
    "table1": [(method, {}) for method in ALL],
    "table2": [("fgsm", {}), ("fgsm", {"alpha": 0.9}), ("slat", {"init": "uniform"}), ("slat", {})],
    "table3": [("slat", {}), ("slat", {"layers": "0,conv3,conv4"}), ("slat", {"layers": "0,conv1,conv2,conv3,conv4"})],
    "eps": [(m, {"eps": eps}) for eps in (4, 8, 12, 16) for m in ("fgsm", "fgsm_rs", "n_fgsm", "slat")],
    "eta": [("slat", {"eta": eta}) for eta in (0.6, 0.7, 0.8, 0.9)] + [("slat", {})],
    "untold": [  # what the paper does not tell: dropout, input step, clamp, momentum
        ("slat", {}),
        ("slat", {"dropout": 0}),
        ("slat", {"input-step": 1.0}),
        ("slat", {"no-latent-clamp": None}),
        ("slat", {"no-momentum-cycle": None}),
    ],
}
# Epochs of Free-AT (of 8 replays) and YOPO that cost what the paper's did, where the others have 30.
SHORTER = {"free": 9 / 30, "yopo": 7 / 30}


def commands(sweep, args):
    """Yield the line of every row and seed that is not done."""
    for seed in args.seeds:
        for method, own in SWEEPS[sweep]:
            own = dict(own)
            eps = own.pop("eps", args.eps)
            if "alpha" in own:
                own["alpha"] = round(own["alpha"] * eps, 4)  # a multiple of eps above, in 1/255 on the command line
            epochs = max(round(args.epochs * SHORTER.get(method, 1)), 1)
            data = "" if Path(args.dataset).stem == "cifar10" else f"_{Path(args.dataset).stem}"
            name = f"{method}{data}_wrn{args.depth}-{args.width}_epochs{epochs}_eps{eps:g}"
            for flag, value in own.items():
                name += f"_{flag}" + ("" if value is None else f"-{str(value).replace(',', '-')}")
            name += f"_seed{seed}"
            run, result = Path(args.runs) / name, Path(args.results) / f"{name}.json"
            if result.exists():
                continue
            parts = []
            if not (run / "model.pt").exists():
                train = ["python", f"train_{method}.py", "--dataset", args.dataset, "--data-dir", args.data_dir]
                train += ["--depth", args.depth, "--width", args.width, "--epochs", epochs, "--eps", f"{eps:g}"]
                for flag, value in own.items():
                    train += [f"--{flag}"] + ([] if value is None else [value])
                train += ["--seed", seed, "--out", run] + (["--resume"] if (run / "config.json").exists() else [])
                parts.append(train)
            evaluate = ["python", "eval_attacks.py", run, "--attack", args.attack, "--eps", f"{eps:g}"]
            evaluate += ["--data-dir", args.data_dir] + (["--n", args.n] if args.n else [])
            evaluate += ["--search-precision", args.search_precision, "--state", run / "eval.state", "--json", result]
            parts.append(evaluate)
            yield " && ".join(shlex.join(map(str, part)) for part in parts)


def seeds(text):
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from None


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, common.number
    add("sweep", choices=SWEEPS)
    add("--seeds", type=seeds, default=[0], help="with commas between them (default 0)")
    add("--small", action="store_true", help="for a CPU: WRN-10-2, 8 epochs, evaluation on 1,000 images")
    add("--depth", type=number(int, 10), help="default 28, with --small 10")
    add("--width", type=number(int, 1), help="default 10, with --small 2")
    add("--epochs", type=number(int, 1), help="default 30, with --small 8; Free-AT and YOPO in proportion fewer")
    add("--eps", type=number(float, 0, 255), default=8, help="in 1/255 (default 8)")
    add("--n", type=number(int, 1), help="test images that are attacked (default all, with --small 1000)")
    add("--attack", default="pgd,autoattack", help="for eval_attacks.py (default pgd,autoattack)")
    add("--search-precision", choices=("fp32", "bf16"), default="bf16", help="for eval_attacks.py (default bf16)")
    add("--dataset", default="cifar10", help="cifar10, cifar100 or an .npz (default cifar10)")
    add("--data-dir", default="data", help="where cifar10 and cifar100 are (default data)")
    add("--runs", default="runs", metavar="DIR", help="folder of run folders (default runs)")
    add("--results", default="results", metavar="DIR", help="folder of results (default results)")
    args = parser.parse_args()
    for flag, full, small in (("depth", 28, 10), ("width", 10, 2), ("epochs", 30, 8), ("n", None, 1000)):
        if getattr(args, flag) is None:
            setattr(args, flag, small if args.small else full)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    lines = list(commands(args.sweep, args))
    if lines:
        print("\n".join(lines))
    else:
        print(f"nothing left to do: the results are in {args.results}", file=sys.stderr)


if __name__ == "__main__":
    common.launch(main)
