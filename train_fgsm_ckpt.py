"""FGSM-CKPT: train on the shortest of a few steps along the FGSM-RS direction that already fools the network.

Kim, Lee & Lee 2021 (AAAI), arXiv:2010.01799, Algorithm 1. Against catastrophic overfitting, which they find
in networks that are fooled half-way to the perturbation they were trained on, and no longer at its end.

    python train_fgsm_ckpt.py --eps 8

Against train_fgsm.py: FGSM-RS, then forward passes that choose how far each image goes. The gradient is taken in eval
mode, as in its authors' code; of the others only NuAT does so. A step costs 6 to 7.5 passes: FGSM's 5,
one of the clean images, and some of those that are undecided.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 70.9 / 17.1 / 16.0; eps 16: 67.8 / 1.1 / 0.4.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def fgsm_ckpt(model, x, y, eps, alpha, checkpoints):
    """The images to train on: x + (k / c) d, with the smallest k in 0..c that is misclassified, else k = c.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units; checkpoints: c.
    d is the perturbation of FGSM-RS. Gradient and candidates see the network in eval mode, which leaves BatchNorm's
    statistics as they are; a candidate is tried only on images that no smaller k has decided.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = start.detach() + alpha * gradient.sign()
    x_adv = torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)

    direction = x_adv - x
    undecided = torch.arange(len(x), device=x.device)
    with torch.no_grad():
        for k in range(checkpoints):
            candidate = x[undecided] + k / checkpoints * direction[undecided]
            fooled = model(candidate).argmax(1) != y[undecided]
            x_adv[undecided[fooled]] = candidate[fooled]
            undecided = undecided[~fooled]
            if not len(undecided):
                break
    for module in training:
        module.training = True
    return x_adv


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.25, help="step size, in multiples of eps")
    parser.add_argument("--checkpoints", type=number(int, 1), default=3, help="c, how many steps to choose from")
    return common.parse(parser)


def main():
    args = parse_args()
    torch.backends.cudnn.benchmark = False  # the undecided come in batches of every size: each would be timed anew
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
                x_adv = fgsm_ckpt(model, x, y, eps, args.alpha * eps, args.checkpoints)
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
