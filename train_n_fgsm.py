"""N-FGSM: FGSM around a strongly noised image, without clipping back to the eps-ball.

De Jorge et al. 2022, arXiv:2202.01181, Algorithm 1. Not among the comparisons of the SLAT paper.

    python train_n_fgsm.py --eps 8

Against train_fgsm.py: the gradient is taken, and the step starts, at x + U(-2 eps, 2 eps). Cost: 5 passes.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 56.6 / 32.1 / 28.4; eps 16: 41.9 / 20.5 / 15.1.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def n_fgsm(model, x, y, alpha, noise):
    """The images to train on: x0 = x + U(-noise, noise), x' = x0 + alpha sign(grad_x0 L).

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; alpha, noise: in [0, 1] units.
    Both x0 and x' are clipped to [0, 1] only: x' may lie noise + alpha away from x.
    """
    start = (x + torch.empty_like(x).uniform_(-noise, noise)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = start.detach() + alpha * gradient.sign()
    return x_adv.clamp(0, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.0, help="step size, in multiples of eps")
    parser.add_argument("--noise", type=number(float, 0, 4), default=2.0, help="start noise, in multiples of eps")
    return common.parse(parser)


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
                x_adv = n_fgsm(model, x, y, args.alpha * eps, args.noise * eps)
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
