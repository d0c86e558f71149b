"""ZeroGrad: FGSM-RS whose step leaves out the smallest components of the gradient.

Golgooni, Saberi, Eskandar & Rohban 2021, arXiv:2103.15476. They find that catastrophic overfitting sets in where FGSM
takes full steps along components that are as good as zero, and their signs noise.

    python train_zero_grad.py --eps 8

Against train_fgsm_rs.py: two more lines, which zero the components of the gradient below their image's quantile q; a
flag for q; a step of 2 eps. Cost: 5 passes.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 59.0 / 31.4 / 28.2; eps 16: 45.5 / 18.8 / 13.9.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def zero_grad(model, x, y, eps, alpha, q):
    """The images to train on: x0 = x + U(-eps, eps), x' = x0 + alpha sign(g), clipped to the ball.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units.
    Both x0 and x' are clipped to [0, 1].
    g is the gradient at x0, zero where its size is below the quantile q of its image's components.
    """
    start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    threshold = gradient.abs().flatten(1).quantile(q, dim=1).view(-1, 1, 1, 1)
    gradient = gradient * (gradient.abs() >= threshold)
    x_adv = start.detach() + alpha * gradient.sign()
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=2.0, help="step size, in multiples of eps")
    share = "share of components set to zero (default: 0.35; cifar100: 0.45)"
    parser.add_argument("--q", type=number(float, 0, 1), help=share)
    args = common.parse(parser)
    if args.q is None:
        args.q = 0.45 if args.dataset.endswith(("cifar100", "cifar100.npz")) else 0.35
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
                x_adv = zero_grad(model, x, y, eps, args.alpha * eps, args.q)
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
