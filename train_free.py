"""Free adversarial training: replay each batch m times; one backward pass serves weights and perturbation.

Shafahi et al. 2019, arXiv:1904.12843, Algorithm 1.

    python train_free.py --eps 8 --replays 8

Against train_fgsm.py: a loop of replays, an optimiser step in each; the perturbation is one per batch slot and
carries over from batch to batch. The schedule counts replays. 9 epochs by default: with 8 replays, 72 of the paper's.
A step, which is a replay, costs 3 passes, as standard training does.
Result, WRN-10-2, 2 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 54.0 / 31.9 / 28.9; eps 16: 41.4 / 21.1 / 16.0.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def free(x, x_adv, gradient, eps):
    """The next replay's perturbation: delta = x_adv - x after a step of eps, clipped to the ball and the box.

    x, x_adv: (B, C, H, W) in [0, 1]; gradient: of the loss with respect to x_adv; eps: in [0, 1] units.
    """
    x_adv = x_adv + eps * gradient.sign()
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1) - x


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(epochs=9)
    parser.add_argument("--replays", type=number(int, 1), default=8, help="m, steps on each batch")
    return common.parse(parser)


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    model = WideResNet(args.depth, args.width, len(data.classes), args.dropout, data.mean, data.std)
    model.to(args.device, memory_format=common.layout(args.device))
    weights, fused = model.parameters(), args.device.startswith("cuda")
    optimizer = torch.optim.SGD(weights, lr=args.lr_max, momentum=0.9, weight_decay=args.weight_decay, fused=fused)
    run = Run(args, model, optimizer, data, replays=args.replays, extra={"delta": 0})
    eps, steps = args.eps / 255, data.steps(args.batch_size)
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            for replay in range(args.replays):
                progress = (epoch * steps + i + replay / args.replays) / (args.epochs * steps)
                lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
                optimizer.param_groups[0].update(lr=lr, momentum=momentum)
                x_adv = (x + run.extra["delta"]).clamp(0, 1).requires_grad_()
                with common.autocast(args):
                    logits = model(x_adv)
                    loss = F.cross_entropy(logits, y)
                optimizer.zero_grad()
                loss.backward()
                run.extra["delta"] = free(x, x_adv.detach(), x_adv.grad, eps)
                optimizer.step()
                run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
