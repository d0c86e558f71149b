"""NuAT: clean training with a penalty on how far an attack moves the logits of the batch, in the nuclear norm.

Sriramanan, Addepalli, Baburaj & Babu, NeurIPS 2021, not on arXiv:
https://proceedings.neurips.cc/paper_files/paper/2021/hash/62889e73828c756c961c5a6d6c01a463-Abstract.html
The attack, one step from random signs, in eval mode, seeks the same norm; in their code only every second time, in
their README always: --nuclear-always. The norm's weight grows from 0 to 4.5, as theirs for batches of 64: it is
divided by the size of the batch, while the norm grows as its square root.

    python train_nuat.py --eps 8

Against train_fgsm.py: the loss, and its weight. No dropout by default: two passes are compared, and masks would differ.
A step costs 9 passes and the activations of two; its singular values make the host wait for a GPU.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 60.7 / 34.6 / 30.3; eps 16: 48.6 / 21.5 / 14.7.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, number
from wrn import WideResNet


def nuat(model, x, y, eps, weight, nuclear=True):
    """The loss to minimise, CE(f(x), y) + weight ||f(x) - f(x')||_* / B, and the clean logits (B, classes).

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps: in [0, 1] units. x' = x0 + eps sign(grad_x0 L), clipped to
    the eps-ball and to [0, 1]; x0 = x + (eps / 2) random signs; L: as above at x0, or CE(f(x0), y) if not nuclear.
    The gradient sees the network in eval mode, all other passes as it is. The norm is computed in the precision of x.
    """
    clean = model(x).detach()  # in no_grad, older autocast would keep copies of weights without a graph
    training = [module for module in model.modules() if module.training]
    model.eval()
    start = (x + eps / 2 * (torch.rand_like(x) - 0.5).sign()).clamp(0, 1).requires_grad_()
    logits = model(start)
    loss = F.cross_entropy(logits, y)
    if nuclear and weight:
        loss = loss + weight * torch.linalg.matrix_norm((clean - logits).to(x.dtype), "nuc") / len(x)
    (gradient,) = torch.autograd.grad(loss, [start])
    for module in training:
        module.training = True
    x_adv = torch.clamp(start.detach() + eps * gradient.sign(), x - eps, x + eps).clamp(0, 1)
    adversarial, logits = model(x_adv), model(x)
    loss = F.cross_entropy(logits, y)
    if weight:
        loss = loss + weight * torch.linalg.matrix_norm((logits - adversarial).to(x.dtype), "nuc") / len(x)
    return loss, logits


def parse_args():
    parser = common.make_parser(__doc__)
    parser.set_defaults(dropout=0.0)
    parser.add_argument("--nuc-max", type=number(float, 0), default=4.5, help="highest weight of the norm")
    parser.add_argument("--nuclear-always", action="store_true", help="every attack seeks the norm, not every second")
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
        weight = args.nuc_max * min(1, epoch / (0.9 * args.epochs))  # theirs: 4.5 from epoch 90 of 100
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                loss, logits = nuat(model, x, y, eps, weight, args.nuclear_always or i % 2 == 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
