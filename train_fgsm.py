#!/usr/bin/env python3
"""FGSM adversarial training: every image is replaced by one signed gradient step away from it.

Goodfellow, Shlens & Szegedy 2014, arXiv:1412.6572, section 4 (the step) and 6 (training on it).

    python train_fgsm.py --eps 8

The reference script: the other train_*.py are this one with another method.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 58.4 / 31.4 / 27.9; eps 16: 33.8 / 0.1 / 0.0.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from wrn import WideResNet

PASSES = 5  # forward, backward to the input; then forward, backward to weights and activations (two)


def fgsm(model, x, y, eps, alpha):
    """The images to train on: x' = x + alpha sign(grad_x L), clipped to the eps-ball and to [0, 1].

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units.
    """
    start = x.detach().requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = x + alpha * gradient.sign()
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=common.number(float, 0, 255), help="step size, in 1/255 (default: eps)")
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
                x_adv = fgsm(model, x, y, eps, alpha)
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
