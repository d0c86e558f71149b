"""N-AAER: N-FGSM plus a penalty on abnormal images, those whose loss the attack has lowered.

Lin, Yu & Liu, NeurIPS 2023, arXiv:2404.08154 (AAER: abnormal adversarial examples regularisation).
They multiply before catastrophic overfitting; the penalty grows with their number, loss and change of logits.

    python train_n_aaer.py --eps 8

Against train_n_fgsm.py: the penalty, on losses and logits before and after the step. The masks of dropout differ there,
too; its authors use none: --dropout 0. In their code the loss after the step is a constant in the lambda_2 term, which
then has no gradient: the default, since their numbers come from it. --loss-gradient: the paper's. Cost: 5 passes.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 57.2 / 32.4 / 28.8; eps 16: 41.8 / 20.6 / 15.7.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, note, number
from wrn import WideResNet


def n_aaer(model, x, y, alpha, noise, lambda_1, lambda_2, lambda_3, loss_gradient=False):
    """The loss of N-FGSM with its penalty, and the logits (B, classes) after the attack.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; alpha, noise: in [0, 1] units. With losses l0, l1 and logits
    z0, z1 before and after the attack, an image is abnormal if l0 > l1, and the penalty is lambda_1 (share of abnormal
    images) (lambda_2 mean(l0 - l1) + lambda_3 max(V_abnormal - V_normal, 0)), the mean over abnormal images, V the mean
    of ||z0 - z1||^2. It is zero in a batch without abnormal or without normal images. l0, z0, V_normal are constants,
    and so is l1 in it unless loss_gradient.
    """
    start = (x + torch.empty_like(x).uniform_(-noise, noise)).clamp(0, 1).requires_grad_()
    z0 = model(start)
    loss = F.cross_entropy(z0, y)
    (gradient,) = torch.autograd.grad(loss, [start])
    x_adv = start.detach() + alpha * gradient.sign()
    z0, z1 = z0.detach(), model(x_adv.clamp(0, 1))
    l0, l1 = (F.cross_entropy(z, y, reduction="none") for z in (z0, z1))
    abnormal, v = (l0 > l1).to(l0), (z0 - z1).square().sum(1)
    count, normal = abnormal.sum(), 1 - abnormal
    drop = abnormal * (l0 - (l1 if loss_gradient else l1.detach()))
    v_abnormal = (abnormal * v).sum() / count.clamp(min=1)
    v_normal = (normal * v).sum().detach() / normal.sum().clamp(min=1)
    terms = lambda_2 * drop.sum() / count.clamp(min=1) + lambda_3 * (v_abnormal - v_normal).clamp(min=0)
    share = count / len(x) * (normal.sum() > 0)
    return F.cross_entropy(z1, y) + lambda_1 * share * terms, z1


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("--alpha", type=number(float, 0, 4), default=1.0, help="step size, in multiples of eps")
    parser.add_argument("--noise", type=number(float, 0, 4), default=2.0, help="start noise, in multiples of eps")
    parser.add_argument("--lambda-1", type=number(float, 0), default=1.0, help="weight of the penalty")
    default = "(default: its authors' at the nearest eps)"
    parser.add_argument("--lambda-2", type=number(float, 0), help=f"of the losses' change {default}")
    parser.add_argument("--lambda-3", type=number(float, 0), help=f"of the logits' change {default}")
    parser.add_argument("--loss-gradient", action="store_true", help="the lambda_2 term has one, as in the paper")
    args = common.parse(parser)
    table = {8: (1.5, 0.15), 12: (5.0, 0.55), 16: (8.5, 1.5), 32: (2.75, 0.75)}
    if args.dataset.endswith(("cifar100", "cifar100.npz")):
        table = {8: (1.5, 0.15), 12: (3.5, 0.3), 16: (6.0, 0.5), 32: (3.5, 0.5)}
    nearest = min(table, key=lambda eps: abs(eps - args.eps))
    if nearest != args.eps and None in (args.lambda_2, args.lambda_3):
        note(f"the authors name no lambdas for eps {args.eps:g}: taking those for eps {nearest}")
    args.lambda_2 = table[nearest][0] if args.lambda_2 is None else args.lambda_2
    args.lambda_3 = table[nearest][1] if args.lambda_3 is None else args.lambda_3
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
    lambdas = args.lambda_1, args.lambda_2, args.lambda_3
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                loss, logits = n_aaer(model, x, y, args.alpha * eps, args.noise * eps, *lambdas, args.loss_gradient)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
