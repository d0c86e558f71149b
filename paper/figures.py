"""The SLAT paper's figures and tables from your own runs, one sub-command each.

    python -m paper.figures curves runs/slat runs/fgsm            Fig. 6: clean and robust accuracy over epochs
    python -m paper.figures alignment runs/slat runs/fgsm         Fig. 6: gradient alignment over epochs
    python -m paper.figures step runs/slat runs/fgsm              accuracy on the way of a single step
    python -m paper.figures landscape runs/slat runs/fgsm         Fig. 4: the loss around test images
    python -m paper.figures grad-norm runs/slat runs/fgsm         Fig. 5: l1 norm of the gradient at every layer
    python -m paper.figures linearity runs/slat runs/fgsm         eq. 6: how far the loss is from linear within a step
    python -m paper.figures told runs/slat runs/slat_hidden       do the signs of SLAT's steps tell the label?
    python -m paper.figures eps results/cpu/*_epochs8_*.json      Fig. 3: robust accuracy over the eps trained for
    python -m paper.figures eta results/cpu/*_epochs8_eps8_*      Fig. 7: accuracy over SLAT's steps
    python -m paper.figures dropout results/cpu/*_epochs8_eps8_*  accuracy over dropout: when SLAT is reliable
    python -m paper.figures table results/[cg]pu/*.json           Tables 1 to 4: mean and std over seeds

The first seven take run folders, the others the files that `eval_attacks.py --json` wrote. Every figure is written as
NAME.png, NAME.svg and NAME.json (the numbers), and says above it what was trained and how many images were attacked;
results/figures/remake.sh has the commands of the committed ones.
"""

import argparse
import io
import json
import math
import os
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import console
import paper.results
from eval_attacks import RUN_FILES, load_model
from paper.results import flags_of, look, order, read_json, read_results, read_run, robust_under, table, text_of
from train_slat import slat
from wrn import LAYERS

ENDS = ("json", "png", "svg")

BAND = "bands: ± 1 standard error"
ACCURACIES = ("clean", "PGD-50-10", "AutoAttack")
RING = {"marker": "o", "markersize": 14, "fillstyle": "none", "linestyle": "none", "zorder": 3}
NOTHING = (math.nan, math.nan)  # a point where nothing was measured
TOLD = (  # what `told` draws: key, marker, its size, name
    ("hidden", "o", 5, "given its hidden steps"),
    ("input", "^", 6, "given its input step"),
    ("no step", "|", 12, "given none"),
)
PEAK = 0.4  # share of the epochs after which the learning rate is highest


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        console.fail("pictures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "savefig.facecolor": "white"}
        | {"figure.max_open_warning": 0, "legend.edgecolor": "none", "legend.framealpha": 1, "svg.hashsalt": "slat"}
        | {"lines.markersize": 5, "lines.linewidth": 1.3}
    )
    return plt


def check_name(name, inputs=(), ends=ENDS):
    """End with one line if the files NAME.end cannot be written or would replace an input."""
    if not os.path.basename(name) or os.path.isdir(name):
        console.fail(f"argument --out: cannot write {name}: it is a folder, name a file in it, without its ending")
    console.check_outputs({f"--out (.{end})": f"{name}.{end}" for end in ends}, inputs)


def write(name, figure, numbers):
    """NAME.json, NAME.png, NAME.svg; if one cannot be written the others are, before the error."""
    errors = []
    for end in ENDS:
        file = io.BytesIO(json.dumps(numbers, indent=1).encode() + b"\n")
        if end != "json":
            figure.savefig(file, format=end, dpi=150, metadata={"Date": None} if end == "svg" else None)
        try:
            console.write_file(f"{name}.{end}", file.getvalue())
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    print(f"wrote {name}.png, {name}.svg, {name}.json")


def legends(paths, configs):
    """[(label, line style)] of runs: a method's name, colour and marker, and those flags that not all runs share.

    A run with such a flag has hollow markers. Runs that are alike in all this have their seeds as markers; if those
    are alike too, the folders' names are the labels, or their paths.
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
        labels[i] += f", seed {configs[i]['seed']}"
        styles[i] |= {"marker": f"${configs[i]['seed']}$", "markersize": 8, "markerfacecolor": styles[i]["color"]}
    for name in (lambda path: Path(path).name, str):
        labels = [name(path) if labels.count(label) > 1 else label for path, label in zip(paths, labels)]
    # To matplotlib a $ begins a formula, and a label that begins with _ is none.
    labels = [f"./{label}" if label.startswith("_") else label.replace("$", r"\$") for label in labels]
    return list(zip(labels, styles))


def legend_below(figure, axis):
    """A legend under the axes, where it hides nothing however many runs there are and however long their names."""
    handles, labels = axis.get_legend_handles_labels()
    rows = math.ceil(len(labels) / max(1, int(8.5 * figure.get_figwidth()) // (max(map(len, labels)) + 5)))
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def caption(figure, configs, ns, note=""):
    """The line above a figure: what was trained, how many images were attacked, and a note."""
    text = paper.results.heading(configs, ns) + f" · {note}" * bool(note)
    lines = textwrap.wrap(text.replace("$", r"\$"), int(14 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=9, color="0.3")


def draw(axis, where, values, n, style, label):
    """A line; if n, of accuracies in per cent, in a band of one standard error of n images to each side."""
    axis.plot(where, values, **style, label=label)
    if n:
        bounds = [[p + side * math.sqrt(max(p * (100 - p) / n, 0)) for p in values] for side in (-1, 1)]
        axis.fill_between(where, *bounds, color=style["color"], alpha=0.15, linewidth=0)


def networks(args):
    """Yield (label, style, network, x, y) for each run; x, y: the first n test images of its data set.

    args.images says which: {"dataset", "n"}, or this for each label if they differ. args.trained is for `caption`.
    """
    configs, used = [read_run(run) for run in args.runs], {}
    for run, config, (label, style) in zip(args.runs, configs, legends(args.runs, configs)):
        model, dataset = load_model(run, args.device), args.dataset or config["dataset"]
        x, y = common.Data(dataset, args.data_dir, args.device, ("test",)).test(args.n)
        if y.max() >= model.arguments["num_classes"]:
            console.fail(f"{dataset} has more than the {model.arguments['num_classes']} classes of {run}")
        used[label] = {"dataset": dataset, "n": len(y)}
        args.trained = configs, [images["n"] for images in used.values()]
        args.images = used if any(images != used[label] for images in used.values()) else used[label]
        yield label, style, model.requires_grad_(False), x, y


def features(model, x, y, names):
    """Yield the images in batches: (x, y, loss (B,), {name: h (B, C, H, W)}, {name: gradient of the loss there})."""
    for part, target in zip(x.split(100), y.split(100)):
        logits, h = model(part.clone().requires_grad_(), return_features=True)
        loss = F.cross_entropy(logits, target, reduction="none")
        found = torch.autograd.grad(loss.sum(), [h[name] for name in names])
        yield part, target, loss.detach(), {name: h[name].detach() for name in names}, dict(zip(names, found))


def step(args):
    """Accuracy at x + t eps sign(grad), t from 0 to 1: a single-step attack takes t = 1 for the worst.

    A network that has collapsed is wrong on the way and right again at the end, which is all that it was trained on.
    """
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    shares = torch.linspace(0, 1, args.points)
    numbers = {"eps": args.eps, "t": shares.tolist(), "accuracy": {}}
    for label, style, model, x, y in networks(args):
        right = torch.zeros(args.points)
        for part, target, _, _, gradient in features(model, x, y, ["0"]):
            for i, t in enumerate(shares):
                with torch.no_grad():
                    logits = model((part + t * args.eps / 255 * gradient["0"].sign()).clamp(0, 1))
                right[i] += (logits.argmax(1) == target).sum().item()
        numbers["accuracy"][label] = (100 * right / len(x)).tolist()
        draw(axis, shares, numbers["accuracy"][label], len(x), style, label)
    axis.set(xlabel=f"t: share of the step of {args.eps:g}/255", ylabel="accuracy at x + t eps sign(grad) (%)")
    axis.set(xlim=(-0.02, 1.02), ylim=(0, None))
    legend_below(figure, axis)
    caption(figure, *args.trained, BAND)
    write(args.out, figure, {"images": args.images} | numbers)


def landscape(args):
    """Mean loss at x + a sign(grad) + b r, r of random signs, for a and b within +-eps (Fig. 4)."""
    plt = pyplot()
    side = torch.linspace(-args.eps, args.eps, args.points)
    numbers = {"eps": args.eps, "seed": args.seed, "side": side.tolist(), "loss": {}}
    for label, _, model, x, y in networks(args):
        total = torch.zeros(args.points, args.points)
        generator = torch.Generator().manual_seed(args.seed)
        for part, target, _, _, gradient in features(model, x, y, ["0"]):
            random = torch.rand(part.shape, generator=generator).to(part).sub(0.5).sign()
            with torch.no_grad():
                for i, a in enumerate(side / 255):
                    for j, b in enumerate(side / 255):
                        # No clipping to [0, 1]: it would bend the surface where the loss is straight.
                        logits = model(part + a * gradient["0"].sign() + b * random)
                        total[i, j] += F.cross_entropy(logits, target, reduction="sum").item()
        numbers["loss"][label] = (total / len(x)).tolist()
    surfaces = {label: torch.tensor(surface).T for label, surface in numbers["loss"].items()}
    size = (max(8, 2.6 * len(surfaces)), 3)
    figure, axes = plt.subplots(1, len(surfaces), figsize=size, sharey=True, squeeze=False, layout="constrained")
    every = torch.stack(list(surfaces.values()))
    levels = plt.MaxNLocator(20, steps=[1, 2, 5, 10]).tick_values(every.min().item(), every.max().item())
    for axis, (label, surface) in zip(axes[0], surfaces.items()):
        shades = axis.contourf(side, side, surface, levels, cmap="viridis")
        axis.contour(side, side, surface, levels, colors="white", linewidths=0.4)
        axis.set(title=textwrap.fill(label, 24), xlabel="sign of gradient (1/255)", aspect="equal")
    axes[0][0].set_ylabel("random signs (1/255)")
    figure.colorbar(shades, ax=axes[0].tolist(), label="mean loss", shrink=0.8)
    caption(figure, *args.trained)
    write(args.out, figure, {"images": args.images} | numbers)


def grad_norm(args):
    """Mean l1 norm of an image's loss gradient at every layer's output h (Fig. 5); next to it, times the mean of |h|.

    The norm by itself depends on the scale of h, to which BatchNorm makes the next layer blind; the product does not.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    numbers = {"l1": {}, "mean_abs_h": {}, "l1_times_mean_abs_h": {}}
    for label, style, model, x, y in networks(args):
        sums = torch.zeros(3, len(LAYERS))
        for _, _, _, h, gradient in features(model, x, y, LAYERS):
            for k, name in enumerate(LAYERS):
                norm, size = gradient[name].abs().sum((1, 2, 3)), h[name].abs().mean((1, 2, 3))
                sums[:, k] += torch.stack([norm, size, norm * size]).sum(1).cpu()
        for key, values in zip(numbers, (sums / len(x)).tolist()):
            numbers[key][label] = dict(zip(LAYERS, values))
        for axis, key in zip(axes, ("l1", "l1_times_mean_abs_h")):
            axis.plot(LAYERS, numbers[key][label].values(), **style, label=label)
    for axis, ylabel in zip(axes, ("l1 norm of the loss gradient at h", "that times the mean of |h|")):
        axis.set(xlabel="layer whose output is h (0: the input)", ylabel=ylabel)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_minor_formatter("")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(0)
    legend_below(figure, axes[0])
    caption(figure, *args.trained)
    write(args.out, figure, {"images": args.images} | numbers)


def linearity(args):
    """Mean |L(h_k + d) - L(h_k) - <grad, d>|, d = s sign(grad): the error of the model behind a single step.

    For steps s up to eps; below, up to 5 % of the mean of |h_k|, as BatchNorm makes the next layer blind to its scale.
    """
    names = LAYERS[:3]
    size = (max(5, 2.7 * len(names)), 5.4)
    figure, axes = pyplot().subplots(2, len(names), figsize=size, squeeze=False, layout="constrained")
    steps = [torch.linspace(0, top, args.points)[1:] for top in (args.eps, 5)]
    numbers = {"eps": steps[0].tolist(), "share": steps[1].tolist(), "error": {}, "error_of_share": {}}
    for label, style, model, x, y in networks(args):
        errors = torch.zeros(2, len(names), args.points - 1)
        for part, target, loss, h, gradient in features(model, x, y, names):
            for k, name in enumerate(names):
                g, size = gradient[name], h[name].abs().mean((1, 2, 3), keepdim=True)
                for u, unit in enumerate((1 / 255, size / 100)):
                    for i, step in enumerate(steps[u]):
                        d = step * unit * g.sign()
                        with torch.no_grad():
                            after = F.cross_entropy(model(part, delta={name: d}), target, reduction="none")
                        errors[u, k, i] += (after - loss - (g * d).sum((1, 2, 3))).abs().sum().item() / len(x)
        for u, key in enumerate(("error", "error_of_share")):
            numbers[key][label] = dict(zip(names, errors[u].tolist()))
            for axis, values in zip(axes[u], errors[u]):
                axis.plot(steps[u], values, **style, label=label, markevery=3)
    for row, xlabel in zip(axes, ("step (1/255)", "step (% of mean |h|)")):
        row[0].set_ylabel("mean error\nof the linear model")
        for axis, name in zip(row, names):
            axis.set(xlabel=xlabel, title="input" if name == "0" else name, ylim=(0, None))
    legend_below(figure, axes[0][0])
    caption(figure, *args.trained)
    write(args.out, figure, {"images": args.images} | numbers)


def read_by_probe(signs, labels):
    """How often, in per cent, a linear probe fitted on the first half of `signs` names the labels of the second.

    signs: (N, ...); labels: (N,). The probe is ridge regression on the one-hot labels, penalty 0.1, in its dual form,
    which has as many unknowns as images.
    """
    half, rows = len(labels) // 2, signs.flatten(1) / math.sqrt(signs[0].numel())
    kernel = rows @ rows[:half].T
    targets = F.one_hot(labels[:half]).float() - 1 / (labels.max() + 1)
    weights = torch.linalg.solve(kernel[:half] + 0.1 * torch.eye(half, device=rows.device), targets)
    return 100 * ((kernel[half:] @ weights).argmax(1) == labels[half:]).float().mean().item()


def said(model, x, x_adv, delta, classes):
    """Does the network say `classes` (N,), given no step, the input's, the hidden ones, both? Booleans (4, N)."""
    given = ((x, {}), (x_adv, {}), (x, delta), (x_adv, delta))
    with torch.no_grad():
        return torch.stack([model(images, delta=steps).argmax(1) == classes for images, steps in given])


def told(args):
    """Do the signs of SLAT's steps tell a class, and does the network heed them?

    Left: PGD-10 accuracy after the last epoch, a point for each run. Right, for the runs whose network is there: how
    often it says another image's label, given that image's hidden steps, its step in the input, or none. In the JSON
    also: how often a linear probe reads from the signs of hidden steps the class that they were taken against, which is
    the image's own or a wrong one, drawn at random.
    """
    configs, numbers = [read_run(run) for run in args.runs], {}
    labels = [label.partition(", seed ")[0] for label, _ in legends(args.runs, configs)]
    labels = [label.replace("SLAT variant", "SLAT").replace("hidden ", "--hidden ") for label in labels]
    if any("dropout" in label for label in labels):  # then the default is worth a word, too
        labels = [f"{x}, dropout {c['dropout']:g}" if "dropout" not in x else x for x, c in zip(labels, configs)]
    rows = {label: row for row, label in enumerate(reversed(dict.fromkeys(labels)))}
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 1.8 + 0.3 * len(rows)), sharey=True, layout="constrained")
    for run, label, config in zip(args.runs, labels, configs):
        last = read_json(Path(run) / "metrics.jsonl", {"test_pgd10"})[-1]
        numbers[run] = {"label": label, "seed": config["seed"], "test_pgd10": last["test_pgd10"]}
        colour = look(config["method"])[1]
        axes[0].plot(last["test_pgd10"], rows[label], "o", color=colour, alpha=0.6, clip_on=False)
    args.runs = [run for run in args.runs if (Path(run) / "model.pt").exists()]
    if not args.runs:
        console.fail("none of these runs has its network, model.pt")
    for run, (_, style, model, x, y) in zip(list(args.runs), networks(args)):
        number, generator = model.arguments["num_classes"], torch.Generator().manual_seed(args.seed)
        wrong = (y + torch.randint(1, number, y.shape, generator=generator).to(y.device)) % number
        targets, eps = {"its label": y, "a wrong class": wrong}, args.eps / 255
        heard, signs = {kind: [] for kind in (*targets, "another image's label")}, {kind: [] for kind in targets}
        for kind, target in targets.items():
            for part, classes in zip(x.split(100), target.split(100)):
                x_adv, delta = slat(model, part, classes, eps, ["0", "conv1", "conv2"], eps, 0.9 * eps)
                signs[kind].append(torch.stack([delta["conv1"], delta["conv2"]], 1).sign())
                heard[kind].append(said(model, part, x_adv, delta, classes))
                if kind == "its label":  # and the next image in the batch hears it, where that has another label
                    x_adv = (part + (x_adv - part).roll(1, 0)).clamp(0, 1)
                    delta, others = {name: steps.roll(1, 0) for name, steps in delta.items()}, classes.roll(1)
                    found = said(model, part, x_adv, delta, others)
                    heard["another image's label"].append(found[:, others != classes])
        for kind, found in heard.items():
            found = torch.cat(found, 1)
            counts = zip(("no step", "input", "hidden", "both"), found.sum(1).tolist())
            numbers[run][kind] = {name: 100 * count / max(found.shape[1], 1) for name, count in counts}
        for kind, target in targets.items():
            numbers[run][kind]["read by the probe"] = read_by_probe(torch.cat(signs[kind]), target)
        for key, marker, size, _ in TOLD:
            where = numbers[run]["another image's label"][key], rows[numbers[run]["label"]]
            axes[1].plot(*where, marker, color=style["color"], alpha=0.6, markersize=size)
    axes[0].set(yticks=list(rows.values()), yticklabels=list(rows), xlim=(0, None), ylim=(-0.6, len(rows) - 0.4))
    axes[0].set_xlabel("PGD-10 accuracy (%)")
    axes[1].set(xlim=(0, None), xlabel=f"says another's label (%)\nn = {len(y)} images")
    for *_, marker, size, label in TOLD:
        axes[1].plot([], [], marker, color="0.4", markersize=size, label=label)
    legend_below(figure, axes[1])
    caption(figure, configs, [config["monitor"] for config in configs])
    write(args.out, figure, {"eps": args.eps, "seed": args.seed, "images": args.images, "runs": numbers})


def over_epochs(args):
    """What was measured after every epoch (Fig. 6).

    curves: accuracy on test images, clean and under PGD-10. Of a run that collapses (catastrophic overfitting), which
    means that it withstands FGSM only, also the accuracy under FGSM. A ring is around the epoch whose weights such a
    run keeps in best.pt: what it has if stopped in time.
    alignment: mean cosine of the gradients at x and at a random point within eps, on test images.
    """
    curves, plt = args.command == "curves", pyplot()
    keys = ["test_clean", "test_pgd10", "test_fgsm"] if curves else ["alignment"]
    configs, size = [read_run(run) for run in args.runs], (8, 3.8) if curves else (7, 4)
    figure, axes = plt.subplots(1, 1 + curves, figsize=size, squeeze=False, layout="constrained")
    axes = axes[0]
    numbers, rings, lengths = {}, False, {config["epochs"] for config in configs}
    end = 1 if len(lengths) > 1 else max(lengths)
    for run, config, (label, style) in zip(args.runs, configs, legends(args.runs, configs)):
        rows = read_json(Path(run) / "metrics.jsonl", {"epoch", "train_pgd10", "warning", *keys})
        if not rows:
            console.fail(f"{run}/metrics.jsonl is empty: no epoch has ended")
        # Free-AT and YOPO take fewer epochs than the others; then, as a fraction of all.
        where = [row["epoch"] / (config["epochs"] if len(lengths) > 1 else 1) for row in rows]
        best = max(range(len(rows)), key=lambda i: rows[i]["train_pgd10"])  # where bookkeeping.Run wrote best.pt
        n = min(config["monitor"], (config.get("data") or {"test": 10_000})["test"])
        numbers[label] = {"epochs": config["epochs"], "n": n, "best_epoch": rows[best]["epoch"]}
        numbers[label] |= {key: [row[key] for row in rows] for key in ("epoch", *keys)}
        # Collapsed is what ends so: NuAT, for one, may be warned of early and recover.
        first = next((i for i, row in enumerate(rows) if row["warning"]), None) if rows[-1]["warning"] else None
        for key, axis in zip(keys, axes):
            # Most cosines are near 1: the axis is logarithmic in what is missing to 1.
            values = numbers[label][key] if curves else [max(1 - cosine, 1e-3) for cosine in numbers[label][key]]
            draw(axis, where, values, n if curves else None, style, label)
            if first is not None:
                axis.plot(where[best], values[best], **RING, color=style["color"])
        if first is not None:
            rings, left, since = True, where[first] > 0.9 * end, slice(max(first - 1, 0), None)
            place = {"ha": "right", "va": "bottom" if curves else "top"} if left else {}
            place |= {"xytext": (-8, 0) if left else (5, 5), "textcoords": "offset points", "fontsize": 9}
            axis.annotate("collapses", (where[first], values[first]), **place, color=style["color"])
            if curves:
                axis.plot(where[since], numbers[label]["test_fgsm"][since], ":", **style)
    if rings:
        axes[0].plot([], [], **RING, color="0.4", label="best epoch")
        axes[0].plot([], [], ":", color="0.4", label="FGSM instead of PGD-10, if collapsed") if curves else None
    for axis, title in zip(axes, ("clean", "under attack: PGD-10")):
        axis.axvline(PEAK * end, color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel="fraction of training" if end == 1 else "epoch", xlim=(0, 1.02 * end))
        if curves:
            axis.set(title=title, ylim=(0, 1.08 * axis.get_ylim()[1]))
    axes[0].set_ylabel("accuracy (%)" if curves else "gradient alignment (cosine)")
    if not curves:
        ticks = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{1 - tick:g}" for tick in ticks])
        axis.yaxis.set_minor_locator(plt.NullLocator())
        axis.margins(y=0.08)
        axis.invert_yaxis()
    top = axes[0].get_ylim()[1]
    axes[0].text(PEAK * end, top, " highest learning rate", color="0.4", va="top", fontsize=9)
    legend_below(figure, axes[0])
    caption(figure, configs, [found["n"] for found in numbers.values()], BAND if curves else "axis: log(1 - cosine)")
    write(args.out, figure, numbers)


def series(result, flag):
    """(label, colour, marker) of a result in a figure over a flag; None if other flags are not at their defaults."""
    config, own = result["training"], set(result["flags"]) - {flag}
    label, colour, marker = look(config["method"])
    if flag in config and own == {"best epoch"}:
        return f"{label}, best epoch", colour, "X"
    if flag == "eta" and own == {"input_step"} and config["input_step"] == config["eta"]:
        return f"{label}, input step = eta", "#56b4e9", "D"
    if own or flag not in config:
        return None
    return f"{label}, input step {config['input_step']:g}" if flag == "eta" else label, colour, marker


def over_flag(args):
    """Accuracy over a training flag, all others at their defaults: a point for each run, a line through the lowest.

    Side by side where they would hide each other. What was measured at one value only has no panel.
    eps: of training and attack (Fig. 3). eta: SLAT's latent step; the input's is at its default or the same (Fig. 7).
    """
    flag, plt = args.command, pyplot()
    groups, kinds = {}, {}
    for result in read_results(args):
        who, config = series(result, flag), result["training"]
        if who:
            groups.setdefault((order(config["method"]), who), {}).setdefault(config[flag], []).append(result)
            kind = f"{result['network']} on {result['n']} images of {result['data']}"
            kind += f" at eps {result['eps']:g}" if flag != "eps" else ""
            kind += f", {result['attack']}" if result["attack"] else ""
            kinds.setdefault("", {})[kind, result["data_key"]] = kind
            kinds.setdefault(who, {})[config["epochs"]] = f"{who[0]} after {config['epochs']} epochs"
    if not groups:
        console.fail(f"none of these networks was trained with --{flag} and the other flags at their defaults")
    for found in kinds.values():
        if len(found) > 1:
            found = ", ".join(sorted(found.values()))
            console.fail(f"the results differ in more than {flag}: {found}; give those of one kind")
    numbers, runs, measured = {}, [], {name: set() for name in ACCURACIES}
    for (_, (label, *_)), by_value in sorted(groups.items()):
        numbers[label] = {flag: sorted(by_value)} | {name.lower(): [] for name in ACCURACIES}
        for value in sorted(by_value):
            runs += by_value[value]
            for name, found in zip(ACCURACIES, zip(*((run["clean"], *robust_under(run)) for run in by_value[value]))):
                numbers[label][name.lower()].append([accuracy for accuracy in found if accuracy is not None])
                measured[name] |= {value} if numbers[label][name.lower()][-1] else set()
    ticks = sorted(measured["clean"])
    shown = [name for name in ACCURACIES if len(measured[name]) >= min(2, len(ticks))]
    figure, axes = plt.subplots(1, len(shown), figsize=(8, 3.3), layout="constrained", squeeze=False)
    gap = min((b - a for a, b in zip(ticks, ticks[1:])), default=1) * 0.5 / len(groups)
    for axis, name in zip(axes[0], shown):
        for i, (_, (label, colour, marker)) in enumerate(sorted(groups)):
            # Next to each other, so that none hides another one.
            places = [value + gap * (i - (len(groups) - 1) / 2) for value in numbers[label][flag]]
            found = zip(places, numbers[label][name.lower()])
            points = [[(x + gap * (k - len(y) / 2) / 6, y[k]) for k in range(len(y))] or [NOTHING] for x, y in found]
            axis.plot(*zip(*sum(points, [])), marker, color=colour, clip_on=False, label=label)
            axis.plot(*zip(*[min(seeds, key=lambda point: point[1]) for seeds in points]), color=colour, alpha=0.5)
        xlabel = {"eps": "eps (1/255)", "eta": "eta (multiples of eps)"}.get(flag, flag)
        axis.set(title=name, xlabel=xlabel, xticks=ticks, ylim=(0, None))
    axes[0][0].set_ylabel("accuracy (%)")
    legend_below(figure, axes[0][0])
    caption(figure, [run["training"] for run in runs], [run["n"] for run in runs], "line: lowest run")
    write(args.out, figure, numbers)


COMMANDS = {"curves": over_epochs, "alignment": over_epochs, "step": step, "landscape": landscape}
COMMANDS |= {"grad-norm": grad_norm, "linearity": linearity, "told": told}
COMMANDS |= dict.fromkeys(("eps", "eta", "dropout"), over_flag) | {"table": table}


def main():
    parser = console.Parser(
        prog="python -m paper.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands, number = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), console.number
    for command, function in COMMANDS.items():
        add = commands.add_parser(command, description=function.__doc__).add_argument
        files = "JSON files" if function in (over_flag, table) else "run folders"
        add("runs", nargs="+", type=console.given, help=files)
        name, text = (None, "default: only print") if function is table else (command, "default: the command's name")
        add("--out", type=console.given, default=name, metavar="NAME", help=text)
        if function in (step, landscape, grad_norm, linearity, told):
            add("--n", type=number(int, 1), default=100, help="the first N test images (default 100)")
            dataset = "cifar10, cifar100 or an .npz (default: what the run was trained on)"
            add("--dataset", type=console.given, help=dataset)
            add("--data-dir", type=console.given, default="data", help="where cifar10 and cifar100 are (default data)")
            add("--device", type=console.given, default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
        if function in (step, landscape, linearity, told):
            add("--eps", type=number(float, 0, 255), default=8, help="in 1/255 (default 8)")
        if function in (step, landscape, linearity):
            add("--points", type=number(int, 3), default=17, help="along each axis (default 17)")
        if function in (landscape, told):
            what = "direction" if function is landscape else "classes"
            add("--seed", type=number(int, 0, 2**31), default=0, help=f"of the random {what} (default 0)")
    args = parser.parse_args()
    named = {os.path.realpath(run): run for run in args.runs}
    if len(named) < len(args.runs):
        console.note("what is named twice counts once")
    args.runs, files = list(named.values()), COMMANDS[args.command] in (over_flag, table)
    inputs = args.runs if files else [os.path.join(run, file) for run in args.runs for file in RUN_FILES]
    if args.command != "table":
        check_name(args.out, [*inputs, *filter(None, [getattr(args, "dataset", None)])])
    elif args.out:
        check_name(args.out, [*inputs, f"{args.out}.notes.md"], ("md",))
    if "device" in args:
        args.device = common.find_device(args.device)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    console.launch(main)
