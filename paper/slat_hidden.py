"""SLAT with other hidden steps: what makes it collapse without dropout? Ours, not the paper's; docs/collapse.md.

    python -m paper.slat_hidden --hidden predicted --eps 16 --dropout 0
    python -m paper.slat_hidden --dropout-epochs 1-2 --eps 16              dropout in the first two epochs only

SLAT's steps are computed from the label, so their signs can tell it. --hidden, with the passes of a step:
    label       SLAT itself (5)
    none        the input's step only (5)
    random      hidden steps of random signs (5)
    predicted   hidden steps against the class that the network predicts, the input's against the label (6)
    everywhere  the predicted class for the input, too (5)
    noise       SLAT's steps, all from N-FGSM's start, x + U(-2 eps, 2 eps); input step eps, clipped to [0, 1] only (5)
The loop and all flags but --hidden and --dropout-epochs are those of train_slat.py.
"""

import argparse
import functools
import re
from unittest import mock

import torch
import torch.nn.functional as F

import common
import train_slat
from bookkeeping import Run
from common import make_parser
from console import fail, launch
from wrn import Block

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


def epochs(text):
    """[first, last] of FIRST-LAST."""
    if re.fullmatch(r"[1-9]\d*-[1-9]\d*", text):
        first, last = map(int, text.split("-"))
        if first <= last:
            return [first, last]
    raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, as 1-2")


class PartlyDropped(Run):
    """Dropout in the epochs of --dropout-epochs only."""

    def _begin_epoch(self):
        super()._begin_epoch()
        if self.args.dropout_epochs:
            first, last = self.args.dropout_epochs
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.p = self.args.dropout if first <= self.epoch + 1 <= last else 0


def parse_args():
    """train_slat's flags and the two of this file."""

    def with_two_more(_):
        parser = make_parser(__doc__)
        parser.add_argument("--hidden", choices=HIDDEN, default="label", help="the hidden steps")
        only = "FIRST-LAST: no dropout in the others"
        parser.add_argument("--dropout-epochs", type=epochs, metavar="EPOCHS", help=only)
        return parser

    with mock.patch.object(common, "make_parser", with_two_more):
        args = train_slat.parse_args()
    if args.layers[0] != "0" or len(args.layers) == 1:
        fail(f"argument --layers: {','.join(args.layers)} is not 0, the input, and then hidden layers")
    return args


def main():
    args = parse_args()
    slat = functools.partial(slat_hidden, hidden=args.hidden)
    with mock.patch.multiple(train_slat, slat=slat, Run=PartlyDropped, parse_args=lambda: args):
        train_slat.main()


if __name__ == "__main__":
    launch(main)
