"""What figures and tables read: runs and results, checked and named. And the tables of the paper from them.

A run is a folder with config.json and metrics.jsonl, a result what `eval_attacks.py --json` wrote.
"""

import json
import os
from pathlib import Path

import torch

import console

# Name, colour and marker of each method in every figure. A method that is not here gets some of its own, see look().
METHODS = {  # Okabe & Ito's palette, made for colour-blind readers, and three colours of Paul Tol's
    "slat": ("SLAT", "#0072b2", "o"),
    "fgsm": ("FGSM", "#d55e00", "s"),
    "fgsm_rs": ("FGSM-RS", "#e69f00", "^"),
    "n_fgsm": ("N-FGSM", "#cc79a7", "v"),
    "fgsm_ckpt": ("FGSM-CKPT", "#009e73", "D"),
    "fgsm_ga": ("FGSM-GA", "#56b4e9", "P"),
    "zero_grad": ("ZeroGrad", "#882255", ">"),
    "n_aaer": ("N-AAER", "#999933", "h"),
    "elle": ("ELLE-A", "#332288", "p"),
    "free": ("Free-AT", "#8c6d31", "X"),
    "yopo": ("YOPO", "#7f7f7f", "<"),
    "pgd": ("PGD-7", "#000000", "*"),
}
# Tables 1 to 4 of the paper at eps 8, per cent: clean, PGD-50-10, AutoAttack.
PAPER = {
    ("cifar10", "pgd", ""): (84.86, 51.63, 48.65),
    ("cifar10", "fgsm_ga", ""): (82.88, 48.90, 46.22),
    ("cifar10", "yopo", ""): (82.35, 34.23, 32.79),
    ("cifar10", "free", ""): (76.57, 44.15, 41.02),
    ("cifar10", "fgsm", ""): (87.42, 0.01, 0.00),
    ("cifar10", "fgsm_rs", ""): (90.76, 3.90, 0.44),
    ("cifar10", "fgsm_ckpt", ""): (89.32, 40.83, 39.38),
    ("cifar10", "slat", ""): (85.91, 47.06, 44.62),
    ("cifar10", "fgsm", "alpha 0.9"): (90.87, 3.09, None),
    ("cifar10", "slat", "init uniform, input step 1.25"): (82.87, 44.95, None),
    ("cifar10", "slat", "layers 0,conv3,conv4"): (84.60, 0.00, 0.00),
    ("cifar10", "slat", "layers 0,conv1,conv2,conv3,conv4"): (81.41, 47.3, 43.58),
    ("cifar100", "pgd", ""): (59.59, 29.58, 26.00),
    ("cifar100", "fgsm_ga", ""): (58.63, 27.53, 24.07),
    ("cifar100", "yopo", ""): (51.45, 15.23, 13.94),
    ("cifar100", "free", ""): (48.02, 22.40, 18.67),
    ("cifar100", "fgsm", ""): (61.96, 0.00, 0.00),
    ("cifar100", "fgsm_rs", ""): (50.96, 0.00, 0.00),
    ("cifar100", "fgsm_ckpt", ""): (73.53, 0.66, 0.09),
    ("cifar100", "slat", ""): (59.56, 26.26, 23.02),
}
# Flags that do not make a set-up of their own: a table has a column for them, or training does not depend on them.
NO_SETUP = {"dataset", "depth", "width", "epochs", "eps", "seed"} | set(
    "data_dir device precision deterministic monitor out resume overwrite".split()
)
# What is needed of the files of a run and of an evaluation, and its types.
NUMBER = (int, float)
CONFIG = dict(method=str, dataset=str, depth=int, width=int, epochs=int, eps=NUMBER, seed=int, not_default=list)
RESULT = dict(clean=NUMBER, attacks=dict, n=int, eps=NUMBER, command=str, training=dict)


def check(path, content, types):
    """End with one line that names the file if content is not a dict with these keys and types."""
    for key, kind in types.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            console.fail(f"{path}: {key!r} is missing or of another type: it is damaged, or another version wrote it")


def read_json(path, types=None):
    """A JSON file, or the list of a .jsonl's lines; types: {key: type} that it, or every line, must have."""
    try:
        text, lines = Path(path).read_text(), Path(path).suffix == ".jsonl"
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError):
        console.fail(f"{path} is missing or damaged")
    for item in content if lines else [content]:
        check(path, item, types or {})
    return content


def read_results(args):
    """The results in the named files, each with its flags (set-up), its data set's name and its network's."""
    results = [read_json(path) for path in args.runs]
    for path, result in zip(args.runs, results):
        if not isinstance(result, dict) or not isinstance(result.get("training"), dict):
            console.fail(f"{path} does not say how the network was trained: evaluate a run folder, not a bare model.pt")
        check(path, result, RESULT)
        check(path, result["training"], CONFIG | {"seconds": NUMBER, "hardware": str})
        config = result["training"]
        result["flags"] = flags_of(config) | ({"best epoch": True} if "best.pt" in result["command"] else {})
        if result["eps"] != config["eps"]:
            result["flags"]["trained with eps"] = config["eps"]
        result["data"], result["network"] = Path(config["dataset"]).stem, f"WRN-{config['depth']}-{config['width']}"
    return results


def robust_under(result):
    """(PGD-50-10, AutoAttack) of a result in per cent, None where it was not run."""
    return result["attacks"].get("pgd-50-10"), result["attacks"].get("autoattack")


def mean_std(values):
    """Mean, and the standard deviation of a sample; None where there are too few values for it."""
    values = torch.tensor([v for v in values if v is not None], dtype=torch.double)
    return values.mean().item() if len(values) else None, values.std().item() if len(values) > 1 else None


def look(method):
    """(name, colour, marker) of a method."""
    spare = ("#117733", "#aa4499", "#661100", "#44aa99")
    return METHODS.get(method, (method.upper().replace("_", "-"), spare[sum(map(ord, method)) % 4], "d"))


def order(method):
    """Where a method comes in tables and legends."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS), method


def flags_of(config):
    """A run's set-up: {flag: value} of the training flags that are not at their script's defaults."""
    return {flag: config[flag] for flag in sorted(config["not_default"]) if flag not in NO_SETUP}


def text_of(flags):
    texts = []
    for flag, value in flags.items():
        if isinstance(value, bool):
            texts.append(flag if value else f"no {flag}")
        else:
            value = ",".join(value) if isinstance(value, list) else value
            texts.append(f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
    return ", ".join(texts).replace("_", " ")


RESULTS_HEAD = """\
# Results

Made by `python -m paper.figures table` from the JSON files that the last column links to; they hold
commands and versions. Per cent, mean ± std over seeds; [1 of 2] where not every seed was attacked;
in brackets what the paper reports for WRN-28-10 after 30 epochs, four seeds. PGD-50-10 and
AutoAttack are run on the first n test images. A JSON file without `autoattack_parts` is older: its
AutoAttack is what PGD-50-10 and AutoAttack left together. "best epoch" is best.pt, the epoch with
the best PGD-10 accuracy on training images. Minutes are those of the training steps, without the
accuracies after each epoch, by the clock, whatever else the machine was doing.

| method | flags | data | network | epochs | eps | n | clean | PGD-50-10 | AutoAttack | minutes | hardware | seeds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def table(args):
    """One row for each set-up, mean and std over its seeds, as Markdown, next to the paper's; then OUT.notes.md."""
    base = Path(args.out).absolute().parent if args.out else Path.cwd()
    groups = {}
    for path, result in zip(args.runs, read_results(args)):
        config = result["training"]
        setup = (result["data"], (config["depth"], config["width"]), result["eps"], order(config["method"]))
        done = (config.get("last_epoch") or {}).get("epoch", config["epochs"])  # fewer if it was stopped
        setup += (text_of(result["flags"]), (config["epochs"], done), result["n"])
        groups.setdefault(setup, []).append((config["seed"], os.path.relpath(path, base), result))

    def cell(values, paper=None):
        mean, std = mean_std(values)
        run = len([v for v in values if v is not None])
        text = "not run" if mean is None else f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")
        text += f" [{run} of {len(values)}]" if 0 < run < len(values) else ""
        return text + ("" if paper is None else f" ({paper:.1f})")

    lines = [RESULTS_HEAD]
    for (data, _, eps, (_, method), flags, (epochs, done), n), group in sorted(groups.items()):
        results = [result for *_, result in group]
        paper = PAPER.get((data, method, flags), [None] * 3) if eps == 8 else [None] * 3
        columns = [[r["clean"] for r in results], *zip(*[robust_under(r) for r in results])]
        epochs = f"{done} of {epochs}" if done < epochs else epochs
        row = [look(method)[0], flags, data, results[0]["network"], epochs, f"{eps:g}", n, *map(cell, columns, paper)]
        row += [cell([r["training"]["seconds"] / 60 for r in results])]
        row += [", ".join(sorted({r["training"]["hardware"] for r in results}))]
        row += [", ".join(f"[{seed}]({path})" for seed, path, _ in sorted(group, key=lambda item: item[:2]))]
        lines.append(f"| {' | '.join(map(str, row))} |")
    notes = Path(f"{args.out}.notes.md")  # what is said about the numbers, written by hand
    if args.out and notes.exists():
        lines += ["", *notes.read_text().splitlines()]
    print("\n".join(lines))
    if args.out:
        console.write_file(f"{args.out}.md", "\n".join(lines) + "\n")
