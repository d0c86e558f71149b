#!/usr/bin/env python3
"""The toy of the SLAT paper's Figure 2: what does single-step adversarial training learn when one feature is a trap?

Two classes, N(mu, S) and N(-mu, S) in the plane. The first feature is robust: it separates the classes by more than an
attacker within eps = 0.1 can bridge, but noisily. The second is a trap: it separates them perfectly, by less than eps.
A two-layer network is trained in the standard way, with FGSM, and with SLAT on the input and the hidden layer
(Park & Lee 2021, arXiv:2104.01575, Figure 2 and Algorithm 1 with K = {0, 1}).

    python toy_2d.py --out toy_2d

prints accuracies and how much each network leans on the trap, and draws the boundaries into toy_2d.png and .svg.
The worst case within eps is found by trying a grid of the whole square, so no attack can flatter a network.
"""

import argparse
import json

import torch
import torch.nn as nn
import torch.nn.functional as F

MU, SIGMA = (0.3, 0.05), (0.15, 0.015)  # robust feature, trap
METHODS = ("standard", "fgsm", "slat")


class Net(nn.Module):
    """Two layers; logits of the second class, (N,)."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(2, hidden), nn.Linear(hidden, 1)

    def forward(self, x, delta=None):
        h = torch.relu(self.first(x))
        return self.second(h if delta is None else h + delta)[:, 0], h


def sample(n, seed):
    """x (n, 2), y (n,) in {0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 2, generator=generator) * torch.tensor(SIGMA) + torch.tensor(MU) * (2 * y - 1)[:, None]
    return x, y.float()


def train(method, x, y, eps, eta, hidden, steps, lr, seed):
    """A network trained on all of x, y at every step; eta: of SLAT's hidden layer."""
    torch.manual_seed(seed)
    model = Net(hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        x_adv, delta = x, None
        if method != "standard":
            start = x.clone().requires_grad_()
            logits, h = model(start)
            g_x, g_h = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, y), [start, h])
            x_adv = x + eps * g_x.sign()
            delta = eta * g_h.sign() if method == "slat" else None
        loss = F.binary_cross_entropy_with_logits(model(x_adv, delta)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, x, y, eps=0.0, points=21):
    """Per cent right at the worst point of a grid over the square of radius eps around each point."""
    line = torch.linspace(-eps, eps, points if eps else 1)
    right = torch.ones_like(y, dtype=torch.bool)
    for d in torch.cartesian_prod(line, line):
        right &= (model(x + d)[0] > 0) == y.bool()
    return 100 * right.float().mean().item()


def lean(model, x):
    """Per cent of the logit's gradient that lies on the trap, mean of |g_2| / (|g_1| + |g_2|) over x."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[0].sum(), x)
    g = g.abs()
    return 100 * (g[:, 1] / g.sum(1).clamp(min=1e-12)).mean().item()


def draw(models, x, y, eps, rows, path):
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("toy_2d.py: no matplotlib, no picture: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"standard": "standard training", "fgsm": "FGSM", "slat": "SLAT"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
    side = [torch.linspace(-0.9, 0.9, 300), torch.linspace(-0.3, 0.3, 300)]
    grid = torch.cartesian_prod(*side)
    for axis, method in zip(axes, models):
        with torch.no_grad():
            p = torch.sigmoid(models[method](grid)[0]).view(300, 300).T
        axis.contourf(*side, p, levels=[0, 0.5, 1], colors=["#cfe3f2", "#fbe0c3"])
        axis.contour(*side, p, levels=[0.5], colors="black", linewidths=1.5)
        for label, colour, marker in ((0, "#0072b2", "o"), (1, "#d55e00", "^")):
            points = x[y == label][:150].T
            axis.scatter(*points, s=9, c=colour, marker=marker, linewidths=0, label=f"class {label}")
        row = rows[method]
        axis.set_title(
            f"{names[method]}\nclean {row['clean'][0]:.0f} %, within eps {row['robust'][0]:.0f} %", fontsize=11
        )
        axis.set_xlabel("robust feature")
    # What an attacker may do to one point.
    axes[0].add_patch(plt.Rectangle((-0.85, -0.27), 2 * eps, 2 * eps, fill=False, linewidth=1))
    axes[0].text(-0.85 + 2 * eps + 0.03, -0.27 + eps, f"eps = {eps:g}", va="center", fontsize=9)
    axes[0].set_ylabel("trap: small, predictive feature")
    axes[0].legend(loc="upper left", fontsize=9, frameon=False)
    for end in ("png", "svg"):
        figure.savefig(f"{path}.{end}", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--eps", type=float, default=0.1, help="l-infinity radius, and FGSM's and SLAT's input step (default 0.1)")
    add("--eta", type=float, default=0.1, help="SLAT's step in the hidden layer (default 0.1)")
    add("--hidden", type=int, default=100, help="width of the hidden layer (default 100)")
    add("--n", type=int, default=1000, help="training points (default 1000)")
    add("--steps", type=int, default=1000, help="gradient steps on all points (default 1000)")
    add("--lr", type=float, default=0.1, help="learning rate (default 0.1)")
    add("--seeds", type=int, default=5, help="networks of each method (default 5)")
    add("--out", default="toy_2d", metavar="NAME", help="writes NAME.png, NAME.svg and NAME.json (default toy_2d)")
    args = parser.parse_args()
    test = sample(4000, 10_000)
    rows, shown = {}, {}
    print(f"{'':<10}{'clean %':>14}{'within eps %':>16}{'lean on trap %':>18}   (mean and std of {args.seeds} seeds)")
    for method in METHODS:
        values = []
        for seed in range(args.seeds):
            data = sample(args.n, seed)
            model = train(method, *data, args.eps, args.eta, args.hidden, args.steps, args.lr, seed)
            values.append([accuracy(model, *test), accuracy(model, *test, args.eps), lean(model, test[0])])
            shown.setdefault(method, model)
        values = torch.tensor(values)
        mean, std = values.mean(0).tolist(), values.std(0, correction=0).tolist()
        rows[method] = {key: [mean[i], std[i]] for i, key in enumerate(("clean", "robust", "lean"))}
        print(f"{method:<10}" + "".join(f"{m:>{w}.1f} +-{s:4.1f}" for m, s, w in zip(mean, std, (7, 9, 11))))
    with open(f"{args.out}.json", "w") as file:
        json.dump({"flags": vars(args), "torch": torch.__version__, "results": rows}, file, indent=1)
    draw(shown, *sample(args.n, 0), args.eps, rows, args.out)
    print(f"wrote {args.out}.png, {args.out}.svg, {args.out}.json; the picture shows seed 0")


if __name__ == "__main__":
    main()
