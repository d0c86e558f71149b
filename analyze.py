#!/usr/bin/env python3
"""The SLAT paper's figures and tables from your own runs: one sub-command a question.

    python analyze.py curves runs/slat runs/fgsm            Fig. 6: robust accuracy over epochs
    python analyze.py alignment runs/slat runs/fgsm         Fig. 6: gradient alignment over epochs
    python analyze.py landscape runs/slat runs/fgsm         Fig. 4: the loss around test images
    python analyze.py grad-norm runs/slat runs/fgsm         Fig. 5: l1 norm of the gradient at every layer
    python analyze.py linearity runs/slat runs/fgsm         eq. 6: how far the loss is from linear within eps
    python analyze.py eps results/cpu/*.json                Fig. 3: robust accuracy over the eps trained for
    python analyze.py eta results/cpu/*.json                Fig. 7: accuracy over SLAT's eta
    python analyze.py table results/cpu/*.json              Tables 1 to 3: mean and std over seeds

The first five take run folders, the last three what `eval_attacks.py --json` wrote. Every figure is written
as NAME.png, NAME.svg and NAME.json (the numbers); numbers in brackets are those of Park & Lee, arXiv:2104.01575.
"""

import argparse
import json
import math
import os
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from wrn import LAYERS, load_model

# One colour a method everywhere (Okabe & Ito's palette, made for colour-blind readers).
METHODS = {
    "slat": ("SLAT", "#0072b2", "o"),
    "fgsm": ("FGSM", "#d55e00", "s"),
    "fgsm_rs": ("FGSM-RS", "#e69f00", "^"),
    "n_fgsm": ("N-FGSM", "#cc79a7", "v"),
    "fgsm_ckpt": ("FGSM-CKPT", "#009e73", "D"),
    "fgsm_ga": ("FGSM-GA", "#56b4e9", "P"),
    "free": ("Free-AT", "#8c6d31", "X"),
    "yopo": ("YOPO", "#7f7f7f", "<"),
    "pgd": ("PGD-7", "#000000", "*"),
}
# Tables 1, 2 and 3 of the paper, CIFAR-10 at eps 8: clean, PGD-50-10, AutoAttack in per cent.
PAPER = {
    ("pgd", ""): (84.86, 51.63, 48.65),
    ("fgsm_ga", ""): (82.88, 48.90, 46.22),
    ("yopo", ""): (82.35, 34.23, 32.79),
    ("free", ""): (76.57, 44.15, 41.02),
    ("fgsm", ""): (87.42, 0.01, 0.00),
    ("fgsm_rs", ""): (90.76, 3.90, 0.44),
    ("fgsm_ckpt", ""): (89.32, 40.83, 39.38),
    ("slat", ""): (85.91, 47.06, 44.62),
    ("fgsm", "alpha 7.2"): (90.87, 3.09, None),
    ("slat", "init uniform"): (82.87, 44.95, None),
    ("slat", "layers 0,conv3,conv4"): (84.60, 0.00, 0.00),
    ("slat", "layers 0,conv1,conv2,conv3,conv4"): (81.41, 47.3, 43.58),
}
# The scripts' defaults: a set-up is what differs from them. Those of alpha are multiples of eps.
DEFAULTS = {
    "batch_size": 128,
    "lr_max": 0.2,
    "weight_decay": 5e-4,
    "momentum_cycle": True,
    "limit_train": None,
    "dropout": 0.3,
    "layers": ["0", "conv1", "conv2"],
    "eta": 1.0,
    "input_step": 0.9,
    "latent_clamp": True,
    "init": "zero",
    "noise": 2.0,
    "checkpoints": 3,
    "ga_lambda": 0.2,
    "replays": 8,
    "outer": 5,
    "inner": 3,
    "steps": 7,
}
ALPHA = {"fgsm": 1, "fgsm_ga": 1, "n_fgsm": 1, "fgsm_rs": 1.25, "fgsm_ckpt": 1.25, "yopo": 0.25, "pgd": 0.25}
PEAK = 0.4  # share of the epochs after which the learning rate is highest


# ---------------------------------------------------------------- input and output


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        common.fail("pictures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
        | {"legend.edgecolor": "none", "legend.framealpha": 1}
    )
    return plt


def write(args, figure, numbers):
    """NAME.json, NAME.png, NAME.svg."""
    common.write_text(f"{args.out}.json", json.dumps(numbers, indent=1) + "\n")
    for end in ("png", "svg"):
        figure.savefig(f"{args.out}.{end}", dpi=150)
    print(f"wrote {args.out}.png, {args.out}.svg, {args.out}.json")


def read_json(path, lines=False):
    try:
        text = Path(path).read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError):
        common.fail(f"{path} is missing or damaged")


def look(config):
    """(label, colour, marker) of a run."""
    return METHODS.get(config.get("method"), (config.get("method") or "?", "#555555", "."))


def flags_of(config):
    """{flag: value} of a run where it is not the script's default."""
    own = {flag: config[flag] for flag in DEFAULTS if flag in config and config[flag] != DEFAULTS[flag]}
    if "alpha" in config and abs(config["alpha"] - config["eps"] * ALPHA.get(config["method"], 1)) > 1e-6:
        own["alpha"] = config["alpha"]
    return own


def text_of(flags):
    def text(flag, value):
        if value is False:
            return f"no {flag}"
        value = ",".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
        return f"{flag} {value}"

    return ", ".join(text(*flag) for flag in flags.items()).replace("_", " ")


def legends(paths, configs):
    """[(label, line style)] of runs: a method's name, colour and marker, and the flags that the runs do not share.

    Markers are hollow where such a flag is not at its default. Where two runs share all that, the marker is the seed;
    where they share the seed too, the label is the folder's name.
    """
    found = [flags_of(config) for config in configs]
    shared = {k: v for k, v in found[0].items() if all(k in other and other[k] == v for other in found)}
    labels, styles = [], []
    for config, flags in zip(configs, found):
        name, colour, marker = look(config)
        own = text_of({k: v for k, v in flags.items() if k not in shared})
        labels.append(f"{name}, {own}" if own else name)
        styles.append({"color": colour, "marker": marker, "markerfacecolor": "white" if own else colour})
    for i in [i for i, label in enumerate(labels) if labels.count(label) > 1]:
        seed = configs[i].get("seed", "?")
        labels[i] += f", seed {seed}"
        styles[i] |= {"marker": f"${seed}$", "markersize": 8, "markerfacecolor": styles[i]["color"]}
    labels = [Path(p).name if labels.count(label) > 1 else label for p, label in zip(paths, labels)]
    return list(zip(labels, styles))


def legend_below(figure, axis):
    """Under the axes, where it hides no line however many runs there are and however long their names."""
    handles, labels = axis.get_legend_handles_labels()
    rows = math.ceil(len(labels) / max(1, int(8.5 * figure.get_figwidth()) // (max(map(len, labels)) + 5)))
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def networks(args):
    """Yield (label, style, network, x, y) of each run: the first n test images that it was trained to know."""
    configs = [read_json(Path(run) / "config.json") for run in args.runs]
    for run, (label, style) in zip(args.runs, legends(args.runs, configs)):
        try:
            model = load_model(run, args.device)
        except ValueError as error:
            common.fail(error)
        dataset = argparse.Namespace(run=run, dataset=args.dataset, data_dir=args.data_dir, device=args.device)
        x, y = common.load_test_data(dataset, model.arguments["num_classes"]).test(args.n)
        yield label, style, model.requires_grad_(False), x, y


def batches(x, y, size=100):
    return zip(x.split(size), y.split(size))


def gradients(model, x, y, names):
    """The loss (B,) and its gradients at the named layers, [(B, C, H, W)]."""
    logits, h = model(x.clone().requires_grad_(), return_features=True)
    loss = F.cross_entropy(logits, y, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), [h[name] for name in names])


# ---------------------------------------------------------------- figures of networks


def landscape(args):
    """Mean loss at x + a sign(grad) + b r, r of random signs, for a and b within +-eps (Fig. 4)."""
    plt = pyplot()
    side = torch.linspace(-args.eps, args.eps, args.points)
    surfaces = {}
    for label, _, model, x, y in networks(args):
        total = torch.zeros(args.points, args.points)
        generator = torch.Generator().manual_seed(args.seed)
        for part, target in batches(x, y):
            (adversarial,) = (g.sign() for g in gradients(model, part, target, ["0"])[1])
            random = torch.rand(part.shape, generator=generator).to(part).sub(0.5).sign()
            with torch.no_grad():
                for i, a in enumerate(side / 255):
                    for j, b in enumerate(side / 255):
                        # No clipping to [0, 1]: it would bend the surface where the loss is straight.
                        loss = F.cross_entropy(model(part + a * adversarial + b * random), target, reduction="sum")
                        total[i, j] += loss.item()
        surfaces[label] = (total / len(x)).tolist()
    width = 3.2 * len(surfaces) + 1
    figure, axes = plt.subplots(
        1, len(surfaces), figsize=(width, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    top = max(max(map(max, surface)) for surface in surfaces.values())
    levels = torch.linspace(0, top, 21).tolist()
    for axis, (label, surface) in zip(axes[0], surfaces.items()):
        surface = torch.tensor(surface).T
        shades = axis.contourf(side, side, surface, levels, cmap="viridis")
        axis.contour(side, side, surface, levels, colors="white", linewidths=0.4)
        axis.set(title=textwrap.fill(label, 24), xlabel="along sign of the gradient (1/255)", aspect="equal")
    axes[0][0].set_ylabel("along random signs (1/255)")
    figure.colorbar(shades, ax=axes[0].tolist(), label="mean loss", format="%.1f")
    write(args, figure, {"eps": args.eps, "n": args.n, "side": side.tolist(), "loss": surfaces})


def grad_norm(args):
    """Mean l1 norm of the loss gradient at every layer's output (Fig. 5), of each image alone."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers = {}
    for label, style, model, x, y in networks(args):
        norms = torch.zeros(len(LAYERS))
        for part, target in batches(x, y):
            found = gradients(model, part, target, LAYERS)[1]
            norms += torch.stack([g.abs().sum((1, 2, 3)).sum().cpu() for g in found])
        numbers[label] = dict(zip(LAYERS, (norms / len(x)).tolist()))
        axis.plot(LAYERS, numbers[label].values(), **style, label=label)
    axis.set(yscale="log", xlabel="layer (0 is the input)", ylabel="mean l1 norm of the loss gradient")
    legend_below(figure, axis)
    write(args, figure, {"n": args.n, "l1": numbers})


def linearity(args):
    """Mean |L(h_k + d) - L(h_k) - <grad, d>|, d = eps sign(grad), the error of the linear model that a step trusts."""
    plt = pyplot()
    names = args.layers.split(",")
    if not set(names) <= set(LAYERS):
        common.fail(f"argument --layers: {args.layers!r}: the layers are {', '.join(LAYERS)}")
    side = torch.linspace(0, args.eps, args.points)[1:]
    figure, axes = plt.subplots(1, len(names), figsize=(3.8 * len(names), 3.6), squeeze=False, layout="constrained")
    numbers = {}
    for label, style, model, x, y in networks(args):
        errors = {name: torch.zeros(len(side)) for name in names}
        for part, target in batches(x, y):
            loss, found = gradients(model, part, target, names)
            for name, g in zip(names, found):
                for i, size in enumerate(side / 255):
                    with torch.no_grad():
                        logits = model(part, delta={name: size * g.sign()})
                        after = F.cross_entropy(logits, target, reduction="none")
                    errors[name][i] += (after - loss - size * g.abs().sum((1, 2, 3))).abs().sum().item()
        numbers[label] = {name: (error / len(x)).tolist() for name, error in errors.items()}
        for axis, name in zip(axes[0], names):
            axis.plot(side, numbers[label][name], **style, label=label)
    for axis, name in zip(axes[0], names):
        axis.set(xlabel="size of the step (1/255)", title="input" if name == "0" else name, ylim=(0, None))
    axes[0][0].set_ylabel("mean linear approximation error")
    legend_below(figure, axes[0][0])
    write(args, figure, {"n": args.n, "eps": side.tolist(), "error": numbers})


# ---------------------------------------------------------------- figures of metrics.jsonl


def over_epochs(args, keys, ylabel):
    plt = pyplot()
    configs = [read_json(Path(run) / "config.json") for run in args.runs]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers = {}
    for run, config, (label, style) in zip(args.runs, configs, legends(args.runs, configs)):
        rows = read_json(Path(run) / "metrics.jsonl", lines=True)
        missing = [key for key in keys if not rows or key not in rows[-1]]
        if missing:
            common.fail(f"{run}/metrics.jsonl has no {missing[0]}: the run is older than that measurement, or empty")
        # In shares of the training: methods differ in how many epochs they take.
        share = [row["epoch"] / config["epochs"] for row in rows]
        numbers[label] = {"epochs": config["epochs"], "share": share} | {key: [r[key] for r in rows] for key in keys}
        for key, line in zip(keys, ("-", ":")):
            name = label if line == "-" else None
            axis.plot(share, numbers[label][key], line, **style, label=name)
        for row, where in zip(rows, share):
            if row["warning"]:
                place = {"xytext": (5, 5), "textcoords": "offset points"}
                axis.annotate("overfits", (where, row[keys[0]]), **place, color=style["color"], fontsize=9)
                break
    axis.axvline(PEAK, color="0.6", linewidth=1, zorder=0)
    axis.set(xlabel="share of the training done", ylabel=ylabel, xlim=(0, 1.02), ylim=(0, None))
    axis.text(PEAK, axis.get_ylim()[1], " highest learning rate", color="0.4", va="top", fontsize=9)
    legend_below(figure, axis)
    write(args, figure, numbers)


def curves(args):
    """PGD-10 and FGSM accuracy on test images; where they part, a network overfits catastrophically (Fig. 6)."""
    over_epochs(args, ["test_pgd10", "test_fgsm"], "accuracy (%): PGD-10 solid, FGSM dotted")


def alignment(args):
    """Mean cosine of the gradients at x and at a random point within eps, on test images."""
    over_epochs(args, ["test_alignment"], "gradient alignment (cosine)")


# ---------------------------------------------------------------- figures and tables of results


def robust_under(result):
    """(PGD-50-10, AutoAttack) of a result in per cent, None where it was not run."""
    return result["attacks"].get("pgd-50-10"), result["attacks"].get("autoattack")


def mean_std(values):
    """Mean, and the standard deviation of a sample; None where there are too few values for it."""
    values = torch.tensor([v for v in values if v is not None], dtype=torch.double)
    return values.mean().item() if len(values) else None, values.std().item() if len(values) > 1 else None


def read_results(args):
    """The results in the named files, each with its set-up: {flag: value that is not its default, or the attack's}."""
    results = [read_json(path) for path in args.runs]
    for path, result in zip(args.runs, results):
        if not isinstance(result, dict) or not isinstance(result.get("training"), dict):
            common.fail(f"{path} says nothing of the training: it must come from eval_attacks.py on a run folder")
        result["flags"] = flags_of(result["training"])
        if result["eps"] != result["training"]["eps"]:
            result["flags"]["trained with eps"] = result["training"]["eps"]
    return results


def over_flag(args, flag, xlabel):
    """Accuracy over a training flag, all others at their defaults: one line a method, mean over seeds."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    groups, kinds = {}, {}
    for result in read_results(args):
        config = result["training"]
        if flag in config and not result["flags"].keys() - {flag}:
            groups.setdefault(config["method"], {}).setdefault(config[flag], []).append(result)
            kinds.setdefault("", set()).add(f"WRN-{config['depth']}-{config['width']} on {result['n']} images")
            kinds.setdefault(config["method"], set()).add(f"{config['method']} after {config['epochs']} epochs")
    if not groups:
        common.fail(f"none of these results was trained with --{flag} and defaults for the rest")
    for found in kinds.values():
        if len(found) > 1:
            common.fail(f"these are results of {' and of '.join(sorted(found))}: give those of one kind")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers, drawn = {}, {}
    kinds_of_accuracy = {
        "clean": (":", None, lambda r: r["clean"]),
        "PGD-50-10": ("-", None, lambda r: robust_under(r)[0]),
        "AutoAttack": ("--", "white", lambda r: robust_under(r)[1]),
    }
    for method in sorted(groups, key=order):
        by_value, (label, colour, marker) = groups[method], look({"method": method})
        values = sorted(by_value)
        numbers[label] = {flag: values}
        for key, (line, face, pick) in kinds_of_accuracy.items():
            means = [mean_std([pick(r) for r in by_value[v]])[0] for v in values]
            numbers[label][key.lower()] = means
            if any(mean is not None for mean in means):
                # A line breaks where nothing was measured.
                points = [math.nan if mean is None else mean for mean in means]
                style = {"color": colour, "marker": marker, "markerfacecolor": face or colour, "clip_on": False}
                axis.plot(values, points, line, **style)
                drawn[key] = Line2D([], [], color="#555555", linestyle=line, marker="o", markerfacecolor=face)
        drawn[label] = Line2D([], [], color=colour, marker=marker, linestyle="none")
    axis.set(xlabel=xlabel, ylabel="accuracy (%)", xticks=sorted({v for g in groups.values() for v in g}))
    axis.set_ylim(0)
    names = sorted(drawn, key=lambda name: name in kinds_of_accuracy)  # methods first
    figure.legend([drawn[name] for name in names], names, loc="outside right center")
    write(args, figure, numbers)


def eps(args):
    """Robust accuracy over the eps that networks were trained for and are attacked with (Fig. 3)."""
    over_flag(args, "eps", "eps of training and attack (1/255)")


def eta(args):
    """Accuracy over SLAT's latent step eta, in multiples of eps (Fig. 7)."""
    over_flag(args, "eta", "eta (multiples of eps)")


def order(method):
    """Where a method stands in tables and legends."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def table(args):
    """One row for each set-up, mean and std over its seeds, as Markdown, beside the paper's; then OUT.notes.md."""
    base = Path(args.out).absolute().parent if args.out else Path.cwd()
    groups = {}
    for path, result in zip(args.runs, read_results(args)):
        config = result["training"]
        flags = text_of(result["flags"])
        network = (config["depth"], config["width"])
        key = (network, result["eps"], order(config["method"]), config["method"], flags, config["epochs"], result["n"])
        groups.setdefault(key, []).append((config["seed"], os.path.relpath(path, base), result))

    def cell(values):
        mean, std = mean_std(values)
        if mean is None:
            return "not run"
        std = "" if std is None else f" ± {std:.1f}"
        run = sum(v is not None for v in values)
        return f"{mean:.1f}{std}" + (f" [{run} of {len(values)}]" if run < len(values) else "")

    rows = []
    for key, group in sorted(groups.items()):
        (depth, width), size, _, method, flags, epochs, n = key
        results = [result for *_, result in group]
        paper = PAPER.get((method, flags)) if size == 8 else None
        columns = [[r["clean"] for r in results], *zip(*[robust_under(r) for r in results])]
        cells = [cell(c) + (f" ({p:.1f})" if p is not None else "") for c, p in zip(columns, paper or [None] * 3)]
        setup = [look({"method": method})[0], flags, f"WRN-{depth}-{width}", f"{epochs}", f"{size:g}", f"{n}"]
        minutes = cell([r["training"]["seconds"] / 60 for r in results])
        hardware = ", ".join(sorted({r["training"]["hardware"] for r in results}))
        links = ", ".join(f"[{seed}]({path})" for seed, path, _ in sorted(group, key=lambda item: item[:2]))
        rows.append([*setup, *cells, minutes, hardware, links])
    shown = range(len(COLUMNS))
    if args.short:
        shown = [i for i in shown if COLUMNS[i] in SHORT or len({row[i] for row in rows}) > 1]
        shown = [i for i in shown if COLUMNS[i] not in ("minutes", "hardware")]
    table = [[row[i] for i in shown] for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]]
    lines = [*([] if args.short else RESULTS_HEAD.splitlines()), *(f"| {' | '.join(row)} |" for row in table)]
    notes = Path(f"{args.out}.notes.md")  # what people have to say of the numbers
    if args.out and notes.exists():
        lines += ["", *notes.read_text().splitlines()]
    print("\n".join(lines))
    if args.out:
        common.write_text(f"{args.out}.md", "\n".join(lines) + "\n")


COLUMNS = "method,flags,network,epochs,eps,n,clean,PGD-50-10,AutoAttack,minutes,hardware,seeds".split(",")
SHORT = ("method", "clean", "PGD-50-10", "seeds")
RESULTS_HEAD = """\
# Results

Made by `analyze.py table` from the JSON files that the last column links; they have command and versions. Per cent,
mean ± std over seeds, [1 of 2] where not all were attacked; in brackets what the paper reports for WRN-28-10 after 30
epochs, four seeds. PGD-50-10 and AutoAttack on the first n test images. Minutes of training as the clock saw them,
with whatever else the machine was doing.

"""


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in (
        ("curves", curves),
        ("alignment", alignment),
        ("landscape", landscape),
        ("grad-norm", grad_norm),
        ("linearity", linearity),
        ("eps", eps),
        ("eta", eta),
        ("table", table),
    ):
        sub = commands.add_parser(command, help=function.__doc__.split("\n")[0] if function.__doc__ else None)
        sub.set_defaults(function=function)
        sub.add_argument(
            "runs", nargs="+", help="run folders" if command not in ("eps", "eta", "table") else "JSON files"
        )
        sub.add_argument(
            "--out", default=None if command == "table" else command, metavar="NAME", help="default COMMAND"
        )
        if command in ("landscape", "grad-norm", "linearity"):
            sub.add_argument(
                "--n", type=common.number(int, 1), default=100, help="the first N test images (default 100)"
            )
            sub.add_argument("--dataset", help="cifar10, cifar100 or an .npz (default what the run was trained on)")
            sub.add_argument("--data-dir", default="data", help="where cifar10 and cifar100 are (default data)")
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
        if command in ("landscape", "linearity"):
            sub.add_argument("--eps", type=common.number(float, 0, 255), default=8, help="in 1/255 (default 8)")
            sub.add_argument("--points", type=common.number(int, 3), default=17, help="along each axis (default 17)")
        if command == "landscape":
            sub.add_argument("--seed", type=common.number(int, 0, 2**31), default=0, help="of the random direction")
        if command == "table":
            sub.add_argument(
                "--short", action="store_true", help="without minutes, hardware, and what all rows have in common"
            )
        if command == "linearity":
            sub.add_argument("--layers", default="0,conv1,conv2", help="default 0,conv1,conv2")
    args = parser.parse_args()
    if args.out and not Path(args.out).absolute().parent.is_dir():
        parser.error(f"argument --out: no folder {Path(args.out).absolute().parent}")
    if "device" in args:
        args.device = common.find_device(args.device)
    try:
        args.function(args)
    except (KeyError, TypeError, AttributeError) as error:  # of a config.json, metrics.jsonl or result
        common.fail(f"{', '.join(args.runs)}: a file is damaged, or not of this version ({error})")


if __name__ == "__main__":
    common.launch(main)
