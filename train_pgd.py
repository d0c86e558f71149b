"""PGD adversarial training: several small steps of FGSM, each projected back to the eps-ball.

Madry et al. 2017, arXiv:1706.06083. Seven steps of eps / 4 from the image itself, as in the code of
SLAT's authors; --init uniform is Madry's random start.

    python train_pgd.py --eps 8

Against train_fgsm.py: a loop around the step. A step of training costs 2 passes for each of PGD's, and 3.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 57.0 / 33.6 / 30.7; eps 16: 40.1 / 22.5 / 19.2.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def pgd(model, x, y, eps, alpha, steps, init="zero"):
    """The images to train on: `steps` times x' = x' + alpha sign(grad_x' L), clipped to ball and [0, 1].

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units.
    init: "zero" starts at x, "uniform" at x + U(-eps, eps) clipped to [0, 1].
    """
    x_adv = x
    if init == "uniform":
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        start = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(start), y)
        (gradient,) = torch.autograd.grad(loss, [start])
        x_adv = start.detach() + alpha * gradient.sign()
        x_adv = torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)
    return x_adv


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 1), default=0.25, help="of each step, in multiples of eps")
    parser.add_argument("--steps", type=number(int, 1), default=7, help="PGD steps")
    parser.add_argument("--init", choices=("zero", "uniform"), default="zero", help="where the first step starts")
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
                x_adv = pgd(model, x, y, eps, args.alpha * eps, args.steps, args.init)
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
