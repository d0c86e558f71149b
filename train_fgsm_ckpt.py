#!/usr/bin/env python3
"""FGSM-CKPT: train on the shortest of a few steps along the FGSM-RS direction that already fools the network.

Kim, Lee & Lee 2021 (AAAI), arXiv:2010.01799, Algorithm 1. Against catastrophic overfitting, which they find
in networks that are fooled half-way to the perturbation they were trained on, and no longer at its end.

    python train_fgsm_ckpt.py --eps 8

Against train_fgsm.py: FGSM-RS, then forward passes that choose how far each image goes. The gradient is taken
in train mode like every method's here (the authors' own code takes it in eval mode).
"""

import torch
import torch.nn.functional as F

import common
from wrn import WideResNet

PASSES = 6.5  # FGSM's 5; a forward pass of the clean images, and c - 1 of the ever fewer undecided ones


def fgsm_ckpt(model, x, y, eps, alpha, checkpoints):
    """The images to train on: x + (k / c) d, with the smallest k in 0..c that is misclassified, else k = c.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units; checkpoints: c.
    d is the perturbation of FGSM-RS. Candidates are judged in eval mode, which leaves BatchNorm's statistics
    alone, and only for images that no smaller k has decided.
    """
    start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    model.requires_grad_(False)  # the attack needs no gradients of weights
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    model.requires_grad_(True)
    x_adv = start.detach() + alpha * gradient.sign()
    x_adv = torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)

    direction, mode = x_adv - x, model.training
    undecided = torch.arange(len(x), device=x.device)
    model.eval()
    with torch.no_grad():
        for k in range(checkpoints):
            candidate = x[undecided] + k / checkpoints * direction[undecided]
            fooled = model(candidate).argmax(1) != y[undecided]
            x_adv[undecided[fooled]] = candidate[fooled]
            undecided = undecided[~fooled]
            if not len(undecided):
                break
    model.train(mode)
    return x_adv


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=common.number(float, 0, 510), help="step size, in 1/255 (default: 1.25 eps)")
    parser.add_argument("--checkpoints", type=common.number(int, 1), default=3, help="c, how many steps to choose from")
    args = common.parse(parser)
    args.alpha = 1.25 * args.eps if args.alpha is None else args.alpha
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr_max, weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, data, PASSES)
    if args.compile:
        model.compile()

    eps, alpha = args.eps / 255, args.alpha / 255
    for epoch in run.epochs():
        for x, y in data.batches(epoch, args.batch_size, args.seed, run.done):
            run.set_lr()
            with common.autocast(args):
                x_adv = fgsm_ckpt(model, x, y, eps, alpha, args.checkpoints)
                logits = model(x_adv)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.count(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    common.launch(main)
