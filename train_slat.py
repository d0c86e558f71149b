"""SLAT, single-step latent adversarial training: FGSM in the input and in hidden layers at once.

Park & Lee 2021, arXiv:2104.01575, Algorithm 1. One backward pass gives the gradients g_k at the input and
at every chosen layer. Each layer moves along sign(g_k) (eq. 4): a penalty on sum_k eta_k ||g_k||_1 (eq. 5).

    python train_slat.py --eps 8 --layers 0,conv1,conv2

Against train_fgsm.py: the method, its flags, and model(x_adv, delta=delta) in the loop. A step costs 5 passes, too.
As in its authors' code: input step, dropout, a clamp. The paper: --input-step 1 --no-latent-clamp, dropout not stated.
Result, WRN-10-2, 8 epochs (clean / PGD-50-10 / AutoAttack, %): eps 8: 53.2 / 31.6 / 27.4; eps 16: 35.6 / 22.0 / 18.4.
"""

import argparse

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from console import launch, names, number
from wrn import LAYERS, WideResNet


def slat(model, x, y, eps, layers, eta, input_step, latent_clamp=True):
    """What to train on, model(x_adv, delta=delta): images x_adv and latent perturbations {name: delta_k}.

    x: (B, C, H, W) in [0, 1]; y: (B,) class indices; eps, eta, input_step: in [0, 1] units. layers: names of
    the network's features, "0" being the input. delta_k = eta sign(grad_h_k L); x_adv = x + input_step
    sign(grad_x L), clipped to the eps-ball and to [0, 1]. latent_clamp: h_k + delta_k stays within the
    minimum and maximum over space of h_k, per image and channel; False where h_k is not (B, C, H, W).
    """
    start = x.detach().requires_grad_()
    logits, h = model(start, return_features=True)
    loss = F.cross_entropy(logits, y)
    gradients = torch.autograd.grad(loss, [h[name] for name in layers])
    x_adv, delta = start.detach(), {}
    for name, gradient in zip(layers, gradients):
        if name == "0":
            x_adv = x_adv + input_step * gradient.sign()
            continue
        # Eq. 4 in the precision of x, float32, whatever the network computes in: bfloat16 would round h + delta.
        delta[name] = eta * gradient.to(x.dtype).sign()
        if latent_clamp:
            h_k = h[name].detach().to(x.dtype)
            low, high = h_k.amin((2, 3), keepdim=True), h_k.amax((2, 3), keepdim=True)
            delta[name] = delta[name].clamp(low - h_k, high - h_k)
    return torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1), delta


def parse_args():
    parser = common.make_parser(__doc__)
    layers = f"what to perturb, of {','.join(LAYERS)}"
    parser.add_argument("--layers", type=names(LAYERS), default="0,conv1,conv2", help=layers)
    parser.add_argument("--eta", type=number(float, 0, 4), default=1.0, help="latent step, in multiples of eps")
    parser.add_argument("--input-step", type=number(float, 0, 4), default=0.9, help="input step, likewise")
    parser.add_argument("--latent-clamp", action=argparse.BooleanOptionalAction, default=True, help="clip h + delta")
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
    eta, input_step = args.eta * eps, args.input_step * eps
    for epoch in range(run.epoch, args.epochs):
        model.train()
        for i, (x, y) in enumerate(data.batches(epoch, args.batch_size, args.seed)):
            progress = (epoch * steps + i) / (args.epochs * steps)
            lr, momentum = common.cyclic(progress, args.lr_max, args.momentum_cycle)
            optimizer.param_groups[0].update(lr=lr, momentum=momentum)
            with common.autocast(args):
                x_adv, delta = slat(model, x, y, eps, args.layers, eta, input_step, args.latent_clamp)
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
