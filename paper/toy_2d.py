"""The toy of the SLAT paper's Figure 2: what does single-step adversarial training learn when one feature is a trap?

Two classes, N(mu, S) and N(-mu, S) in the plane. The first feature is robust: far apart, but noisy. The second is a
trap: it separates the classes perfectly, by barely more than an attacker within eps = 0.1 can move a point. A network
of two layers is trained in the standard way, with FGSM, and with SLAT, that is with steps in the input and in the
hidden layer (Park & Lee 2021, arXiv:2104.01575, Figure 2 and Algorithm 1 with K = {0, 1}).

    python -m paper.toy_2d --out toy_2d

prints accuracies and how much each network leans on the trap, and draws the decision boundaries. FGSM leans on the trap
more than standard training does: that is right within eps and wrong just beyond. SLAT leans on it less. The worst case
is found by trying a grid over the whole square, so no weak attack can flatter a network.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import console
from paper.figures import check_name, pyplot, write

MU, SIGMA = (0.3, 0.12), (0.15, 0.015)  # robust feature, trap


class Net(nn.Module):
    """Two layers; returns the logit of the second class, (N,), and the hidden layer."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(2, hidden), nn.Linear(hidden, 1)

    def forward(self, x, delta=0.0):
        h = torch.relu(self.first(x))
        return self.second(h + delta)[:, 0], h


def sample(n, seed):
    """x (n, 2), y (n,) in {0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 2, generator=generator) * torch.tensor(SIGMA) + torch.tensor(MU) * (2 * y - 1)[:, None]
    return x, y.float()


def train(x, y, eps, eta, hidden, steps, lr, seed):
    """A network trained with SLAT on all of x, y at every step; with eta 0 that is FGSM, with eps 0 too standard."""
    torch.manual_seed(seed)
    model = Net(hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        start = x.clone().requires_grad_()
        logits, h = model(start)
        g_x, g_h = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, y), [start, h])
        loss = F.binary_cross_entropy_with_logits(model(x + eps * g_x.sign(), eta * g_h.sign())[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, x, y, eps=0.0, points=21):
    """Per cent that is classified right everywhere on a grid over the square of radius eps around it."""
    line = torch.linspace(-eps, eps, points if eps else 1)
    right = torch.ones_like(y, dtype=torch.bool)
    for d in torch.cartesian_prod(line, line).view(-1, 2):
        right &= (model(x + d)[0] > 0) == y.bool()
    return 100 * right.float().mean().item()


def lean(model, x):
    """Per cent of the logit's gradient that lies on the trap: mean of |g_2| / (|g_1| + |g_2|) over x."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[0].sum(), x)
    g = g.abs()
    return 100 * (g[:, 1] / g.sum(1).clamp(min=1e-12)).mean().item()


def picture(models, x, y, eps, rows):
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.4), sharex=True, sharey=True, layout="constrained")
    side = [torch.linspace(-0.85, 0.85, 103), torch.linspace(-0.3, 0.3, 37)]
    grid = torch.cartesian_prod(*side)
    for axis, (name, model) in zip(axes.flat, models.items()):
        with torch.no_grad():
            logits = model(grid)[0].view(103, 37).T
        axis.contourf(*side, logits, levels=[-1e9, 0, 1e9], colors=["#cfe3f2", "#fbe0c3"])
        axis.contour(*side, logits, levels=[0], colors="black", linewidths=1.5)
        for label, colour, marker in ((0, "#0072b2", "o"), (1, "#d55e00", "^")):
            axis.scatter(*x[y == label][:100].T, s=8, c=colour, marker=marker, linewidths=0, label=f"class {label}")
        for sign in (-1, 1):  # what an attacker may do to the middle of a class
            corner = (sign * MU[0] - eps, sign * MU[1] - eps)
            square = {"label": f"within eps = {eps:g} of a mean"} if sign == 1 else {}
            axis.add_patch(plt.Rectangle(corner, 2 * eps, 2 * eps, fill=False, linestyle="--", **square))
        right = ", ".join(f"{row[0]:.0f} % {size}" for size, row in rows[name].items() if size != "lean")
        trap = f"{name}: {rows[name]['lean'][0]:.0f} % of the gradient on the trap"
        axis.set_title(f"{trap}\naccuracy {right}", fontsize=10)
        axis.set(aspect="equal", xlim=(-0.85, 0.85), xticks=[-0.5, 0, 0.5], yticks=[-0.2, 0, 0.2])
    for axis in axes[1]:
        axis.set_xlabel("robust feature: large, noisy")
    for axis in axes[:, 0]:
        axis.set_ylabel("trap: small, exact")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main():
    parser = console.Parser(
        prog="python -m paper.toy_2d", description=__doc__.split("\n")[0], formatter_class=console.Help
    )
    add, number = parser.add_argument, console.number
    add("--eps", type=number(float, 0), default=0.1, help="l-infinity radius, and step of FGSM and SLAT in the input")
    add("--eta", type=number(float, 0), nargs=2, default=[0.1, 0.3], help="two steps of SLAT in the hidden layer")
    add("--hidden", type=number(int, 1), default=100, help="width of the hidden layer")
    add("--n", type=number(int, 2), default=1000, help="training points")
    add("--steps", type=number(int, 1), default=1000, help="gradient steps on all points")
    add("--lr", type=number(float, 0), default=0.1, help="learning rate")
    add("--seeds", type=number(int, 1), default=5, help="networks for each method")
    add("--out", type=console.given, default="toy_2d", metavar="NAME", help="writes NAME.png, NAME.svg and NAME.json")
    args = parser.parse_args()
    check_name(args.out)
    methods = {"standard": (0, 0), "FGSM": (args.eps, 0)}
    methods |= {f"SLAT, eta {eta:g}": (args.eps, eta) for eta in args.eta}
    test, rows, models = sample(4000, 10_000), {}, {}
    sizes = {"clean": 0.0, f"within {args.eps:g}": args.eps, f"within {1.5 * args.eps:g}": 1.5 * args.eps}
    print(" " * 14 + "".join(f"{name:>15}" for name in [*sizes, "on the trap"]) + f"   % ± std of {args.seeds} seeds")
    for name, (eps, eta) in methods.items():
        values = []
        for seed in range(args.seeds):
            model = train(*sample(args.n, seed), eps, eta, args.hidden, args.steps, args.lr, seed)
            values.append([*(accuracy(model, *test, size) for size in sizes.values()), lean(model, test[0])])
            models.setdefault(name, model)
        values = torch.tensor(values, dtype=torch.double)
        found = [[m, s] for m, s in zip(values.mean(0).tolist(), values.std(0, correction=0).tolist())]
        rows[name] = dict(zip([*sizes, "lean"], found))
        print(f"{name:<14}" + "".join(f"{mean:>9.1f} ±{std:4.1f}" for mean, std in found), flush=True)
    figure = picture(models, *sample(args.n, 0), args.eps, rows)
    flags = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out, figure, {"flags": flags, "torch": torch.__version__, "results": rows})
    print("the boundaries are those of seed 0, the numbers means over the seeds")


if __name__ == "__main__":
    console.launch(main)
