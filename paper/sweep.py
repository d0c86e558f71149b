"""Print the commands that make up a table or figure, one a line: each trains a network and evaluates it.

    python -m paper.sweep table1 --seeds 0,1,2,3 --small | sh                         one after the other
    python -m paper.sweep table1 --seeds 0,1,2,3 | xargs -P 4 -d '\\n' -I{} sh -c {}    four at a time
    python -m paper.sweep eps16 --only fgsm,slat | sh                                 these two methods only
    python -m paper.sweep table1 --dataset cifar100 | sh                              Table 4
    python -m paper.figures table results/*.json                                      what came out

The lines say what is left to do: a run is left out if its result has these attacks, on as many images, searched in this
precision; a trained network is only evaluated. A killed line resumes when it is run again; so after a crash,
run the same lines, or print what is left.
"""

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from unittest import mock

import console
from eval_attacks import NAMES
from paper.results import CIFAR, CRC32, attacked_by, data_of, read_json

METHODS = sorted(path.stem.removeprefix("train_") for path in Path().glob("train_*.py"))
CONTROLS = ["fgsm_rs_latent", "slat_hidden"]  # modules of paper/
ALL = METHODS + CONTROLS
# The method and flags of each row, without the flags that all rows share. Defaults are left out, so that tables share
# their runs.
SWEEPS = {
    "table1": [(method, {}) for method in METHODS],
    "table2": [("fgsm", {}), ("fgsm", {"alpha": 0.9}), ("fgsm_rs_latent", {"input-step": 1.25}), ("slat", {})],
    "table3": [
        ("slat", {}),
        ("slat", {"layers": "0,conv3,conv4"}),
        ("slat", {"layers": "0,conv3,conv4", "eta": 2.7}),  # the step of the authors' code, in commented lines
        ("slat", {"layers": "0,conv1,conv2,conv3,conv4"}),
    ],
    "eps": [(m, {"eps": eps}) for eps in (4, 8, 12, 16) for m in ("fgsm", "fgsm_rs", "n_fgsm", "fgsm_ckpt", "slat")],
    "eps16": [(method, {"eps": 16}) for method in METHODS],
    "eta": [  # Figure 7: one step for the input and the hidden layers
        *[("slat", {"eta": eta, "input-step": eta}) for eta in (0.6, 0.8)],
        ("slat", {"input-step": 1.0}),
    ],
    "latent-eta": [("slat", {"eta": eta} if eta != 1 else {}) for eta in (0.6, 0.7, 0.8, 0.9, 1, 1.8)],
    "literal": [("slat", {"input-step": 1, "no-latent-clamp": None, "dropout": 0})],  # what the paper's text states
    "reliability": [  # how often a method collapses: for many seeds
        *[("slat", {"dropout": dropout}) for dropout in (0, 0.1, 0.2)],
        ("slat", {}),
        *[(method, {"dropout": 0}) for method in ("fgsm", "fgsm_rs", "n_fgsm", "pgd")],
        ("n_fgsm", {}),
    ],
    "hidden": [  # which part of SLAT's hidden steps makes it collapse without dropout
        (method, {"eps": eps, **flags, "dropout": 0})
        for eps in (8, 16)
        for method, flags in (("slat", {}), *[("slat_hidden", {"hidden": way}) for way in ("predicted", "noise")])
    ],
    "unstated": [  # what the paper's text lacks or has otherwise: dropout, input step, clamp, momentum
        ("slat", {}),
        ("slat", {"dropout": 0}),
        ("slat", {"input-step": 1.0}),
        ("slat", {"no-latent-clamp": None}),
        ("slat", {"no-momentum-cycle": None}),
    ],
}


def load(method):
    """The training script of a method, as a module of its own that nobody else has imported."""
    path = f"paper/{method}.py" if method in CONTROLS else f"train_{method}.py"
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def epochs_for(method, epochs):
    """The epochs of a method where those with the usual default, 30, take `epochs`: Free-AT and YOPO take fewer."""
    with mock.patch.object(sys, "argv", [f"train_{method}.py"]):
        return max(round(epochs * load(method).parse_args().epochs / 30), 1)


def data_set(name):
    """(name, number of test images) of a data set; an .npz is called STEM-CHECKSUM, if it is not CIFAR-10."""
    if name in CIFAR:
        return name, 10_000
    arrays, _ = console.load_arrays(name, None)
    found = console.checksum(arrays)
    return "cifar10" if found == CRC32 else f"{Path(name).stem}-{found:08x}", len(arrays["test_y"])


def done(path, args, data, test_images):
    """Is there a result with the attacks, the data, the images and the precision that are asked for?"""
    if not path.exists():
        return False
    result = read_json(path, {"n", "attacks"})
    training = result.get("training") or {}
    name = result.get("dataset") or training.get("dataset") or data
    if data in CIFAR and data_of(training, name)[0] != data or attacked_by(result):
        return False  # somebody's own cifar10.npz, or another budget
    attacks = {"pgd-50-10" if name == "pgd" else name for name in args.attack}
    images = result["n"] == min(args.n or test_images, test_images)
    return images and result.get("search_precision") == args.search_precision and attacks <= result["attacks"].keys()


def commands(sweep, args):
    """Yield the line of every row and seed that is not done."""
    rows = [(method, flags) for method, flags in SWEEPS[sweep] if method in args.only]
    epochs_by_method = {method: epochs_for(method, args.epochs) for method, _ in rows}
    (dataset, test_images), device = data_set(args.dataset), ["--device", args.device] if args.device else []
    for seed in args.seeds:
        for method, flags in rows:
            own, epochs = dict(flags), epochs_by_method[method]
            eps = f"{own.pop('eps', args.eps):.15g}"
            data = "" if dataset == "cifar10" else f"_{dataset}"
            name = f"{method}{data}_wrn{args.depth}-{args.width}_epochs{epochs}_eps{eps}"
            for flag, value in own.items():
                name += f"_{flag}" + ("" if value is None else f"-{str(value).replace(',', '-')}")
            name += f"_seed{seed}"
            run, results = Path(args.runs) / name, Path(args.results)
            ends = ("", "_best") if args.best else ("",)
            left = [end for end in ends if not done(results / f"{name}{end}.json", args, dataset, test_images)]
            if not left:
                continue
            parts = []
            if not (run / "model.pt").exists():
                train = ["python", *(["-m", f"paper.{method}"] if method in CONTROLS else [f"train_{method}.py"])]
                train += ["--dataset", args.dataset, "--data-dir", args.data_dir]
                train += ["--depth", args.depth, "--width", args.width, "--epochs", epochs, "--eps", eps]
                for flag, value in own.items():
                    train += [f"--{flag}"] + ([] if value is None else [value])
                train += ["--monitor", args.monitor] if args.monitor else []
                train += [*device, "--seed", seed, "--out", run, "--resume"]  # begins a run where there is none
                parts.append(train)
            for end in left:
                network = run / "best.pt" if end else run
                evaluate = ["python", "eval_attacks.py", network, "--attack", ",".join(args.attack)]
                evaluate += ["--eps", eps, *device, "--data-dir", args.data_dir]
                evaluate += ["--n", args.n] if args.n else []
                asked = f"eps{eps}_{'-'.join(args.attack)}_{args.n or 'all'}_{args.search_precision}"
                evaluate += ["--search-precision", args.search_precision, "--state", run / f"eval{end}_{asked}.state"]
                parts.append([*evaluate, "--json", results / f"{name}{end}.json"])
            yield " && ".join(shlex.join(map(str, part)) for part in parts)


def seeds(text):
    try:
        return list(dict.fromkeys(map(console.number(int, 0, 2**31), text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers, separated by commas") from None


def main():
    parser = console.Parser(
        prog="python -m paper.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number, names = parser.add_argument, console.number, console.names
    add("sweep", choices=SWEEPS)
    add("--seeds", type=seeds, default=[0], help="separated by commas (default 0)")
    add("--only", type=names(ALL), default=ALL, metavar="METHODS", help="these methods, separated by commas")
    add("--small", action="store_true", help="for a CPU: WRN-10-2, 8 epochs, evaluation on 1,000 images")
    add("--depth", type=int, choices=range(10, 101, 6), metavar="N", help="6n + 4, default 28, with --small 10")
    add("--width", type=number(int, 1), help="default 10, with --small 2")
    add("--epochs", type=number(int, 1), help="default 30, with --small 8; Free-AT and YOPO proportionally fewer")
    add("--eps", type=number(float, 0, 255), default=8, help="in 1/255 (default 8); eps and eps16 have their own")
    add("--monitor", type=number(int, 1), metavar="N", help="images for the accuracies after an epoch (default 1000)")
    add("--n", type=number(int, 1), help="test images that are attacked (default all, with --small 1000)")
    add("--attack", type=names(NAMES), default="pgd,autoattack", help="for eval_attacks.py (default pgd,autoattack)")
    add("--best", action="store_true", help="evaluate best.pt too, the early-stopped network: NAME_best.json")
    add("--search-precision", choices=("fp32", "bf16"), default="bf16", help="for eval_attacks.py (default bf16)")
    add("--device", type=console.given, help="of all commands: auto, cpu, cuda, cuda:1, mps (default: their own)")
    add("--dataset", type=console.given, default="cifar10", help="cifar10, cifar100 or an .npz (default cifar10)")
    add("--data-dir", type=console.given, default="data", help="where cifar10 and cifar100 are (default data)")
    add("--runs", type=console.given, default="runs", metavar="DIR", help="folder of run folders (default runs)")
    add("--results", type=console.given, default="results", metavar="DIR", help="folder of results (default results)")
    args = parser.parse_args()
    for flag, full, small in (("depth", 28, 10), ("width", 10, 2), ("epochs", 30, 8), ("n", None, 1000)):
        if getattr(args, flag) is None:
            setattr(args, flag, small if args.small else full)
    if not any(method in args.only for method, _ in SWEEPS[args.sweep]):
        parser.error(f"argument --only: {args.sweep} has no runs of {', '.join(args.only)}")
    Path(args.results).mkdir(parents=True, exist_ok=True)
    lines = list(commands(args.sweep, args))
    if lines:
        print("\n".join(lines))
    else:
        print(f"nothing left to do: the results are in {args.results}", file=sys.stderr)


if __name__ == "__main__":
    console.launch(main)
