"""FGSM-GA: FGSM plus GradAlign, a penalty on gradients that turn within the eps-ball.

Andriushchenko & Flammarion 2020, arXiv:2007.02617, eq. 4: lambda (1 - cos(grad L(x), grad L(x + u))), u ~ U(-eps, eps).

    python train_fgsm_ga.py --eps 8

Against train_fgsm.py: a second gradient, and its penalty in the loss. Each of the two passes in train mode has dropout
masks and batch statistics of its own, as in the code of SLAT's authors: the cosine is below 1 even for a linear loss.
A step costs 11 passes: FGSM's 5; forward, backward to the input at x + u; that graph backward to the weights, 4.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 54.7 / 31.9 / 28.4; eps 16: 27.0 / 20.0 / 17.4.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def fgsm_ga(model, x, y, eps, alpha):
    """The images to train on, and the misalignment 1 - mean cos(grad_x L(x), grad_x L(x + u)), u ~ U(-eps, eps).

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units. The gradient at x, FGSM's own,
    is a constant; the one at x + u is differentiated through. Images with a zero gradient are left out of the mean.
    """
    start = x.detach().requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = x + alpha * gradient.sign()

    noisy = (x + torch.empty_like(x).uniform_(-eps, eps)).requires_grad_()
    loss = F.cross_entropy(model(noisy), y)
    (other,) = torch.autograd.grad(loss, [noisy], create_graph=True)
    gradient, other = gradient.flatten(1), other.flatten(1)
    norms = gradient.norm(dim=1) * other.norm(dim=1)
    keep = norms > 0
    cosine = keep * (gradient * other).sum(1) / norms.where(keep, 1)
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1), 1 - cosine.sum() / keep.sum().clamp(min=1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.0, help="step size, in multiples of eps")
    weight = "weight of the misalignment (default: 0.02 * 10^(eps / 8), its authors' for CIFAR-10)"
    parser.add_argument("--ga-lambda", type=number(float, 0), help=weight)
    args = common.parse(parser)
    if args.ga_lambda is None:
        args.ga_lambda = 0.02 * 10 ** (args.eps / 8)
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
                x_adv, misalignment = fgsm_ga(model, x, y, eps, args.alpha * eps)
                logits = model(x_adv)
                loss = F.cross_entropy(logits, y) + args.ga_lambda * misalignment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
