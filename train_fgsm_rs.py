"""FGSM-RS: FGSM from a random start, with a step longer than the radius.

Wong, Rice & Kolter 2020, arXiv:2001.03994, Algorithm 3.

    python train_fgsm_rs.py --eps 8

Against train_fgsm.py: the gradient is taken at a random point of the ball; the step is 1.25 eps. Cost: 5 passes.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 61.7 / 30.2 / 27.5; eps 16: 47.7 / 18.8 / 14.2.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def fgsm_rs(model, x, y, eps, alpha):
    """The images to train on: x0 = x + U(-eps, eps), x' = x0 + alpha sign(grad_x0 L), clipped to the ball.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units.
    Both x0 and x' are clipped to [0, 1].
    """
    start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = start.detach() + alpha * gradient.sign()
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.25, help="step size, in multiples of eps")
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
                x_adv = fgsm_rs(model, x, y, eps, args.alpha * eps)
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
