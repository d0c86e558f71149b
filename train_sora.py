"""SORA: FGSM from a random start, by steps of random length, that shorten where gradients before and after disagree.

Teymourian, Moslemi, Rahmani & Rohban, ICML 2026, arXiv:2606.00738. v, a running mean of how far the gradient keeps its
signs, is 1 where the loss is linear: the step is then 2 eps, and the images are up to 3 eps away, as N-FGSM's. The code
has 2 eps min(1, 0.02 / (1 - v)); the paper, as others quote it, min(2 eps, 0.02 / (1 - v)): --absolute, which shortens
far later.

    python train_sora.py --eps 8

Against train_fgsm.py: the start, the step, and v, from the gradient at x_adv that the loss leaves. No dropout by
default: its masks alone would make the two gradients disagree. Cost: 5 passes, and the gradient at x_adv.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 56.6 / 34.5 / 30.4; eps 16: 41.9 / 22.1 / 15.7.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def sora(model, x, y, eps, v, alpha_0=0.02, absolute=False):
    """The images to train on, x' = x0 + alpha r sign(g), r ~ U(0, 1) for each pixel, and g, the gradient at x0.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps: in [0, 1] units; v: a tensor. x0 = x + U(-eps, eps).
    alpha = 2 eps min(1, alpha_0 / (1 - v)), or min(2 eps, alpha_0 / (1 - v)). x0 and x' are clipped to [0, 1] only.
    """
    start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    ratio = alpha_0 / (1 - v)
    alpha = ratio.clamp(max=2 * eps) if absolute else 2 * eps * ratio.clamp(max=1)
    x_adv = start.detach() + alpha * torch.rand_like(x) * gradient.sign()
    return x_adv.clamp(0, 1), gradient


def agreement(v, before, after, decay=0.95):
    """v for the next batch: its mean with <sign(g), g'> / ||g||_1, the mean over images, clipped to [-1, 1].

    before, after: the gradients g at x0 and g' at x', (B, C, H, W).
    """
    kept = (before.sign() * after).flatten(1).sum(1) / before.abs().flatten(1).sum(1).clamp(min=1e-12)
    return decay * v + (1 - decay) * kept.mean().clamp(-1, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(dropout=0.0)
    parser.add_argument("--alpha-0", type=number(float, 0), default=0.02, help="the step is this / (1 - v), at most")
    parser.add_argument("--absolute", action="store_true", help="alpha-0 in the units of images, not of 2 eps")
    return common.parse(parser)


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=common.layout(args.device))
    weights, fused = model.parameters(), args.device.startswith("cuda")
    optimizer = torch.optim.SGD(weights, lr=args.lr_max, momentum=0.9, weight_decay=args.weight_decay, fused=fused)
    run = Run(args, model, optimizer, data, extra={"v": torch.tensor(0.99, device=args.device)})
    eps, steps = args.eps / 255, data.steps(args.batch_size)
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                x_adv, gradient = sora(model, x, y, eps, run.extra["v"], args.alpha_0, args.absolute)
                logits = model(x_adv.requires_grad_())
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
            run.extra["v"] = agreement(run.extra["v"], gradient, x_adv.grad)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
