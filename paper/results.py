"""What figures and tables read: runs and results, checked and named. And the tables of the paper from them.

A run is a folder with config.json and metrics.jsonl, a result what `eval_attacks.py --json` wrote.
"""

import json
import os
import statistics
from pathlib import Path
from urllib.parse import quote

import console

# Name, colour and marker of each method in every figure. A method that is not here gets some of its own, see look().
METHODS = {  # Okabe & Ito's palette, made for colour-blind readers, and colours of Paul Tol's
    "slat": ("SLAT", "#0072b2", "o"),
    "fgsm": ("FGSM", "#d55e00", "s"),
    "fgsm_rs": ("FGSM-RS", "#e69f00", "^"),
    "n_fgsm": ("N-FGSM", "#cc79a7", "v"),
    "fgsm_ckpt": ("FGSM-CKPT", "#009e73", "D"),
    "fgsm_ga": ("FGSM-GA", "#56b4e9", "P"),
    "zero_grad": ("ZeroGrad", "#882255", ">"),
    "n_aaer": ("N-AAER", "#999933", "h"),
    "elle": ("ELLE-A", "#332288", "p"),
    "lap": ("LAP", "#661100", "d"),
    "nuat": ("NuAT", "#6699cc", "x"),
    "sora": ("SORA", "#aa4466", "H"),
    "free": ("Free-AT", "#8c6d31", "X"),
    "yopo": ("YOPO", "#7f7f7f", "<"),
    "pgd": ("PGD-7", "#000000", "*"),
    "fgsm_rs_latent": ("FGSM-RS with latent", "#117733", "8"),
    "slat_hidden": ("SLAT variant", "#44aa99", "+"),
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
    ("cifar10", "fgsm_rs_latent", "input step 1.25"): (82.87, 44.95, None),
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
# Mean and deviation of the 50,000 training images, by which an .npz is known; CIFAR-100's are from the literature.
CIFAR = {
    "cifar10": (0.4914, 0.4822, 0.4465, 0.2470, 0.2435, 0.2616),
    "cifar100": (0.5071, 0.4865, 0.4409, 0.2673, 0.2564, 0.2762),
}
CRC32 = 0x981C6F42  # of CIFAR-10's images and labels; newer runs record theirs
# Flags that do not make a set-up of their own: a table has a column for them, or training does not depend on them.
NO_SETUP = {"dataset", "depth", "width", "epochs", "eps", "seed"} | set(
    "data_dir device precision deterministic monitor out resume overwrite".split()
)
# What is needed of the files of a run and of an evaluation.
CONFIG = {"method", "dataset", "depth", "width", "epochs", "eps", "seed", "not_default"}
RESULT = {"clean", "attacks", "n", "eps", "command", "training"}


def check(path, content, keys):
    """End with one line that names the file if content is not a dict with these keys."""
    if missing := sorted(keys - (content.keys() if isinstance(content, dict) else set())):
        console.fail(f"{path}: {missing[0]!r} is missing: it is damaged, or another version wrote it")
    return content


def read_json(path, keys=frozenset()):
    """A JSON file, or the list of a .jsonl's lines; keys: those that it, or every line, must have."""
    try:
        content = console.load_json(path)
    except ValueError as error:
        console.fail(error)
    for item in content if Path(path).suffix == ".jsonl" else [content]:
        check(path, item, keys)
    return content


def read_run(run):
    return read_json(Path(run) / "config.json", CONFIG | {"monitor"})


def data_of(config, name):
    """(what to call the data set `name`, what tells it from others); config: of the training, perhaps on the same."""
    same = name == config.get("dataset")
    if name in CIFAR:
        return name, name
    if same and (facts := config.get("data")):
        counts, found = (min(config.get("limit_train") or 50_000, 50_000), 10_000), [*facts["mean"], *facts["std"]]
        for kind, known in CIFAR.items():
            near = len(found) == 6 and all(abs(a - b) < 1e-4 for a, b in zip(found, known))
            near &= kind != "cifar10" or facts.get("crc32", CRC32) == CRC32
            if near and (facts["train"], facts["test"]) == counts:
                return kind, kind
        return name, f"{Path(name).name} {json.dumps(facts)}"  # wherever the file was
    known = same and Path(name).stem in CIFAR  # the oldest runs noted its name only
    return (Path(name).stem,) * 2 if known else (name, name)


def read_results(args):
    """The results in the named files, each with its path and what was trained and evaluated."""
    results = []
    for path in args.runs:
        result = read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("training"), dict):
            console.fail(f"{path} does not say how the network was trained: evaluate a run folder, not a bare model.pt")
        check(path, result, RESULT)
        config = check(path, result["training"], CONFIG | {"hardware"})
        result["flags"] = flags_of(config) | ({"best epoch": True} if "best.pt" in result["command"] else {})
        if result["eps"] != config["eps"]:
            result["flags"]["trained with eps"] = config["eps"]
        (trained, key), name = data_of(config, config["dataset"]), result.get("dataset") or config["dataset"]
        result["data"], result["data_key"] = data_of(config, name)
        if result["data_key"] != key:
            result["flags"]["trained on"] = trained
        result["path"], result["network"] = path, f"WRN-{config['depth']}-{config['width']}"
        result["attack"] = attacked_by(result)
        results.append(result)
    return results


def step_size(result):
    """Of PGD, in multiples of eps; older results do not have it, and took the default."""
    return result.get("step_size") or 0.25


def robust_under(result):
    """(PGD-50-10, AutoAttack) of a result in per cent, None where it was not run; with another step it was not."""
    attacks = result["attacks"]
    return attacks.get("pgd-50-10") if step_size(result) == 0.25 else None, attacks.get("autoattack")


def attacked_by(result):
    """How an evaluation differs from the default, as text: budget and step of PGD, seed of the attacks."""
    budgets = [name.upper() for name in result["attacks"] if name.startswith("pgd-")]
    texts = [name for name in budgets if name != "PGD-50-10"]
    if budgets and step_size(result) != 0.25:
        texts.append(f"step size {step_size(result):g}")
    if result.get("seed"):
        texts.append(f"attack seed {result['seed']}")
    return ", ".join(texts)


def heading(configs, ns):
    """In one line, for a caption: network, data, epochs, eps, images attacked and seeds of these runs."""

    def listed(values):
        return ", ".join(f"{value:.10g}" for value in sorted(set(values)))

    usual, seeds = statistics.mode(config["epochs"] for config in configs), listed(config["seed"] for config in configs)
    others = sorted({f"{look(c['method'])[0]} {c['epochs']}" for c in configs if c["epochs"] != usual})
    texts = [", ".join(sorted({f"WRN-{config['depth']}-{config['width']}" for config in configs}))]
    texts += [", ".join(sorted({Path(data_of(config, config["dataset"])[0]).stem for config in configs}))]
    texts += [f"{usual} epochs" + f" ({', '.join(others)})" * bool(others)]
    texts += [f"eps {listed(config['eps'] for config in configs)}/255", f"n = {listed(ns)} images"]
    return " · ".join([*texts, f"seed{'s' * (',' in seeds)} {seeds}"])


def mean_std(values):
    """Mean, and the standard deviation of a sample; None where there are too few values for it."""
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def look(method):
    """(name, colour, marker) of a method."""
    spare = ("#cc6677", "#aa4499", "#ddcc77", "#88ccee")
    return METHODS.get(method, (method.upper().replace("_", "-"), spare[sum(map(ord, method)) % 4], "1"))


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
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            texts.append(f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
    return ", ".join(texts).replace("_", " ")


RELIABILITY_HEAD = """\
# Results

Made by `python -m paper.figures table` from the JSON files that the last column of the second table
links to, and from the runs' `metrics.jsonl`.

## Reliability

How many seeds collapse: a run has collapsed if, under PGD-50-10, it ends below 5 % or below a third
of its best epoch's PGD-10 accuracy; the epoch is the first below that bound from which it does not
come back. Where the metrics are missing 5 % is all that counts, and the epoch is "?". Accuracies,
mean and range, are of the seeds that did not. Methods at their defaults but for dropout.

| method | network | epochs | eps | dropout | seeds | collapsed | in epoch | clean | PGD-50-10 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
RESULTS_HEAD = """\

## All runs

The JSON files hold commands and versions. Per cent, mean ± std over seeds, of which a seed that was
trained or attacked twice is one, by its mean; [1 of 2] where not every seed was attacked; in
brackets what the paper reports for WRN-28-10 after 30 epochs, four seeds. PGD-50-10 and AutoAttack
are run on the first n test images. A JSON file without `autoattack_parts` is older: its AutoAttack
is what PGD-50-10 and AutoAttack left together. "best epoch" is best.pt, the epoch with the best
PGD-10 accuracy on training images; the column of epochs names it. Minutes are those of the training
steps, without the accuracies after each epoch, by the clock, whatever else the machine was doing.

| method | flags | data | network | epochs | eps | n | clean | PGD-50-10 | AutoAttack | minutes | hardware | seeds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def epochs_of(config):
    """(epochs asked for, epochs done, as text): fewer if the run was stopped."""
    epochs = config["epochs"]
    done = (config.get("last_epoch") or {}).get("epoch", epochs)
    return epochs, done, f"{done} of {epochs}" if done < epochs else str(epochs)


def setup_of(result):
    """By what the rows of each table are ordered: data, network, the largest first, eps, method."""
    config = result["training"]
    return result["data_key"], (-config["depth"], -config["width"]), result["eps"], order(config["method"])


def per_epoch(result, key):
    """This run's metrics under key; [] if its metrics.jsonl is neither in runs/ next to the JSON nor where it was."""
    path, training = Path(result["path"]), result["training"]
    folders = (path.parent / "runs" / path.stem.removesuffix("_best"), Path(training.get("out") or path.stem))
    log = next((folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()), None)
    lines = read_json(log, {key}) if log else []
    if training.get("last_epoch") not in (None, *lines[-1:]):  # the folder holds another run now
        return []
    return [line[key] for line in lines]


def collapse_bound(epochs):
    """The accuracy in per cent below which a run has collapsed; epochs: its PGD-10 accuracies."""
    return max([5, *(pgd10 / 3 for pgd10 in epochs)])


def collapse(result):
    """The epoch in which a run collapsed, "?" if its metrics.jsonl is not there, None if it did not collapse."""
    epochs = per_epoch(result, "test_pgd10")
    bound = collapse_bound(epochs)
    if robust_under(result)[0] >= bound:
        return None
    return max((i for i, pgd10 in enumerate(epochs, 1) if pgd10 >= bound), default=0) + 1 if epochs else "?"


def reliability(results):
    """How many seeds of each method collapsed, by network, eps and dropout, as rows of Markdown."""
    groups = {}
    for result in results:
        config = result["training"]
        if result["attack"] or robust_under(result)[0] is None or not result["flags"].keys() <= {"dropout"}:
            continue
        seeds = groups.setdefault((*setup_of(result), epochs_of(config), config.get("dropout", 0.3)), {})
        seeds.setdefault(config["seed"], []).append(result)
    for (_, _, eps, (_, method), (*_, epochs), dropout), seeds in sorted(groups.items()):
        ends = {seed: [collapse(result) for result in found] for seed, found in seeds.items()}
        lost = sorted({end for found in ends.values() for end in found if end}, key=str)
        whole = [seeds[seed] for seed, found in ends.items() if not any(found)]
        cells = []
        for number in (lambda r: r["clean"], lambda r: robust_under(r)[0]):
            values = [mean_std([number(result) for result in found])[0] for found in whole]
            cells.append(f"{mean_std(values)[0]:.1f}" if values else "-")
            if len(values) > 1:
                cells[-1] += f" ({min(values):.1f} to {max(values):.1f})"
        one, *_ = next(iter(seeds.values()))
        row = [look(method)[0], one["network"], epochs, f"{eps:g}", f"{dropout:g}", len(seeds)]
        row += [len(seeds) - len(whole), ", ".join(map(str, lost)) or "-", *cells]
        yield f"| {' | '.join(map(str, row))} |"


def table(args):
    """Reliability; one row for each set-up, mean and std over its seeds, next to the paper's; then OUT.notes.md."""
    base = Path(args.out).absolute().parent if args.out else Path.cwd()
    groups, everything = {}, read_results(args)
    for result in everything:
        config = result["training"]
        setup = (*setup_of(result), text_of(result["flags"]), result["attack"], epochs_of(config), result["n"])
        groups.setdefault(setup, {}).setdefault(config["seed"], []).append(result)

    def cell(values, paper=None):
        mean, std = mean_std(values)
        run = len([v for v in values if v is not None])
        text = "not run" if mean is None else f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")
        text += f" [{run} of {len(values)}]" if 0 < run < len(values) else ""
        return text + ("" if paper is None else f" ({paper:.1f})")

    def numbers(result):
        seconds = result["training"].get("seconds")
        return result["clean"], *robust_under(result), None if seconds is None else seconds / 60

    lines = [RELIABILITY_HEAD, *reliability(everything), RESULTS_HEAD]
    for (_, _, eps, (_, method), flags, attack, (asked, _, epochs), n), seeds in sorted(groups.items()):
        results = [result for found in seeds.values() for result in found]
        data = ", ".join(sorted({result["data"] for result in results}))
        paper = PAPER.get((data, method, flags), [None] * 3) if eps == 8 else [None] * 3
        # One value for each seed: a network that was trained or attacked twice says nothing about other seeds.
        values = [[mean_std(column)[0] for column in zip(*map(numbers, found))] for found in seeds.values()]
        *accuracies, minutes = zip(*values)
        flags = ", ".join(filter(None, (flags, attack)))
        if "best epoch" in flags:
            found = sorted({log.index(max(log)) + 1 for r in results if (log := per_epoch(r, "train_pgd10"))})
            epochs = f"{', '.join(map(str, found)) or '?'} of {asked}"
        row = [look(method)[0], flags, data, results[0]["network"], epochs, f"{eps:g}", n]
        row += [*map(cell, accuracies, paper), cell(minutes).replace("not run", "-")]
        row += [", ".join(sorted({r["training"]["hardware"] for r in results}))]
        links = sorted((r["training"]["seed"], os.path.relpath(r["path"], base)) for r in results)
        row += [", ".join(f"[{seed}]({quote(path, errors='surrogateescape')})" for seed, path in links)]
        lines.append(f"| {' | '.join(str(text).replace('|', '/') for text in row)} |")
    notes = Path(f"{args.out}.notes.md")  # what is said about the numbers, written by hand
    if args.out and notes.exists():
        lines += ["", *notes.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    text = "\n".join(lines) + "\n"
    try:
        if args.out:
            console.write_file(f"{args.out}.md", text)
    finally:
        print(text, end="")
