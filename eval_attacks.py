#!/usr/bin/env python3
"""Robust accuracy of a network on images in [0, 1]: PGD with restarts and AutoAttack, in one file.

    python eval_attacks.py runs/NAME --attack autoattack --eps 8 --n 1000

The attacks need torch alone and take any network that maps images (N, C, H, W) in [0, 1] to logits:

    from eval_attacks import autoattack
    robust, x_adv = autoattack(model.eval(), x, y, eps=8 / 255)

Threat model: |x_adv - x| <= eps and 0 <= x_adv <= 1. An image is broken if the network misclassifies it as it is, or
once a point within both bounds is found that it misclassifies in float32. A search may use bfloat16 for speed.

`plain_pgd` comes first, the simplest form of what the faster `pgd` is tested against. Then verdicts, losses, attacks,
`search` (the engine that they share), checks, and the command line.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import runpy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

# Images in one pass; on a CPU, as many as fit its caches.
BATCH_SIZE = collections.defaultdict(lambda: 250, cpu=64)
# Computing |x_adv - x| <= eps rounds too: a few units in the last place of a float32 near 1.
ROUNDING = 5e-7
# After a search in bfloat16, 1 / AGAIN of its iterations are added in float32.
AGAIN = 20
# Seconds between calls of `save`, which writes 250 MB for 10,000 images, and of `report`, which waits for the device.
SAVE_EVERY, REPORT_EVERY = 60, 0.2

# ---------------------------------------------------------------- PGD in its simplest form


def noise(shape, seed, image, trial):
    """Uniform in [-1, 1]; a function of its arguments alone, so not of what else is in the batch."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + trial) * 1_000_003 + image) % 2**63)
    return torch.rand(shape, generator=generator) * 2 - 1


def plain_pgd(model, x, y, eps, steps=50, restarts=10, step_size=None, seed=0):
    """What `pgd` has to find, without its engine: all restarts and steps for every image, in one batch.

    Returns robust, (N,) bool, and x_adv: the first misclassified point, or if there is none the last restart's end.
    """
    step_size = eps / 4 if step_size is None else step_size
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    robust, x_adv = model(x).argmax(1) == y, x
    for trial in range(restarts):
        start = torch.stack([noise(x.shape[1:], seed, image, trial) for image in range(len(x))]).to(x)
        point = (x + eps * start).clamp(low, high)
        for _ in range(steps + 1):  # the last point is checked too
            logits = model(point.requires_grad_())
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), point)
            x_adv = torch.where(robust.view(-1, 1, 1, 1), point.detach(), x_adv)
            robust = robust & (logits.argmax(1) == y)
            point = (point.detach() + step_size * gradient.sign()).clamp(low, high)
    return robust, x_adv


# ---------------------------------------------------------------- verdicts


def logits_at(model, point):
    """Logits (B, classes), in float32 or better, of images (B, C, H, W)."""
    logits = model(point.contiguous(memory_format=torch.channels_last))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def outputs(model, x, batch_size=None):
    """Logits (N, classes) of images x (N, C, H, W), computed in float32 even under autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.cat([logits_at(model, part) for part in x.split(batch_size or BATCH_SIZE[x.device.type])])


def predict(model, x, batch_size=None):
    """Class indices (N,) of images x (N, C, H, W), as `outputs` computes them."""
    return outputs(model, x, batch_size).argmax(1)


def is_adversarial(model, x, x_adv, y, eps):
    """(N,) bool: x_adv lies within eps of x and within [0, 1], and is misclassified in float32."""
    verdict = (((x_adv - x).abs() <= eps + ROUNDING) & (x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    if verdict.any():
        verdict[verdict.clone()] = predict(model, x_adv[verdict]) != y[verdict]
    return verdict


def percent(right):
    """How many of a bool tensor are True, in per cent."""
    return 100 * int(right.sum()) / right.numel()


# ---------------------------------------------------------------- losses: logits (B, classes) -> (B,), to be maximised


def cross_entropy(logits, y, target=None):
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits, y, target=None):
    """The highest wrong logit, or the target's, minus the right one; above zero, the image is misclassified."""
    if target is None:
        wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
    else:
        wrong = logits.gather(1, target[:, None])[:, 0]
    return wrong - logits.gather(1, y[:, None])[:, 0]


def dlr(logits, y, target=None):
    """Difference of logits ratio (Croce & Hein 2020, eq. 6, or 7 with a target); of two classes, the margin."""
    if logits.shape[1] < 3:
        return margin(logits, y, target)
    top = logits.sort(1, descending=True)[0]
    third = top[:, 2] if target is None else top[:, 2:4].mean(1)
    return margin(logits, y, target) / (top[:, 0] - third + 1e-12)


def ascend(model, point, loss, y, target):
    """The logits, the loss (B,) and its gradient at point (B, C, H, W)."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_at(model, point)
        value = loss(logits, y, target)
        # The sum over the batch, not the mean: an image's gradient must not depend on its neighbours.
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return logits.detach(), value.detach(), gradient.contiguous()


# ---------------------------------------------------------------- attacks


class Attack:
    """What `search` runs: `length` iterations of a set of rows, a row being one trial (restart or target) of one image.

    A set s is a dict of tensors with one entry per row: image, trial, age (iterations so far), x, y, low and high
    (the bounds of a point), target if the attack is targeted, and what the attack adds.
    start(s, seed) adds it to new rows; among it is "best", the strongest point so far.
    step(model, s) updates s by one iteration and returns the points that it tried, and their logits.
    again(s) prepares rows whose iterations in bfloat16 are over for those in float32.
    """

    targeted = False

    def again(self, s):
        return s


def start_noise(s, seed, shape):
    """`noise` of this shape for every row of a set."""
    return torch.stack([noise(shape, seed, *job) for job in zip(s["image"].tolist(), s["trial"].tolist())]).to(s["x"])


class Pgd(Attack):
    def __init__(self, eps, steps, step_size, random_start):
        self.eps, self.step_size, self.random_start = eps, step_size, random_start
        self.length = steps + 1  # the last point is checked too

    def start(self, s, seed):
        point = s["x"] + self.eps * start_noise(s, seed, s["x"].shape[1:]) if self.random_start else s["x"]
        s["point"] = s["best"] = point.clamp(s["low"], s["high"])
        return s

    def step(self, model, s):
        logits, _, gradient = ascend(model, s["point"], cross_entropy, s["y"], None)
        s["best"] = s["point"]
        s["point"] = (s["point"] + self.step_size * gradient.sign()).clamp(s["low"], s["high"])
        return s["best"], logits


def pgd(model, x, y, eps, steps=50, restarts=10, step_size=None, random_start=True, **options):
    """Projected gradient descent (Madry et al. 2017, arXiv:1706.06083) on the cross-entropy.

    step_size: None is eps / 4. Restarts begin uniformly in the ball (random_start=False: at x). The rest: see `search`.
    """
    attack = Pgd(eps, steps, eps / 4 if step_size is None else step_size, random_start)
    return search(model, x, y, eps, attack, restarts, **options)


def fgsm(model, x, y, eps, **options):
    """One step of size eps from x (Goodfellow et al. 2014, arXiv:1412.6572), as an attack: see `search`."""
    return pgd(model, x, y, eps, 1, 1, eps, False, **options)


def apgd_checkpoints(steps):
    """Iterations 0 to steps: at a checkpoint (Croce & Hein 2020, 3.1), how many since the one before; else 0."""
    windows, at, window = [0] * (steps + 1), 0, max(int(0.22 * steps), 1)
    while at + window <= steps:
        at += window
        windows[at] = window
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return windows


class Apgd(Attack):
    def __init__(self, eps, steps, loss, device="cpu"):
        self.eps, self.length = eps, steps + 1
        self.loss, self.targeted = cross_entropy if loss == "ce" else dlr, loss == "dlr-targeted"
        # The second part is for the iterations in float32 after a search in bfloat16.
        windows = apgd_checkpoints(steps) + apgd_checkpoints(math.ceil(self.length / AGAIN) - 1)
        self.window = torch.tensor(windows, device=device)

    def start(self, s, seed):
        t = start_noise(s, seed, s["x"].shape[1:])
        t = self.eps * (t / t.abs().amax((1, 2, 3), keepdim=True))
        s["best"] = (s["x"] + t).clamp(s["low"], s["high"])
        return self.begin(s, 2 * self.eps)

    def again(self, s):
        return self.begin(s, self.eps / 4)

    def begin(self, s, step_size):
        """Rows that start at s["best"], with nothing known about it."""
        value = torch.full_like(s["best"][:, 0, 0, 0], math.inf)
        return s | {
            "point": s["best"],
            "previous": s["best"],  # where the last step started
            "best_gradient": torch.zeros_like(s["best"]),
            "loss": value,  # at "previous"
            "best_loss": -value,
            "best_loss_then": -value,  # at the last checkpoint
            "raised": torch.zeros_like(s["age"]),  # how many iterations since the last checkpoint raised the loss
            "halved": torch.ones_like(s["age"], dtype=torch.bool),  # at the last checkpoint
            "step_size": torch.full_like(value, step_size),
        }

    def step(self, model, s):
        window = self.window[s["age"]]
        check = window > 0
        checkpoint = bool(check.any())  # asked before the pass below, so that the host does not wait for it
        candidate = point = s["point"]
        logits, loss, gradient = ascend(model, point, self.loss, s["y"], s.get("target"))
        s["raised"] = s["raised"] + (loss > s["loss"])
        better = loss > s["best_loss"]
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best"] = torch.where(better.view(-1, 1, 1, 1), point, s["best"])
        s["best_gradient"] = torch.where(better.view(-1, 1, 1, 1), gradient, s["best_gradient"])
        if checkpoint:
            few = s["raised"] < 0.75 * window
            stuck = ~s["halved"] & (s["best_loss"] <= s["best_loss_then"])
            halve = check & (few | stuck)
            s["step_size"] = torch.where(halve, s["step_size"] / 2, s["step_size"])
            point = torch.where(halve.view(-1, 1, 1, 1), s["best"], point)
            gradient = torch.where(halve.view(-1, 1, 1, 1), s["best_gradient"], gradient)
            loss = torch.where(halve, s["best_loss"], loss)
            s["halved"] = torch.where(check, halve, s["halved"])
            s["best_loss_then"] = torch.where(check, s["best_loss"], s["best_loss_then"])
            s["raised"] = torch.where(check, 0, s["raised"])
        moved = (point + s["step_size"].view(-1, 1, 1, 1) * gradient.sign()).clamp(s["low"], s["high"])
        # The first iteration has no momentum: there point is previous, and a is 1.
        a = torch.where(s["loss"].isposinf(), 1.0, 0.75).to(point).view(-1, 1, 1, 1)
        moved = point + a * (moved - point) + (1 - a) * (point - s["previous"])
        s["previous"], s["loss"], s["point"] = point, loss, moved.clamp(s["low"], s["high"])
        return candidate, logits


def apgd(model, x, y, eps, loss="ce", steps=100, restarts=1, targets=9, **options):
    """Auto-PGD (Croce & Hein 2020, arXiv:2003.01690, Algorithm 1): momentum, and steps that halve by themselves.

    loss: "ce", "dlr" or "dlr-targeted". The last has no restarts but one trial for each of the `targets` highest
    wrong classes of the clean image (all of them if there are fewer). The rest: see `search`.
    """
    attack = Apgd(eps, steps, loss, x.device)
    return search(model, x, y, eps, attack, targets if attack.targeted else restarts, **options)


def project_to_plane(point, w, gap):
    """The smallest d in l-infinity with <w, d> = gap and point + d in [0, 1].

    point, w: (B, D); gap: (B,). Where the box keeps the plane out of reach, the d that comes nearest to it.
    Every coordinate moves towards the plane by t, or as far as the box allows: d_i = +-min(t, room_i). The distance
    covered, sum_i |w_i| min(t, room_i), is concave and piecewise linear in t, so a few Newton steps find t.
    """
    way = w.sign() * gap.sign()[:, None]
    room = torch.where(way > 0, 1 - point, point)
    w, gap = w.abs(), gap.abs()
    t = gap / w.sum(1).clamp(min=torch.finfo(w.dtype).tiny)  # exact unless the box is in the way
    tolerance = 100 * torch.finfo(w.dtype).eps
    for _ in range(100):
        missing = gap - (w * torch.minimum(room, t[:, None])).sum(1)
        slope = (w * (room > t[:, None])).sum(1)
        going = (missing > tolerance * gap) & (slope > 0)
        if not going.any():
            break
        t = torch.where(going, t + missing / slope, t)
    return way * torch.minimum(room, t[:, None])


class Fab(Attack):
    targeted = True
    alpha_max, eta, beta = 0.1, 1.05, 0.9

    def __init__(self, steps):
        self.length = steps

    def start(self, s, seed):
        return s | {"point": s["x"], "best": s["x"]}

    def step(self, model, s):
        _, gap, w = ascend(model, s["point"], margin, s["y"], s["target"])
        x, point, w = (v.flatten(1) for v in (s["x"], s["point"], w))
        # Steps to the linearised boundary from the point and from the clean image, then a mix of the two.
        d = project_to_plane(point, w, -gap)
        d_x = project_to_plane(x, w, -gap - (w * (x - point)).sum(1))
        a, a_x = (v.abs().amax(1, keepdim=True).clamp(min=1e-8) for v in (d, d_x))
        alpha = (a / (a + a_x)).clamp(max=self.alpha_max)
        candidate = ((1 - alpha) * (point + self.eta * d) + alpha * (x + self.eta * d_x)).clamp(0, 1).view_as(s["x"])
        with torch.no_grad():
            logits = logits_at(model, candidate)
        wrong = (logits.argmax(1) != s["y"]).view(-1, 1, 1, 1)
        s["point"] = torch.where(wrong, s["x"] + self.beta * (candidate - s["x"]), candidate)
        return candidate, logits


def fab(model, x, y, eps, steps=100, targets=9, **options):
    """Targeted fast adaptive boundary attack (Croce & Hein 2019, arXiv:1907.02044), one trial per target class.

    It looks for the nearest misclassified point, which breaks the image if it lies within eps. The rest: see `search`.
    """
    return search(model, x, y, eps, Fab(steps), targets, **options)


class Square(Attack):
    halvings = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    def __init__(self, queries, p, restarts, shape, seed, device="cpu"):
        self.length = queries
        # Where query i of a restart puts its square and how it is coloured, the same for all images.
        total = queries + math.ceil(queries / AGAIN)
        random = torch.rand(restarts, total, 2 + shape[0], generator=torch.Generator().manual_seed(seed))
        share = [p / 2 ** sum(i > h for h in self.halvings) for i in range(total)]
        side = [min(max(round(math.sqrt(v * shape[1] * shape[2])), 1), *shape[1:]) for v in share]
        self.random, self.side = random.to(device), torch.tensor(side, device=device)
        self.lines = [torch.arange(n, device=device) for n in shape[1:]]

    def start(self, s, seed):
        stripes = start_noise(s, seed, (s["x"].shape[1], 1, s["x"].shape[3]))
        return self.again(s | {"best": torch.where(stripes > 0, s["high"], s["low"])})

    def again(self, s):
        return s | {"margin": torch.full_like(s["x"][:, 0, 0, 0], -math.inf)}  # nothing is known about s["best"]

    def step(self, model, s):
        side, random = self.side[s["age"]], self.random[s["trial"], s["age"]]
        inside = []
        for line, u in zip(self.lines, random.T):
            corner = (u * (len(line) - side + 1)).long()
            inside.append((line >= corner[:, None]) & (line < (corner + side)[:, None]))
        inside = inside[0][:, None, :, None] & inside[1][:, None, None, :] & (s["margin"] > -math.inf).view(-1, 1, 1, 1)
        recoloured = torch.where(random[:, 2:, None, None] > 0.5, s["high"], s["low"])
        candidate = torch.where(inside, recoloured, s["best"])
        with torch.no_grad():
            logits = logits_at(model, candidate)
        value = margin(logits, s["y"]).to(s["margin"])
        better = value > s["margin"]
        s["margin"] = torch.where(better, value, s["margin"])
        s["best"] = torch.where(better.view(-1, 1, 1, 1), candidate, s["best"])
        return candidate, logits


def square(model, x, y, eps, queries=5000, p=0.8, restarts=1, seed=0, **options):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049, Algorithms 1 and 2): random search, no gradients.

    From vertical stripes of +-eps, each query sets one square to +-eps and is kept if the margin rises. p: the share of
    the image that a square covers, halved after 10, 50, 200, ... queries. The rest: see `search`.
    """
    attack = Square(queries, p, restarts, x.shape[1:], seed, x.device)
    return search(model, x, y, eps, attack, restarts, seed=seed, **options)


ATTACKS = {
    "apgd-ce": apgd,
    "apgd-t": functools.partial(apgd, loss="dlr-targeted"),
    "fab-t": fab,
    "square": square,
    "apgd-dlr": functools.partial(apgd, loss="dlr"),
    "fgsm": fgsm,
    "pgd": pgd,
}
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack(model, x, y, eps, **options):
    """Standard AutoAttack (Croce & Hein 2020, arXiv:2003.01690): four attacks, each on what is still unbroken.

    APGD-CE (100 iterations), APGD-T and FAB-T (100 for each of 9 target classes), Square (5,000 queries): see `search`.
    """
    robust, x_adv = torch.ones_like(y, dtype=torch.bool), x.clone()
    for name in AUTOATTACK:
        left = robust.nonzero().flatten()
        robust[left], x_adv[left] = ATTACKS[name](model, x[left], y[left], eps, **options)
    return robust, x_adv


# ---------------------------------------------------------------- the engine


def take(state, keep):
    """The rows of a set where keep (B,) is True."""
    rows = keep.nonzero().flatten()
    return state if len(rows) == len(keep) else {key: value.index_select(0, rows) for key, value in state.items()}


def join(state, more):
    return {key: torch.cat([state[key], more[key]]) for key in more} if state else more  # a set begins as {}


class FixedBatchNorm(torch.autograd.Function):
    """BatchNorm in eval mode: its backward is one product. torch's also computes sums for the weights."""

    @staticmethod
    def forward(ctx, x, bn):
        ctx.bn = bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    @staticmethod
    def backward(ctx, gradient):
        scale = ctx.bn.weight / (ctx.bn.running_var + ctx.bn.eps).sqrt()
        return gradient * scale[:, None, None].to(gradient.dtype), None


@contextlib.contextmanager
def frozen(model):
    """Inside, only images have gradients: nothing is stored or computed for those of weights."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    weights = [w for module in modules for w in module.parameters(recurse=False) if w.requires_grad]
    norms = [m for m in modules if type(m) is torch.nn.BatchNorm2d and not m.training]
    norms = [m for m in norms if m.affine and m.track_running_stats and "forward" not in vars(m)]
    for w in weights:
        w.requires_grad_(False)
    for m in norms:
        m.forward = functools.partial(lambda bn, x: FixedBatchNorm.apply(x, bn), m)
    try:
        yield
    finally:
        for w in weights:
            w.requires_grad_(True)
        for m in norms:
            del m.forward


def search(
    model, x, y, eps, attack, trials, batch_size=None, seed=0, precision=None, report=None, save=None, resume=None
):
    """Run an attack on all images, with `trials` restarts or target classes each; the engine of all attacks.

    model: images in [0, 1] -> logits, in eval mode. x: (N, C, H, W) float32 in [0, 1]. y: (N,) class indices.
    eps: in [0, 1] units. batch_size: rows at a time (None: 64 on a CPU, whose caches they fit, else 250).
    precision: None searches with autocast as it is set outside, "fp32" in float32, "bf16" in bfloat16. What bfloat16
    leaves unbroken is attacked again in float32, from the best point of every trial, for a twentieth of the iterations.
    report(done, left, robust): iterations of rows so far, and at most how many are left; every REPORT_EVERY seconds.
    save(state): every SAVE_EVERY seconds, between two steps; `resume=state` continues from that state.
    Returns robust, (N,) bool, and x_adv, (N, C, H, W): a misclassified point where one was found, else the
    strongest one that the last trial saw (for FAB x itself, since its points lie outside the ball).

    An image leaves with all its rows at its first misclassified point, and the next trials in the queue (first trials
    of all images, then second ones, ...) take their place. Chance depends on (seed, image, trial) alone: batch_size
    changes the speed and which of several adversarial points is returned, but no verdict.
    """
    if not len(x):
        return torch.ones_like(y, dtype=torch.bool), x.clone()
    batch_size = batch_size or BATCH_SIZE[x.device.type]
    logits = outputs(model, x, batch_size)
    robust, x_adv = logits.argmax(1) == y, x.clone()
    ranking = logits.scatter(1, y[:, None], math.inf).argsort(1, descending=True)  # y, then the others, highest first
    trials = min(trials, logits.shape[1] - 1) if attack.targeted else trials
    first = robust.nonzero().flatten()
    queue = torch.stack([first.repeat(trials), torch.arange(trials, device=x.device).repeat_interleave(len(first))], 1)
    fp32, bf16 = (functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=e) for e in (False, True))
    contexts = {None: [contextlib.nullcontext], "fp32": [fp32], "bf16": [bf16, fp32]}[precision]
    ends = [attack.length, attack.length + math.ceil(attack.length / AGAIN)][: len(contexts)]
    sets = [{} for _ in ends]  # with bf16: the rows in bfloat16, then those back in float32
    begun, done, saved, reported = 0, 0, time.monotonic(), 0.0
    if resume:
        robust, x_adv, begun = resume["robust"].to(x.device), resume["x_adv"].to(x), resume["begun"]
        sets = [{key: value.to(x.device) for key, value in s.items()} for s in resume["sets"]]

    def size(s):
        return len(s["image"]) if s else 0

    with frozen(model):
        while True:
            while size(sets[0]) < batch_size and begun < len(queue):
                jobs = queue[begun : begun + batch_size - size(sets[0])]
                begun += len(jobs)
                image, trial = jobs[robust[jobs[:, 0]]].T
                if len(image):
                    new = {"image": image, "trial": trial, "age": torch.zeros_like(image), "x": x[image], "y": y[image]}
                    new["low"], new["high"] = (new["x"] - eps).clamp(0, 1), (new["x"] + eps).clamp(0, 1)
                    if attack.targeted:
                        new["target"] = ranking[image, trial + 1]
                    sets[0] = join(sets[0], attack.start(new, seed))
            # The float32 set waits until it is full or nothing else is left.
            k = len(sets) - 1 if size(sets[-1]) >= batch_size or not size(sets[0]) else 0
            s = sets[k]
            if not size(s):
                if report:
                    report(done, 0, robust)
                return robust, x_adv
            with contexts[k]():
                candidate, logits = attack.step(model, s)
            s["age"] = s["age"] + 1
            done += size(s)
            rows = (logits.argmax(1) != s["y"]).nonzero().flatten()
            if len(rows):
                image = s["image"][rows]
                truly = is_adversarial(model, s["x"][rows], candidate[rows], s["y"][rows], eps)
                # If two trials break an image in the same step, the first row counts.
                winners = dict(zip(image[truly].tolist()[::-1], rows[truly].tolist()[::-1]))
                if winners:
                    image, row = (torch.tensor(list(v), device=x.device) for v in (winners.keys(), winners.values()))
                    x_adv[image], robust[image] = candidate[row].to(x_adv.dtype), False
                    sets = [take(s, robust[s["image"]]) if s else s for s in sets]
            s = sets[k]
            over = s["age"] >= ends[k]
            if over.any():
                ended, sets[k] = take(s, over), take(s, ~over)
                if k + 1 < len(sets):
                    sets[k + 1] = join(sets[k + 1], attack.again(ended))
                else:
                    last = ended["trial"] == trials - 1
                    x_adv[ended["image"][last]] = ended["best"][last]
            if report and time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                ahead = robust[queue[begun:, 0]].sum() * ends[-1]
                report(done, int(ahead + sum((ends[-1] - s["age"]).sum() for s in sets if s)), robust)
            if save and time.monotonic() - saved >= SAVE_EVERY:
                saved = time.monotonic()
                save({"robust": robust, "x_adv": x_adv, "sets": sets, "begun": begun})


# ---------------------------------------------------------------- checks


def check_network(model, x, y, eps, count=250):
    """Reasons to distrust what any attack finds on this network, a list of sentences; x, y: some images."""
    x, y, found = x[:count], y[:count], []
    logits = outputs(model, x)
    if isinstance(model, torch.nn.Module) and any(module.training for module in model.modules()):
        found.append("the network is in train mode: call model.eval() first")
    if not torch.allclose(logits, outputs(model, x), rtol=1e-3, atol=1e-4):
        found.append("the network is randomised: two passes differ, so a single verdict means little")
    if logits.min() >= 0 and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        found.append("the outputs are probabilities, not logits (a softmax at the end?): gradients vanish, remove it")
    with frozen(model), torch.autocast(x.device.type, enabled=False):
        point = (x + eps * torch.rand_like(x) - eps / 2).clamp(0, 1)
        zero = (ascend(model, point, cross_entropy, y, None)[2] == 0).flatten(1).all(1) & (logits.argmax(1) == y)
    if zero.any():
        found.append(f"the gradient is exactly zero at {int(zero.sum())} of {len(x)} images: only Square attacks them")
    if logits.shape[1] < 10:
        found.append(f"{logits.shape[1]} classes: the targeted attacks take {logits.shape[1] - 1} targets instead of 9")
    return found


def check_survivors(survivors):
    """The same from the results; survivors: {attack: (N,) bool, unbroken after it}, in the order they ran."""
    others = list(survivors)[: list(survivors).index("square")] if "square" in survivors else []
    if not others:
        return []
    before = torch.stack([survivors[name] for name in others]).all(0)
    more = int((before & ~survivors["square"]).sum())
    if more <= 0.002 * len(before):  # AutoAttack's threshold: one image in a thousand is chance
        return []
    return [
        f"Square, which uses no gradients, broke {more} of {len(before)} images that {', '.join(others)} "
        "could not: the gradients may be masked, and the robust accuracy too high"
    ]


# ---------------------------------------------------------------- command line


def parse_args():
    from common import Help, Parser, find_device, number

    trust = "--model runs the Python file that it names, so name only one that you trust."
    parser = Parser(description=__doc__.split("\n")[0], epilog=trust, formatter_class=Help)
    add = parser.add_argument
    add("run", nargs="?", help="run folder (its model.pt), or a model.pt, best.pt or checkpoint.pt")
    add("--model", metavar="FILE:FUNCTION", help="instead of a run: my_net.py:make_model, which returns a network")
    add("--weights", metavar="FILE", help="a state_dict for --model, by itself or under 'state_dict'")
    names = ", ".join([*ATTACKS, "autoattack"])
    add("--attack", default="pgd", help=f"comma-separated, each on what is still unbroken: {names}")
    add("--eps", type=number(float, 0, 255), default=8, help="l-infinity radius, in 1/255")
    add("--steps", type=number(int, 1), default=50, help="of PGD")
    add("--restarts", type=number(int, 1), default=10, help="of PGD")
    add("--step-size", type=number(float, 0, 255), help="of PGD, in 1/255 (default: eps / 4)")
    add("--search-precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster, and ends in float32")
    add("--individual", action="store_true", help="every attack on all images")
    add("--n", type=number(int, 1), help="the first N test images (default: all)")
    add("--dataset", help="cifar10, cifar100 or an .npz (default: what the run was trained on)")
    add("--data-dir", default="data", help="where cifar10 and cifar100 are, or are downloaded to")
    add("--batch-size", type=number(int, 1), help="images attacked at a time (default: 64 on a CPU, else 250)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of every random start and query")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--state", metavar="FILE", help="save progress to this file, and continue from it if it exists")
    add("--json", metavar="FILE", help="write the numbers to this file")
    add("--examples", metavar="FILE", help="write a PNG of broken images to this file")
    add("--save-adv", metavar="FILE", help="write all adversarial images to this file, an .npz")
    add("--save-adv-as", choices=("float32", "uint8"), default="float32", help="uint8: rounded, and judged again")
    args = parser.parse_args()
    if (args.run is None) == (args.model is None):
        parser.error("give either a run or --model FILE:FUNCTION")
    if args.model and args.dataset is None:
        parser.error("--model needs --dataset: cifar10, cifar100 or an .npz")
    if args.weights and not args.model:
        parser.error("--weights needs --model")
    for name in args.attack.split(","):
        if name not in (*ATTACKS, "autoattack"):
            parser.error(f"argument --attack: {name!r} is not one of {names}")
    for file in filter(None, (args.json, args.examples, args.save_adv, args.state)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"cannot write {file}: there is no folder {Path(file).absolute().parent}")
    args.device = find_device(args.device)
    return args


def load_network(args):
    """The network that the flags name, in eval mode on its device; ValueError in one line."""
    from wrn import load_file, load_model

    if args.run:
        return load_model(args.run, args.device)
    weights = load_file(args.weights) if args.weights else None
    file, _, function = args.model.rpartition(":")
    task = f"argument --model FILE:FUNCTION: {args.model}"
    try:
        sys.path.insert(0, str(Path(file).absolute().parent))
        model = runpy.run_path(file)[function]()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{function}() returned {type(model).__name__}, not an nn.Module")
        if weights is not None:  # "module." is what torch's DataParallel puts before every name
            task, weights = f"{args.weights} does not fit {args.model}", weights.get("state_dict", weights)
            model.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    except Exception as error:
        raise ValueError(f"{task}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    return model.float().to(args.device, memory_format=torch.channels_last).eval()


def load_state(args, model, x, y):
    """What the --state file holds, {"identity": ...} alone if it does not exist yet; ValueError in one line."""
    from wrn import load_file

    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.cpu().flatten().contiguous().numpy().tobytes())
    flags = ("attack", "eps", "steps", "restarts", "step_size", "search_precision", "individual", "n", "seed")
    identity = {"the network or the images": digest.hexdigest()}
    identity |= {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
    if not Path(args.state).exists():
        return {"identity": identity}
    try:
        state = load_file(args.state)
        before = {key: state["identity"][key] for key in identity}
        state["robust"], state["x_adv"] = state["robust"].to(x.device), state["x_adv"].to(x.device)
        state["survivors"] = {name: mask.to(x.device) for name, mask in state["survivors"].items()}
    except Exception:
        raise ValueError(f"{args.state} is damaged, or not the state of an evaluation: delete or rename it") from None
    for key, value in identity.items():
        if before[key] != value:
            change = f"{key} was {before[key]} there and is {value} now" if key[0] == "-" else f"{key} were different"
            raise ValueError(f"{args.state} belongs to another evaluation ({change}): delete it, or name another file")
    return state


def progress_of_attack(name):
    """A `report` for an attack that shows how many images are unbroken, and a bound on the time left."""
    from common import StatusLine, clock

    line, begin = StatusLine(), time.perf_counter()

    def report(done, left, robust):
        if left == 0:
            line.clear()
        elif line.due():
            bound = clock((time.perf_counter() - begin) * left / max(done, 1))
            line.show(f"{name}: {int(robust.sum()):,} of {len(robust):,} unbroken, at most {bound} left")

    return report


def main():
    import common

    args = parse_args()
    try:
        model = load_network(args)
        data = common.load_test_data(args, model.arguments["num_classes"] if args.run else math.inf)
        x, y = data.test(args.n)
        state = load_state(args, model, x, y) if args.state else {}
    except ValueError as error:
        common.fail(error)
    network, eps = args.run or args.model, args.eps / 255
    print(f"network  {network}, {args.device}, search in {args.search_precision}, verdicts in fp32")
    print(f"images   first {len(y):,} test images of {data.name}, eps {args.eps:g}/255")
    start = time.perf_counter()
    logits = outputs(model, x, args.batch_size)
    if logits.dim() != 2 or logits.shape[1] <= y.max() or not logits.isfinite().all():
        common.fail(f"{network} does not give finite logits for {int(y.max()) + 1} or more classes")
    correct = logits.argmax(1) == y
    rows = [("clean", correct, time.perf_counter() - start)]
    warnings = check_network(model, x, y, eps)
    state = {"robust": correct, "x_adv": x.clone(), "survivors": {}, "seconds": {}, "search": None} | state

    def save(progress):  # of the attack `name`, which began at `start`
        state["search"], state["seconds"][name] = progress, time.perf_counter() - start
        if args.state:
            common.write_torch(args.state, state)

    options = {"batch_size": args.batch_size, "seed": args.seed, "precision": args.search_precision}
    of_pgd = {"steps": args.steps, "restarts": args.restarts, "step_size": args.step_size and args.step_size / 255}
    for name in dict.fromkeys(args.attack.replace("autoattack", ",".join(AUTOATTACK)).split(",")):
        label = f"pgd-{args.steps}-{args.restarts}" if name == "pgd" else name
        if name not in state["survivors"]:
            start = time.perf_counter() - state["seconds"].get(name, 0)
            own = {"report": progress_of_attack(label), "save": save, "resume": state["search"], **options}
            own |= of_pgd if name == "pgd" else {}
            todo = (correct if args.individual else state["robust"]).nonzero().flatten()
            survivors = torch.zeros_like(correct)
            survivors[todo], found = ATTACKS[name](model, x[todo], y[todo], eps, **own)
            broken = state["robust"] & ~survivors
            state["x_adv"][broken] = found[broken[todo]]
            state["robust"], state["survivors"][name] = state["robust"] & survivors, survivors
            save(None)
        rows.append((label, state["survivors"][name], state["seconds"][name]))
    warnings += check_survivors(state["survivors"])
    if "autoattack" in args.attack.split(","):
        left = torch.stack([state["survivors"][name] for name in AUTOATTACK]).all(0)
        rows.append(("autoattack", left, sum(state["seconds"][name] for name in AUTOATTACK)))
    robust, x_adv = state["robust"], state["x_adv"]
    seconds = rows[0][2] + sum(state["seconds"].values())
    accuracy = {name: percent(survivors) for name, survivors, _ in rows}
    print(f"\n{'attack':<16}{'accuracy %':>10}{'seconds':>10}")
    for name, survivors, took in rows + [("all of them", robust, seconds)] * (len(rows) > 2):
        print(f"{name:<16}{percent(survivors):>10.2f}{took:>10.1f}")
    for warning in warnings:
        print(f"warning: {warning}")
    if args.examples:
        shown = (correct & ~robust).nonzero().flatten()[:10]
        save_examples(args.examples, model, x[shown], x_adv[shown], y[shown], data.classes)
    if args.save_adv:
        save_adversarial(args, model, x, x_adv, y, eps)
    if args.json:
        result = {"clean": accuracy.pop("clean"), "robust": percent(robust), "attacks": accuracy, "n": len(y)}
        result |= {"eps": args.eps, "seconds": seconds, "seconds_per_attack": {name: s for name, _, s in rows[1:]}}
        result |= {"individual": args.individual, "search_precision": args.search_precision, "warnings": warnings}
        result |= {"dataset": data.name, "seed": args.seed, **common.versions(args.device)}
        result["training"] = common.training_of(args.run) if args.run else None
        common.write_text(args.json, json.dumps(result, indent=1) + "\n")


def save_adversarial(args, model, x, x_adv, y, eps):
    """An .npz: x (N, H, W, C), uint8 or float32 in [0, 1]; y; adversarial (N,): is x, as saved, misclassified?"""
    import numpy as np

    import common

    if args.save_adv_as == "uint8":
        pixels, radius = (x * 255).round(), math.floor(args.eps)
        x_adv = (x_adv * 255).round().clamp(pixels - radius, pixels + radius).clamp(0, 255) / 255
    verdict = is_adversarial(model, x, x_adv, y, eps)
    images = x_adv if args.save_adv_as == "float32" else (x_adv * 255).round().to(torch.uint8)
    arrays = {"x": images.permute(0, 2, 3, 1), "y": y, "adversarial": verdict}
    file = io.BytesIO()
    np.savez_compressed(file, **{key: value.cpu().numpy() for key, value in arrays.items()}, eps=args.eps)
    common.write_file(args.save_adv, file.getbuffer())
    print(f"\n{args.save_adv}: {len(y):,} images as {args.save_adv_as}, {int(verdict.sum()):,} of them misclassified")


def save_examples(path, model, x, x_adv, y, classes):
    """A PNG, one column per image: clean, smoothed perturbation (red is brighter, blue is darker), adversarial."""
    from torchvision.utils import save_image

    if not len(x):
        print(f"no image was broken: {path} not written")
        return
    change = F.avg_pool2d((x_adv - x).mean(1, keepdim=True), 3, stride=1, padding=1)
    change = change / change.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-9)  # each on its own scale
    red_blue = torch.cat([1 - (-change).clamp(min=0), 1 - change.abs(), 1 - change.clamp(min=0)], 1)
    shown = F.interpolate(torch.cat([x, red_blue, x_adv]), scale_factor=4, mode="bicubic").clamp(0, 1)
    save_image(shown, path, nrow=len(x), padding=6, pad_value=1.0)
    print(f"\n{path}\nclean; perturbation (smoothed, red is brighter, blue is darker); adversarial")
    for column, (label, guess) in enumerate(zip(y.tolist(), predict(model, x_adv).tolist()), 1):
        print(f"  column {column:>2}: {classes[label]} is taken for {classes[guess]}")


if __name__ == "__main__":
    import common

    common.launch(main)
