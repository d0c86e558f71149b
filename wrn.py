"""Wide residual network (Zagoruyko & Komodakis 2016, arXiv:1605.07146) whose layers can be perturbed. Needs only torch.

    logits = model(x)                                     x: (B, 3, H, W) in [0, 1]
    logits, h = model(x, return_features=True)            h[name]: that layer's output
    logits = model(x, delta={"conv1": d1, "conv2": d2})   d is added to that layer's output

Names: "0" the input, "conv1" the stem convolution, "conv2", "conv3", "conv4" the last block of each
group (not a block's conv1 and conv2). Normalisation is the first thing inside the network: all outside is in [0, 1].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS = ("0", "conv1", "conv2", "conv3", "conv4")


class Block(nn.Module):
    """Pre-activation residual block; where shapes change, the 1x1 shortcut reads the activated input."""

    def __init__(self, channels_in, channels_out, stride, p):
        super().__init__()
        self.p = p
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if channels_in != channels_out or stride != 1:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(compute_dtype(self.bn1(x)), inplace=True)
        out = self.bn2(self.conv1(activated))
        if self.training:  # before the ReLU: the same result, and one tensor less to keep for the backward pass
            out = dropout(out, self.p)
        out = self.conv2(F.relu(out, inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-width for images of any size; WRN-28-10 has 36.5 M parameters.

    depth: 6n + 4 with n blocks a group (ValueError otherwise). width: multiplies 16, 32, 64 channels.
    dropout: rate inside every block, in train mode. mean, std: of the data, per channel, in [0, 1] units.
    """

    def __init__(self, depth=28, width=10, num_classes=10, dropout=0.3, mean=(0.5,) * 3, std=(0.25,) * 3):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6n + 4 with n >= 1: 10, 16, 22, 28, 34, 40, ...")
        n = (depth - 4) // 6
        # What load_model needs to build the same network again.
        self.arguments = dict(depth=depth, width=width, num_classes=num_classes, dropout=dropout)
        self.arguments |= dict(mean=list(mean), std=list(std))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(len(mean), 16, 3, 1, 1, bias=False)
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(Block(c_in, c_out, stride, dropout), *[Block(c_out, c_out, 1, dropout) for _ in range(n - 1)])
            for c_in, c_out, stride in zip(channels[:3], channels[1:], (1, 2, 2))
        )
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # normal(0, sqrt(2 / (k k out_channels)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x, delta=None, return_features=False):
        """Logits (B, num_classes) in float32; with return_features also {name: h_name}, delta included.

        delta: {name: float32 tensor of that layer's shape}, added to that layer's output in float32: between 8 and 16
        bfloat16 moves in steps of 1/16, twice a perturbation of 8/255. ValueError for a name that is not in LAYERS.
        """
        delta, h = delta or {}, {}
        if not set(delta) <= set(LAYERS):
            raise ValueError(f"unknown layer {sorted(set(delta) - set(LAYERS))}: choose from {', '.join(LAYERS)}")

        def perturbed(name, output):
            h[name] = output + delta[name] if name in delta else output
            return h[name]

        x = perturbed("0", x)
        x = perturbed("conv1", self.conv1((x - self.mean) / self.std))
        x = perturbed("conv2", self.conv2(x))
        x = perturbed("conv3", self.conv3(x))
        x = perturbed("conv4", self.conv4(x))
        x = F.relu(self.bn(x), inplace=True).mean((2, 3), dtype=self.fc.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # logits in float32 (or as the weights are)
            logits = self.fc(x)
        return (logits, h) if return_features else logits


def compute_dtype(x):
    """x in the precision of the convolutions: h + delta is float32 until BatchNorm has read it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def dropout(x, p):
    """F.dropout(x, p), and no more; the rest is speed on a CPU, a third of a training step: four decisions at once.

    There p is rounded to a multiple of 2^-16, and what is kept is scaled by 1 / (1 - that p).
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    scale = 1 / (1 - dropped / 2**16)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    keep = words.view(torch.int16)[: x.numel()].ge_(dropped - 2**15)  # 0 or 1, in place: ten times as fast as to bool
    if x.dtype == torch.bfloat16:  # 0 or 1 times the scale's bits: those of 0.0 or of the scale
        keep = keep.mul_(int(torch.tensor(scale, dtype=x.dtype).view(torch.int16))).view(x.dtype)
    else:
        keep = keep.to(x.dtype).mul_(scale)
    return x * keep.as_strided(x.size(), x.stride())
