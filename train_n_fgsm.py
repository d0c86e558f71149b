#!/usr/bin/env python3
"""N-FGSM: FGSM around a strongly noised image, without clipping back to the eps-ball.

De Jorge et al. 2022, arXiv:2202.01181, Algorithm 1. Not among the comparisons of the SLAT paper.

    python train_n_fgsm.py --eps 8

Against train_fgsm.py: the gradient is taken, and the step starts, at x + U(-2 eps, 2 eps).
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 56.6 / 32.1 / 28.4; eps 16: 41.9 / 20.5 / 15.1.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from wrn import WideResNet

PASSES = 5  # forward, backward to the input; then forward, backward to weights and activations (two)


def n_fgsm(model, x, y, alpha, noise):
    """The images to train on: x0 = x + U(-noise, noise), x' = x0 + alpha sign(grad_x0 L).

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; alpha, noise: in [0, 1] units.
    Both x0 and x' are clipped to [0, 1] alone: x' may lie noise + alpha away from x.
    """
    start = (x + torch.empty_like(x).uniform_(-noise, noise)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = start.detach() + alpha * gradient.sign()
    return x_adv.clamp(0, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=common.number(float, 0, 255), help="step size, in 1/255 (default: eps)")
    parser.add_argument("--noise", type=common.number(float, 0), default=2.0, help="start noise, in multiples of eps")
    args = common.parse(parser)
    args.alpha = args.eps if args.alpha is None else args.alpha
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr_max, weight_decay=args.weight_decay)
    run = Run(args, model, optimizer, data, PASSES)
    if args.compile:
        model.compile()

    eps, alpha = args.eps / 255, args.alpha / 255
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for x, y in data.batches(epoch, args.batch_size, args.seed):
            lr, momentum = common.cyclic(run.step / run.total_steps, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                x_adv = n_fgsm(model, x, y, alpha, args.noise * eps)
                logits = model(x_adv)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    common.launch(main)
