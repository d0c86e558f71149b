"""The SLAT paper's figures and tables from your own runs, one sub-command each.

    python -m paper.figures curves runs/slat runs/fgsm            Fig. 6: robust accuracy over epochs
    python -m paper.figures alignment runs/slat runs/fgsm         Fig. 6: gradient alignment over epochs
    python -m paper.figures landscape runs/slat runs/fgsm         Fig. 4: the loss around test images
    python -m paper.figures grad-norm runs/slat runs/fgsm         Fig. 5: l1 norm of the gradient at every layer
    python -m paper.figures linearity runs/slat runs/fgsm         eq. 6: how far the loss is from linear within eps
    python -m paper.figures eps results/cpu/*_epochs8_*.json      Fig. 3: robust accuracy over the eps trained for
    python -m paper.figures eta results/cpu/*_epochs8_eps8_*      Fig. 7: accuracy over SLAT's eta
    python -m paper.figures dropout results/cpu/*_epochs8_eps8_*  accuracy over dropout: when SLAT is reliable
    python -m paper.figures table results/cpu/*.json              Tables 1 to 3: mean and std over seeds

The first five take run folders, the last four the files that `eval_attacks.py --json` wrote. Every figure is written
as NAME.png, NAME.svg and NAME.json (the numbers). Numbers in brackets are those of Park & Lee, arXiv:2104.01575.
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
# Tables 1, 2 and 3 of the paper at eps 8, per cent: clean, PGD-50-10, AutoAttack.
PAPER = {
    ("cifar10", "pgd", ""): (84.86, 51.63, 48.65),
    ("cifar10", "fgsm_ga", ""): (82.88, 48.90, 46.22),
    ("cifar10", "yopo", ""): (82.35, 34.23, 32.79),
    ("cifar10", "free", ""): (76.57, 44.15, 41.02),
    ("cifar10", "fgsm", ""): (87.42, 0.01, 0.00),
    ("cifar10", "fgsm_rs", ""): (90.76, 3.90, 0.44),
    ("cifar10", "fgsm_ckpt", ""): (89.32, 40.83, 39.38),
    ("cifar10", "slat", ""): (85.91, 47.06, 44.62),
    ("cifar10", "fgsm", "alpha 7.2"): (90.87, 3.09, None),
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
OWN_COLUMN = {"dataset", "depth", "width", "epochs", "eps", "seed"}
NO_SETUP = OWN_COLUMN | set(
    "data_dir device precision compile deterministic monitor out resume overwrite checkpoint_minutes".split()
)
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
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "savefig.facecolor": "white"}
        | {"legend.edgecolor": "none", "legend.framealpha": 1, "svg.hashsalt": "slat"}
    )
    return plt


def write(name, figure, numbers):
    """NAME.json, NAME.png, NAME.svg."""
    common.write_text(f"{name}.json", json.dumps(numbers, indent=1) + "\n")
    for end in ("png", "svg"):
        figure.savefig(f"{name}.{end}", dpi=150, metadata={"Date": None} if end == "svg" else None)
    print(f"wrote {name}.png, {name}.svg, {name}.json")


def read_json(path, lines=False):
    try:
        text = Path(path).read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError):
        common.fail(f"{path} is missing or damaged")


def look(method):
    """(name, colour, marker) of a method."""
    spare = ("#117733", "#aa4499", "#661100", "#44aa99")
    return METHODS.get(method, (method.upper().replace("_", "-"), spare[sum(map(ord, method)) % 4], "d"))


def order(method):
    """Where a method stands in tables and legends."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS), method


def flags_of(config):
    """A run's set-up: {flag: value} of the training flags that are not at their script's defaults."""
    return {flag: config[flag] for flag in sorted(config["not_default"]) if flag not in NO_SETUP}


def text_of(flags):
    def text(flag, value):
        if isinstance(value, bool):
            return flag if value else f"no {flag}"
        value = ",".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
        return f"{flag} {value}"

    return ", ".join(text(*flag) for flag in flags.items()).replace("_", " ")


def legends(paths, configs):
    """[(label, line style)] of runs: a method's name, colour and marker, and those flags that not all runs share.

    A run with such a flag has hollow markers. Runs that are alike in all this have their seeds as markers; if those
    are alike too, the folders' names are the labels.
    """
    found = [flags_of(config) for config in configs]
    shared = {k: v for k, v in found[0].items() if all(k in other and other[k] == v for other in found)}
    labels, styles = [], []
    for config, flags in zip(configs, found):
        name, colour, marker = look(config["method"])
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
    """A legend under the axes, where it hides nothing however many runs there are and however long their names."""
    handles, labels = axis.get_legend_handles_labels()
    rows = math.ceil(len(labels) / max(1, int(8.5 * figure.get_figwidth()) // (max(map(len, labels)) + 5)))
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def networks(args):
    """Yield (label, style, network, x, y) for each run; x, y: the first n test images of its data set."""
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
    write(args.out, figure, {"eps": args.eps, "n": args.n, "side": side.tolist(), "loss": surfaces})


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
    write(args.out, figure, {"n": args.n, "l1": numbers})


def linearity(args):
    """Mean |L(h_k + d) - L(h_k) - <grad, d>|, d = eps sign(grad): the error of the model behind a single step."""
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
    write(args.out, figure, {"n": args.n, "eps": side.tolist(), "error": numbers})


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
            common.fail(f"{run}/metrics.jsonl has no {missing[0]}: no epoch has ended, or an older version wrote it")
        # As a share of the training: Free-AT and YOPO take fewer epochs than the others.
        share = [row["epoch"] / config["epochs"] for row in rows]
        numbers[label] = {"epochs": config["epochs"], "share": share} | {key: [r[key] for r in rows] for key in keys}
        for key, line in zip(keys, ("-", ":")):
            name = label if line == "-" else None
            axis.plot(share, numbers[label][key], line, **style, label=name)
        for row, where in zip(rows, share):
            if row.get("warning"):
                place = {"xytext": (5, 5), "textcoords": "offset points"}
                axis.annotate("overfits", (where, row[keys[0]]), **place, color=style["color"], fontsize=9)
                break
    axis.axvline(PEAK, color="0.6", linewidth=1, zorder=0)
    axis.set(xlabel="share of the training done", ylabel=ylabel, xlim=(0, 1.02), ylim=(0, None))
    axis.text(PEAK, axis.get_ylim()[1], " highest learning rate", color="0.4", va="top", fontsize=9)
    legend_below(figure, axis)
    write(args.out, figure, numbers)


def curves(args):
    """PGD-10 and FGSM accuracy on test images (Fig. 6): where they part, the network overfits catastrophically."""
    over_epochs(args, ["test_pgd10", "test_fgsm"], "accuracy (%): PGD-10 solid, FGSM dotted")


def alignment(args):
    """Mean cosine of the gradients at x and at a random point within eps, on test images."""
    over_epochs(args, ["alignment"], "gradient alignment (cosine)")


# ---------------------------------------------------------------- figures and tables of results


def robust_under(result):
    """(PGD-50-10, AutoAttack) of a result in per cent, None where it was not run."""
    return result["attacks"].get("pgd-50-10"), result["attacks"].get("autoattack")


def mean_std(values):
    """Mean, and the standard deviation of a sample; None where there are too few values for it."""
    values = torch.tensor([v for v in values if v is not None], dtype=torch.double)
    return values.mean().item() if len(values) else None, values.std().item() if len(values) > 1 else None


def read_results(args):
    """The results in the named files, each with its set-up, its data set's name and (depth, width)."""
    results = [read_json(path) for path in args.runs]
    for path, result in zip(args.runs, results):
        if not isinstance(result, dict) or not isinstance(result.get("training"), dict):
            common.fail(f"{path} does not say how the network was trained: evaluate a run folder, not a bare model.pt")
        config = result["training"]
        result["flags"] = flags_of(config)
        if result["eps"] != config["eps"]:
            result["flags"]["trained with eps"] = config["eps"]
        result["data"] = Path(config["dataset"]).stem
        result["network"] = f"WRN-{config['depth']}-{config['width']}"
    return results


def over_flag(args, flag, xlabel):
    """Accuracy over a training flag, all others at their defaults: a point for each seed, a line through the means."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    groups, kinds = {}, {}
    for result in read_results(args):
        config = result["training"]
        if flag in config and not result["flags"].keys() - {flag}:
            groups.setdefault(config["method"], {}).setdefault(config[flag], []).append(result)
            kind = f"{result['network']} on {result['n']} images of {result['data']}"
            kind += f" at eps {result['eps']:g}" if flag != "eps" else ""
            kinds.setdefault("", set()).add(kind)
            kinds.setdefault(config["method"], set()).add(f"{config['method']} after {config['epochs']} epochs")
    if not groups:
        common.fail(f"none of these networks was trained with --{flag} and the other flags at their defaults")
    for found in kinds.values():
        if len(found) > 1:
            common.fail(f"the results differ in more than {flag}: {', '.join(sorted(found))}; give those of one kind")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers, methods, accuracies = {}, {}, {}
    for method in sorted(groups, key=order):
        by_value, (label, colour, marker) = groups[method], look(method)
        values = sorted(by_value)
        numbers[label] = {flag: values}
        methods[label] = Line2D([], [], color=colour, marker=marker, linestyle="none")
        for key, line, hollow, pick in (
            ("clean", ":", False, lambda r: r["clean"]),
            ("PGD-50-10", "-", False, lambda r: robust_under(r)[0]),
            ("AutoAttack", "--", True, lambda r: robust_under(r)[1]),
        ):
            seeds = [[a for a in map(pick, by_value[v]) if a is not None] for v in values]
            numbers[label][key.lower()] = seeds
            if any(seeds):
                # The line breaks where nothing was measured; the legend shows one only if some of it is visible.
                means = [mean_std(found)[0] if found else math.nan for found in seeds]
                axis.plot(values, means, line, color=colour)
                style = {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour}
                pairs = [(value, a) for value, found in zip(values, seeds) for a in found]
                axis.plot(*zip(*pairs), **style, linestyle="none", clip_on=False)
                accuracies.setdefault(key, Line2D([], [], color="#555555", linestyle="none", marker="o"))
                if hollow:
                    accuracies[key].set_markerfacecolor("white")
                if any(a and b for a, b in zip(seeds, seeds[1:])):
                    accuracies[key].set_linestyle(line)
    axis.set(xlabel=xlabel, ylabel="accuracy (%)", xticks=sorted({v for g in groups.values() for v in g}))
    axis.set_ylim(0)
    named = methods | accuracies
    figure.set_figheight(max(4, 0.28 * len(named) + 0.3))  # one row each
    figure.legend(named.values(), named, loc="outside right center")
    write(args.out, figure, numbers)


def eps(args):
    """Robust accuracy over the eps that networks were trained for and are attacked with (Fig. 3)."""
    over_flag(args, "eps", "eps of training and attack (1/255)")


def eta(args):
    """Accuracy over SLAT's latent step eta, in multiples of eps (Fig. 7)."""
    over_flag(args, "eta", "eta (multiples of eps)")


def dropout(args):
    """Accuracy over the dropout of the network, at one eps."""
    over_flag(args, "dropout", "dropout")


def table(args):
    """One row for each set-up, mean and std over its seeds, as Markdown, beside the paper's; then OUT.notes.md."""
    base = Path(args.out).absolute().parent if args.out else Path.cwd()
    groups = {}
    for path, result in zip(args.runs, read_results(args)):
        config, n = result["training"], result["n"]
        network = (config["depth"], config["width"])
        setup = (result["data"], network, result["eps"], order(config["method"]), text_of(result["flags"]))
        groups.setdefault((*setup, config["epochs"], n), []).append(
            (config["seed"], os.path.relpath(path, base), result)
        )

    def cell(values):
        mean, std = mean_std(values)
        if mean is None:
            return "not run"
        std = "" if std is None else f" ± {std:.1f}"
        run = sum(v is not None for v in values)
        return f"{mean:.1f}{std}" + (f" [{run} of {len(values)}]" if run < len(values) else "")

    rows = []
    for (data, _, eps, (_, method), flags, epochs, n), group in sorted(groups.items()):
        results = [result for *_, result in group]
        paper = PAPER.get((data, method, flags), [None] * 3) if eps == 8 else [None] * 3
        columns = [[r["clean"] for r in results], *zip(*[robust_under(r) for r in results])]
        cells = [cell(c) + (f" ({p:.1f})" if p is not None else "") for c, p in zip(columns, paper)]
        setup = [look(method)[0], flags, data, results[0]["network"], f"{epochs}", f"{eps:g}", f"{n}"]
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
    notes = Path(f"{args.out}.notes.md")  # what is said about the numbers, written by hand
    if args.out and notes.exists():
        lines += ["", *notes.read_text().splitlines()]
    print("\n".join(lines))
    if args.out:
        common.write_text(f"{args.out}.md", "\n".join(lines) + "\n")


COLUMNS = "method,flags,data,network,epochs,eps,n,clean,PGD-50-10,AutoAttack,minutes,hardware,seeds".split(",")
SHORT = ("method", "clean", "PGD-50-10", "seeds")
RESULTS_HEAD = """\
# Results

Made by `python -m paper.figures table` from the JSON files that the last column links to; they hold commands and
versions. Per cent, mean ± std over seeds; [1 of 2] where not every seed was attacked; in brackets what the paper
reports for WRN-28-10 after 30 epochs, four seeds. PGD-50-10 and AutoAttack are run on the first n test images. Minutes
are those of training, by the clock, whatever else the machine was doing.

"""


def main():
    parser = common.Parser(
        prog="python -m paper.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (curves, alignment, landscape, grad_norm, linearity, eps, eta, dropout, table):
        command = function.__name__.replace("_", "-")
        sub = commands.add_parser(command, help=function.__doc__.split("\n")[0])
        add = sub.add_argument
        sub.set_defaults(function=function)
        add("runs", nargs="+", help="JSON files" if function in (eps, eta, dropout, table) else "run folders")
        add("--out", default=None if function is table else command, metavar="NAME", help="default: the command's name")
        if function in (landscape, grad_norm, linearity):
            add("--n", type=common.number(int, 1), default=100, help="the first N test images (default 100)")
            add("--dataset", help="cifar10, cifar100 or an .npz (default: what the run was trained on)")
            add("--data-dir", default="data", help="where cifar10 and cifar100 are (default data)")
            add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
        if function in (landscape, linearity):
            add("--eps", type=common.number(float, 0, 255), default=8, help="in 1/255 (default 8)")
            add("--points", type=common.number(int, 3), default=17, help="along each axis (default 17)")
        if function is landscape:
            add("--seed", type=common.number(int, 0, 2**31), default=0, help="of the random direction (default 0)")
        if function is table:
            add("--short", action="store_true", help="without minutes, hardware, and what all rows have in common")
        if function is linearity:
            add("--layers", default="0,conv1,conv2", help="default 0,conv1,conv2")
    args = parser.parse_args()
    if args.out and not Path(args.out).absolute().parent.is_dir():
        parser.error(f"argument --out: there is no folder {Path(args.out).absolute().parent}")
    if "device" in args:
        args.device = common.find_device(args.device)
    try:
        args.function(args)
    except (KeyError, TypeError, AttributeError) as error:  # from a config.json, metrics.jsonl or result
        common.fail(f"{', '.join(args.runs)}: a file is damaged, or another version wrote it ({error})")


if __name__ == "__main__":
    common.launch(main)
