"""SLAT with other hidden steps: what makes it collapse without dropout? Ours, not the paper's; docs/collapse.md.

    python -m paper.slat_hidden --hidden predicted --eps 16 --dropout 0

SLAT's steps are computed from the label, so their signs can tell it. --hidden, with the passes of a step:
    label       SLAT itself (5)
    none        the input's step only (5)
    random      hidden steps of random signs (5)
    predicted   hidden steps against the class that the network predicts, the input's against the label (6)
    everywhere  the predicted class for the input, too (5)
    noise       SLAT's steps, all from N-FGSM's start, x + U(-2 eps, 2 eps); input step eps, clipped to [0, 1] only (5)
"""

import argparse

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, names, number
from wrn import LAYERS, WideResNet

HIDDEN = ("label", "none", "random", "predicted", "everywhere", "noise")


def slat_hidden(model, x, y, eps, layers, eta, input_step, latent_clamp=True, hidden="label"):
    """As train_slat.slat, but for the hidden steps: hidden, one of HIDDEN. layers begin with "0", the input."""
    start = x.detach()
    if hidden == "noise":
        start = (start + torch.empty_like(start).uniform_(-2 * eps, 2 * eps)).clamp(0, 1)
    start.requires_grad_()
    logits, h = model(start, return_features=True)
    predicted = logits.argmax(1)
    chosen = [h[name] for name in layers]
    if hidden == "predicted":
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), chosen[:1], retain_graph=True)
        gradients = [gradient, *torch.autograd.grad(F.cross_entropy(logits, predicted), chosen[1:])]
    else:
        gradients = torch.autograd.grad(F.cross_entropy(logits, predicted if hidden == "everywhere" else y), chosen)
    delta = {}
    for name, gradient in zip(layers[1:], gradients[1:] if hidden != "none" else []):
        signs = torch.randint_like(gradient, 2) * 2 - 1 if hidden == "random" else gradient.sign()
        delta[name] = eta * signs.to(x.dtype)
        if latent_clamp:
            h_k = h[name].detach().to(x.dtype)
            low, high = h_k.amin((2, 3), keepdim=True), h_k.amax((2, 3), keepdim=True)
            delta[name] = delta[name].clamp(low - h_k, high - h_k)
    if hidden == "noise":
        return (start.detach() + eps * gradients[0].sign()).clamp(0, 1), delta
    x_adv = start.detach() + input_step * gradients[0].sign()
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1), delta


def parse_args():
    parser = common.make_parser(__doc__)
    layers = f"what to perturb, the input, 0, first, of {','.join(LAYERS)}"
    parser.add_argument("--hidden", choices=HIDDEN, default="label", help="the hidden steps")
    parser.add_argument("--layers", type=names(LAYERS), default="0,conv1,conv2", help=layers)
    parser.add_argument("--eta", type=number(float, 0, 4), default=1.0, help="latent step, in multiples of eps")
    parser.add_argument("--input-step", type=number(float, 0, 4), default=0.9, help="input step, likewise")
    parser.add_argument("--latent-clamp", action=argparse.BooleanOptionalAction, default=True, help="clip h + delta")
    args = common.parse(parser)
    if args.layers[0] != "0":
        parser.error(f"argument --layers: {','.join(args.layers)} does not begin with 0, the input")
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    of_data = dict(num_classes=len(data.classes), mean=data.mean, std=data.std)
    model = WideResNet(depth=args.depth, width=args.width, dropout=args.dropout, **of_data)
    model.to(args.device, memory_format=common.layout(args.device))
    of_sgd = dict(momentum=0.9, weight_decay=args.weight_decay, fused=args.device.startswith("cuda"))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr_max, **of_sgd)
    run = Run(args, model, optimizer, data)
    eps, steps = args.eps / 255, data.steps(args.batch_size)
    eta, input_step = args.eta * eps, args.input_step * eps
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                of_slat = (eps, args.layers, eta, input_step, args.latent_clamp)
                x_adv, delta = slat_hidden(model, x, y, *of_slat, args.hidden)
                logits = model(x_adv, delta=delta)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, logits, y)
        run.end_epoch()
    run.finish()


if __name__ == "__main__":
    launch(main)
