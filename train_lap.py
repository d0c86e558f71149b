"""LAP, layer-aware perturbation: N-FGSM with weights that have moved, those of the first layers most.

Lin et al. 2024 (ICML), arXiv:2405.16262: in a collapse the first layers distort first. SLAT perturbs what they put out,
LAP their weights. Follows the authors' code, whose weights go *down* the loss and are never moved back; --ascend: up.

    python train_lap.py --eps 8

Against train_n_fgsm.py: `nudge`, before the loss. No dropout, as in its code. R-LAP, V-LAP: docs/methods.md. 6 passes.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 56.0 / 34.0 / 30.5; eps 16: 40.8 / 22.2 / 17.0.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, note, number
from wrn import WideResNet


def lap(model, x, y, eps, alpha, noise, project=False):
    """The images to train on, as n_fgsm's, and the gradient of {name: weight} at x0 = x + U(-noise, noise).

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha, noise: in [0, 1] units. project: clip x' to the
    eps-ball (R-LAP). The weights are those with more than one dimension: of convolutions and of the linear layer.
    """
    weights = {name: w for name, w in model.named_parameters() if w.dim() > 1 and w.requires_grad}
    start = (x + torch.empty_like(x).uniform_(-noise, noise)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    gradient, *gradients = torch.autograd.grad(loss, [start, *weights.values()])
    x_adv = start.detach() + alpha * gradient.sign()
    x_adv = torch.clamp(x_adv, x - eps, x + eps) if project else x_adv
    return x_adv.clamp(0, 1), dict(zip(weights, gradients))


@torch.no_grad()
def nudge(model, gradients, optimizer, beta, gamma=0.3):
    """Move weight k of L, in place and for good, by beta (1 - (ln k / ln L)^gamma) ||w||, along the optimiser's step.

    optimizer: SGD, whose step on these gradients would go that way; it stays as it is. gamma: of the authors' README.
    """
    group, layers = optimizer.param_groups[0], torch.arange(1, len(gradients) + 1)
    shares = 1 - (layers.log() / layers[-1].log()) ** gamma
    for share, (name, gradient) in zip(shares.tolist(), gradients.items()):
        w = model.get_parameter(name)
        velocity = optimizer.state.get(w, {}).get("momentum_buffer", 0)
        step = -(gradient + group["weight_decay"] * w + group["momentum"] * velocity)
        w += beta * share * w.norm() / (step.norm() + 1e-20) * step


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(dropout=0.0)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.0, help="step size, in multiples of eps")
    parser.add_argument("--noise", type=number(float, 0, 4), default=2.0, help="start noise, in multiples of eps")
    parser.add_argument("--project", action="store_true", help="clip the images to the eps-ball")
    parser.add_argument("--beta", type=number(float, 0), help="of the weights (default: N-LAP's at the nearest eps)")
    parser.add_argument("--ascend", action="store_true", help="move the weights up the loss")
    args = common.parse(parser)
    table = {8: 0.001, 12: 0.002, 16: 0.005, 32: 0.75}
    nearest = min(table, key=lambda eps: abs(eps - args.eps))
    if args.beta is None and (args.eps, args.noise) != (nearest, 2):
        note(f"taking the authors' beta for eps {nearest} and --noise 2: they name none, or another, for these")
    args.beta = table[nearest] if args.beta is None else args.beta
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=common.layout(args.device))
    weights, fused = model.parameters(), args.device.startswith("cuda")
    optimizer = torch.optim.SGD(weights, lr=args.lr_max, momentum=0.9, weight_decay=args.weight_decay, fused=fused)
    run = Run(args, model, optimizer, data)
    eps, steps = args.eps / 255, data.steps(args.batch_size)
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                x_adv, gradients = lap(model, x, y, eps, args.alpha * eps, args.noise * eps, args.project)
            nudge(model, gradients, optimizer, -args.beta if args.ascend else args.beta)
            with common.autocast(args):  # anew: it would go on with its copies of the old weights
                logits = model(x_adv)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
