"""ELLE-A: FGSM plus a penalty on how far the loss is from linear between two random points of the eps-ball.

Abad Rocamora, Liu, Chrysos, Olmos & Cevher, ICLR 2024, arXiv:2401.11618, Algorithm 1. No double backward pass as in
FGSM-GA. Its weight, lambda, is raised where the error jumps and decays elsewhere; --constant is ELLE, with a fixed one.

    python train_elle.py --eps 8

Against train_fgsm.py: a forward pass of three points for each image, its penalty, and lambda's schedule in the loop.
No dropout by default: with it, the penalty measures the noise of the masks, and small runs diverged (docs/methods.md).
Its authors call optimizer.step() twice a batch, this script once. A step costs 14 passes: FGSM's 5, 9 for the three.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 56.0 / 33.8 / 30.2; eps 16: 39.7 / 22.3 / 18.3.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def elle(model, x, y, eps):
    """The images to train on, x' = x + eps sign(grad_x L), clipped to [0, 1]; and the linear approximation error.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps: in [0, 1] units. The error is the mean over the batch of
    (L(c) - (1 - t) L(a) - t L(b))^2 with a, b = x + U(-eps, eps), c = (1 - t) a + t b, t ~ U(0, 1) for each image.
    """
    start = x.detach().requires_grad_()
    loss = F.cross_entropy(model(start), y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = (x + eps * gradient.sign()).clamp(0, 1)
    a, b = ((x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) for _ in range(2))
    t = torch.rand(len(x), device=x.device, dtype=x.dtype)
    c = torch.lerp(a, b, t.view(-1, 1, 1, 1))
    l_a, l_b, l_c = F.cross_entropy(model(torch.cat([a, b, c])), y.repeat(3), reduction="none").chunk(3)
    return x_adv, (l_c - torch.lerp(l_a, l_b, t)).square().mean()


def adapt(state, error, lambda_max, decay):
    """ELLE-A's lambda for the next batch: lambda_max where the error exceeds the mean of all earlier ones by two
    standard deviations (of three at least), else decay times the last. All in tensors: the host need not wait.
    state: {"lambda", "count", "mean", "squares"}, the last three of the earlier errors (Welford's sums).
    """
    jump = (state["count"] > 2) & (error > state["mean"] + 2 * (state["squares"] / state["count"].clamp(min=1)).sqrt())
    count = state["count"] + 1
    mean = state["mean"] + (error - state["mean"]) / count
    squares = state["squares"] + (error - state["mean"]) * (error - mean)
    lambda_next = torch.where(jump, lambda_max, decay * state["lambda"])
    return {"lambda": lambda_next, "count": count, "mean": mean, "squares": squares}


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(dropout=0.0)
    parser.add_argument("--constant", action="store_true", help="ELLE: lambda stays as it is, 1000 to 10000 by eps")
    parser.add_argument("--elle-lambda", type=number(float, 0), help="lambda, or its peak (default: 4000)")
    parser.add_argument("--decay", type=number(float, 0, 1), default=0.99, help="of ELLE-A's lambda, a batch")
    args = common.parse(parser)
    if args.elle_lambda is None:
        by_eps = 1000.0 if args.eps < 9 else 5000.0 if args.eps <= 20 else 10000.0
        args.elle_lambda = by_eps if args.constant else 4000.0
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=common.layout(args.device))
    weights, fused = model.parameters(), args.device.startswith("cuda")
    optimizer = torch.optim.SGD(weights, lr=args.lr_max, momentum=0.9, weight_decay=args.weight_decay, fused=fused)
    zero = torch.zeros((), device=args.device)
    run = Run(args, model, optimizer, data, extra=dict.fromkeys(("lambda", "count", "mean", "squares"), zero))
    eps, steps = args.eps / 255, data.steps(args.batch_size)
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                x_adv, error = elle(model, x, y, eps)
                logits = model(x_adv)
                weight = args.elle_lambda if args.constant else run.extra["lambda"]
                loss = F.cross_entropy(logits, y) + weight * error
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
            run.extra = adapt(run.extra, error.detach(), args.elle_lambda, args.decay)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
