"""YOPO-m-n: m full passes a batch, and between them n steps of the perturbation through the first layer only.

Zhang et al. 2019, arXiv:1905.00877, Algorithm 1. p, the gradient at the first layer's output, is held fixed
while the perturbation climbs <p, f_0(x + d)>.

    python train_yopo.py --eps 8 --outer 5 --inner 3

Against train_fgsm.py: attack and weight gradients are one; one optimiser step on the sum of the m gradients, with
lr / m. A step costs 3 m passes. 7 epochs by default: the SLAT paper says 30, its minutes pay for 7.5 (docs/methods.md).
Result, WRN-10-2, 2 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 44.1 / 23.7 / 20.0; eps 16: 35.5 / 13.4 / 9.3.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def yopo(model, x, y, eps, alpha, outer, inner):
    """Add the weight gradients of `outer` passes (m) to .grad; returns the last pass's loss and logits.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, alpha: in [0, 1] units. inner (n): steps of alpha.
    model.conv1 must be all that the network does to (x - model.mean) / model.std before anything else.
    """
    delta = torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(outer):
        logits, h = model((x + delta).clamp(0, 1), return_features=True)
        h["conv1"].retain_grad()
        loss = F.cross_entropy(logits, y)
        loss.backward()
        p = h["conv1"].grad.to(x.dtype)
        for step in range(inner + 1):
            x_adv = (x + delta).clamp(0, 1).requires_grad_()
            product = (p * model.conv1((x_adv - model.mean) / model.std)).sum()
            if step == inner:  # the first layer's weights see the final perturbation too
                product.backward(inputs=list(model.conv1.parameters()))
                break
            (gradient,) = torch.autograd.grad(product, [x_adv])
            x_adv = x_adv.detach() + alpha * gradient.sign()
            delta = torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1) - x
    return loss, logits


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(epochs=7)
    parser.add_argument("--alpha", type=number(float, 0, 1), default=0.25, help="of each step, in multiples of eps")
    parser.add_argument("--outer", type=number(int, 1), default=5, help="m, full passes a batch")
    parser.add_argument("--inner", type=number(int, 1), default=3, help="n, first-layer steps a pass")
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
            optimizer.param_groups[0].update(lr=lr / args.outer, momentum=momentum)
            optimizer.zero_grad()
            with common.autocast(args):
                loss, logits = yopo(model, x, y, eps, args.alpha * eps, args.outer, args.inner)
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
