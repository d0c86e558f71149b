#!/usr/bin/env python3
"""Robust accuracy of a network on images in [0, 1]: PGD with restarts and AutoAttack, in one file.

    python eval_attacks.py runs/NAME --attack autoattack --eps 8 --n 1000

The attacks need torch alone and take any network that maps images (N, C, H, W) in [0, 1] to logits:

    from eval_attacks import autoattack
    robust, x_adv = autoattack(model.eval(), x, y, eps=8 / 255)

Threat model: l-infinity, |x_adv - x| <= eps and x_adv in [0, 1]. An image is broken when the network
misclassifies it as it is, or once a point was found that lies within both bounds and is misclassified
in float32. What the search itself computes in is a matter of speed; what it claims is checked.

Read in this order: the losses, `search` (the active set that all attacks share), the attacks, the checks,
the command line. An attack is a class with a `start` and a `step`; PGD is the shortest.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

# Computing |x_adv - x| <= eps rounds too: a few units in the last place of a float32 near 1.
ROUNDING = 5e-7
# A search in bfloat16 ends with 1 / AGAIN of its iterations in float32.
AGAIN = 20
# Seconds between two calls of `save`: with 10,000 images a state is 250 MB.
SAVE_EVERY = 60
# Seconds between two calls of `report`: what is left is a sum over everything to come.
REPORT_EVERY = 0.2

# ---------------------------------------------------------------- verdicts


def default_batch_size(x):
    """Images at once: on a CPU what fits its caches."""
    return 64 if x.device.type == "cpu" else 250


def logits_at(model, point):
    """Logits (B, classes), in float32 or better, of images (B, C, H, W)."""
    logits = model(point.contiguous(memory_format=torch.channels_last))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def outputs(model, x, batch_size=None):
    """Logits (N, classes) of images x (N, C, H, W), computed in float32 whatever autocast is on outside."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.cat([logits_at(model, part) for part in x.split(batch_size or default_batch_size(x))])


def predict(model, x, batch_size=None):
    """Class indices (N,) of images x (N, C, H, W), as `outputs` computes them."""
    return outputs(model, x, batch_size).argmax(1)


def is_adversarial(model, x, x_adv, y, eps):
    """(N,) bool: x_adv lies within eps of x and within [0, 1], and is misclassified in float32."""
    within_eps = (x_adv - x).abs().flatten(1).amax(1) <= eps + ROUNDING
    within_box = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
    verdict = within_eps & within_box
    if verdict.any():
        verdict[verdict.clone()] = predict(model, x_adv[verdict]) != y[verdict]
    return verdict


def percent(right):
    """How many of a bool tensor are True, in per cent."""
    return 100 * int(right.sum()) / right.numel()


# ---------------------------------------------------------------- losses, to be raised: (B,) from logits (B, classes)


def of_class(logits, y):
    return logits.gather(1, y[:, None])[:, 0]


def margin(logits, y, target=None):
    """The best wrong logit minus the right one: above zero means misclassified."""
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - of_class(logits, y)


def cross_entropy(logits, y, target=None):
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits, y, target=None):
    """Difference of logits ratio (Croce & Hein 2020, eq. 6). Of two classes it would be +-1: there it is the margin."""
    top = logits.sort(1, descending=True)[0]
    scale = top[:, 0] - top[:, 2] + 1e-12 if logits.shape[1] > 2 else 1
    return margin(logits, y) / scale


def dlr_targeted(logits, y, target):
    """Targeted DLR (Croce & Hein 2020, eq. 7), which needs four classes; of three it divides as `dlr` does."""
    top = logits.sort(1, descending=True)[0]
    third = top[:, 2:4].mean(1) if logits.shape[1] > 2 else top[:, 0] - 1
    return difference(logits, y, target) / (top[:, 0] - third + 1e-12)


def difference(logits, y, target):
    """The target's logit minus the right one: above zero means misclassified."""
    return of_class(logits, target) - of_class(logits, y)


def ascend(model, point, loss, y, target):
    """logits, the loss (B,) and its gradient at point (B, C, H, W)."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_at(model, point)
        value = loss(logits, y, target)
        # The sum over the batch, not the mean: an image's gradient must not depend on its neighbours.
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return logits.detach(), value.detach(), gradient.contiguous()


# ---------------------------------------------------------------- the active set


def noise(shape, seed, image, trial):
    """Uniform in [-1, 1], a function of its arguments alone: not of what else is in the batch."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + trial) * 1_000_003 + image) % 2**63)
    return torch.rand(shape, generator=generator) * 2 - 1


def per_image(values):
    """(B,) -> (B, 1, 1, 1), so that it multiplies images."""
    return values.view(-1, 1, 1, 1)


def again_in_float32(length):
    """Iterations in float32 after `length` of them in bfloat16."""
    return math.ceil(length / AGAIN)


def bounds(x, eps):
    """The lowest and the highest point within eps of x and within [0, 1]; clamping to them projects."""
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def take(state, keep):
    """The rows of an active set where keep (B,) is True."""
    rows = keep.nonzero().flatten()
    return state if len(rows) == len(keep) else {key: value.index_select(0, rows) for key, value in state.items()}


def join(state, more):
    return {key: torch.cat([state[key], more[key]]) for key in more} if state else more


class FixedBatchNorm(torch.autograd.Function):
    """BatchNorm in eval mode: its backward is one product. torch's also sums what only weights would need."""

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
    """Only gradients of images: none of weights, and nothing kept or computed for them."""
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
    """Run an attack on all images, `trials` restarts or target classes each; the engine of every function below.

    model: images in [0, 1] -> logits, in eval mode. x: (N, C, H, W) float32 in [0, 1]; y: (N,) class indices.
    eps: in [0, 1] units.
    Returns robust, (N,) bool, and x_adv, (N, C, H, W): a misclassified point where one was found, else the
    strongest that the last trial saw (FAB: x itself, its points lie outside the ball).

    One active set of up to batch_size rows (None: 64 on a CPU, else 250), a row being one trial of one image.
    An image leaves with all its rows at its first misclassified point, and the next trial in the queue (first
    trials of all images, then second ones, ...) takes the place. What is random depends on (seed, image, trial)
    alone, so batch_size changes the speed and which of several adversarial points is returned, but no verdict.

    precision: None searches as autocast is set outside, "fp32" in float32, "bf16" in bfloat16. What bfloat16 leaves
    unbroken is attacked again in float32, from the best point of every trial, for a twentieth of the iterations.
    Points are judged in float32 in any case.
    report(done, left, robust): iterations of rows so far and at most to come; a few times a second, and at the end.
    save(state): called every SAVE_EVERY seconds between two steps; `resume=state` goes on from there.
    """
    if not len(x):
        return torch.ones_like(y, dtype=torch.bool), x.clone()
    batch_size = batch_size or default_batch_size(x)
    logits = outputs(model, x, batch_size)
    robust = logits.argmax(1) == y
    ranking = logits.scatter(1, y[:, None], math.inf).argsort(1, descending=True)  # y, then the others, best first
    trials = min(trials, logits.shape[1] - 1) if attack.targeted else trials
    first = robust.nonzero().flatten()
    queue = torch.stack([first.repeat(trials), torch.arange(trials, device=x.device).repeat_interleave(len(first))], 1)
    x_adv = x.clone()
    fp32, bf16 = (functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=e) for e in (False, True))
    contexts = {None: [contextlib.nullcontext], "fp32": [fp32], "bf16": [bf16, fp32]}[precision]
    ends = [attack.length, attack.length + again_in_float32(attack.length)][: len(contexts)]
    sets = [{} for _ in ends]  # with bf16: the rows in bfloat16, and those in float32 after it
    begun, done, saved, reported = 0, 0, time.monotonic(), 0.0
    if resume:
        robust, x_adv, sets = resume["robust"].to(x.device), resume["x_adv"].to(x), resume["sets"]
        sets = [{key: value.to(x.device) for key, value in s.items()} for s in sets]
        begun, done = resume["begun"], resume["done"]
        if any(len(value) != len(s["image"]) for s in sets for value in s.values()):
            raise ValueError("rows of an active set do not fit each other")

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
                    new["low"], new["high"] = bounds(new["x"], eps)
                    if attack.targeted:
                        new["target"] = ranking[image, trial + 1]
                    sets[0] = join(sets[0], attack.start(new, seed))
            # The float32 set waits until it is full, or until there is nothing else to do.
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
                # Two trials may break an image in one step: the first row counts.
                winners = dict(zip(image[truly].tolist()[::-1], rows[truly].tolist()[::-1]))
                if winners:
                    image, row = (torch.tensor(list(v), device=x.device) for v in (winners.keys(), winners.values()))
                    x_adv[image], robust[image] = candidate[row].to(x_adv.dtype), False
            over = robust[s["image"]] & (s["age"] >= ends[k])
            if over.any():
                ended = take(s, over)
                if k + 1 < len(sets):
                    sets[k + 1] = join(sets[k + 1], attack.again(ended))
                else:
                    last = ended["trial"] == trials - 1
                    x_adv[ended["image"][last]] = ended["best"][last]
            sets[k] = take(s, ~over)
            if len(rows):
                sets = [take(s, robust[s["image"]]) if s else s for s in sets]
            if report and time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                ahead = robust[queue[begun:, 0]].sum() * ends[-1]
                report(done, int(ahead + sum((ends[-1] - s["age"]).sum() for s in sets if s)), robust)
            if save and time.monotonic() - saved >= SAVE_EVERY:
                saved = time.monotonic()
                save({"robust": robust, "x_adv": x_adv, "sets": sets, "begun": begun, "done": done})


# ---------------------------------------------------------------- attacks


class Pgd:
    targeted = False

    def __init__(self, eps, steps, step_size, random_start):
        self.eps, self.step_size, self.random_start = eps, step_size, random_start
        self.length = steps + 1  # the last point is looked at too

    def start(self, s, seed):
        s["point"] = s["x"]
        if self.random_start:
            s["point"] = (s["x"] + self.eps * start_noise(s, seed)).clamp(s["low"], s["high"])
        return s | {"best": s["point"]}

    def again(self, s):
        return s

    def step(self, model, s):
        logits, _, gradient = ascend(model, s["point"], cross_entropy, s["y"], None)
        s["best"] = s["point"]
        s["point"] = (s["point"] + self.step_size * gradient.sign()).clamp(s["low"], s["high"])
        return s["best"], logits


def start_noise(s, seed, shape=None):
    """noise for every row of a set; shape: of one row, that of its image by default."""
    shape = shape or s["x"].shape[1:]
    return torch.stack([noise(shape, seed, *job) for job in zip(s["image"].tolist(), s["trial"].tolist())]).to(s["x"])


def pgd(model, x, y, eps, steps=50, restarts=10, step_size=None, random_start=True, **options):
    """Projected gradient descent (Madry et al. 2017, arXiv:1706.06083) on the cross-entropy.

    step_size: in [0, 1] units; None is eps / 4, which is 2/255 at eps 8/255. Each restart begins uniformly in
    the eps-ball (random_start=False: at x itself), clipped to [0, 1]. The rest: see `search`.
    """
    attack = Pgd(eps, steps, eps / 4 if step_size is None else step_size, random_start)
    return search(model, x, y, eps, attack, restarts, **options)


def fgsm(model, x, y, eps, **options):
    """One step of size eps from x (Goodfellow et al. 2014, arXiv:1412.6572), as an attack: see `search`."""
    return pgd(model, x, y, eps, 1, 1, eps, False, **options)


def checkpoints(steps):
    """Iterations at which APGD may halve its step: 22, 41, 57, 70, 80, 87, 93, 99 of 100 (Croce & Hein 2020, 3.1)."""
    window, at = max(int(0.22 * steps), 1), []
    while sum(at) + window <= steps:
        at.append(window)
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return [sum(at[: j + 1]) for j in range(len(at))]


class Apgd:
    def __init__(self, eps, steps, loss):
        self.eps, self.loss = eps, LOSSES[loss]
        self.targeted = loss == "dlr-targeted"
        self.length = steps + 1
        # window[i]: 0, or how many iterations ago the last checkpoint was if there is one after iteration i.
        # The second part is for the float32 iterations after a bfloat16 search.
        more = again_in_float32(self.length)
        self.window = torch.zeros(self.length + more, dtype=torch.long)
        for begin, count in ((0, steps), (self.length, more - 1)):
            at = checkpoints(count)
            for previous, now in zip([0, *at], at):
                self.window[begin + now] = now - previous

    def start(self, s, seed):
        t = start_noise(s, seed)
        t = t / t.abs().amax((1, 2, 3), keepdim=True)
        s["best"] = (s["x"] + self.eps * t).clamp(s["low"], s["high"])
        return self.begin(s, 2 * self.eps)

    def again(self, s):
        return self.begin(s, self.eps / 4)

    def begin(self, s, step_size):
        """Everything at s["best"], with nothing known of it."""
        value = torch.full_like(s["best"][:, 0, 0, 0], math.inf)
        return s | {
            "point": s["best"],
            "previous": s["best"],  # where the last step left
            "best_gradient": torch.zeros_like(s["best"]),
            "loss": value,  # where the last step left
            "best_loss": -value,
            "best_loss_then": -value,  # at the last checkpoint
            "raised": torch.zeros_like(s["age"]),  # iterations since the last checkpoint that raised the loss
            "halved": torch.ones_like(s["age"], dtype=torch.bool),  # at the last checkpoint
            "step_size": torch.full_like(value, step_size),
        }

    def step(self, model, s):
        candidate = point = s["point"]
        logits, loss, gradient = ascend(model, point, self.loss, s["y"], s.get("target"))
        s["raised"] = s["raised"] + (loss > s["loss"])
        better = loss > s["best_loss"]
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best"] = torch.where(per_image(better), point, s["best"])
        s["best_gradient"] = torch.where(per_image(better), gradient, s["best_gradient"])

        window = self.window.to(point.device)[s["age"]]
        check = window > 0
        if check.any():
            few = s["raised"] < 0.75 * window
            stuck = ~s["halved"] & (s["best_loss"] <= s["best_loss_then"])
            halve = check & (few | stuck)
            s["step_size"] = torch.where(halve, s["step_size"] / 2, s["step_size"])
            point = torch.where(per_image(halve), s["best"], point)
            gradient = torch.where(per_image(halve), s["best_gradient"], gradient)
            loss = torch.where(halve, s["best_loss"], loss)
            s["halved"] = torch.where(check, halve, s["halved"])
            s["best_loss_then"] = torch.where(check, s["best_loss"], s["best_loss_then"])
            s["raised"] = torch.where(check, 0, s["raised"])

        moved = (point + per_image(s["step_size"]) * gradient.sign()).clamp(s["low"], s["high"])
        # The first iteration has no momentum: there point is previous, and a is 1.
        a = per_image(torch.where(s["loss"].isposinf(), 1.0, 0.75).to(point))
        moved = point + a * (moved - point) + (1 - a) * (point - s["previous"])
        s["previous"], s["loss"], s["point"] = point, loss, moved.clamp(s["low"], s["high"])
        return candidate, logits


LOSSES = {"ce": cross_entropy, "dlr": dlr, "dlr-targeted": dlr_targeted}


def apgd(model, x, y, eps, loss="ce", steps=100, restarts=1, targets=9, **options):
    """Auto-PGD (Croce & Hein 2020, arXiv:2003.01690, Algorithm 1): momentum, and a step that halves by itself.

    loss: "ce", "dlr", or "dlr-targeted", which has one trial for each of the `targets` highest wrong classes of
    the clean image (all of them where there are fewer) instead of restarts. The rest: see `search`.
    """
    attack = Apgd(eps, steps, loss)
    return search(model, x, y, eps, attack, targets if attack.targeted else restarts, **options)


def project_to_plane(point, w, gap):
    """The smallest d in l-infinity with <w, d> = gap and point + d in [0, 1].

    point, w: (B, D); gap: (B,). Where the box keeps the plane out of reach, the d that comes nearest.
    d moves every coordinate the right way by t, or as far as the box lets it: d_i = +-min(t, room_i). How far
    that reaches, sum_i |w_i| min(t, room_i), is concave in t and piecewise linear, so Newton's method from
    t = 0 never overshoots and ends after a few pieces; no sorting.
    """
    way = w.sign() * gap.sign()[:, None]
    room = torch.where(way > 0, 1 - point, point)
    w, gap = w.abs(), gap.abs()
    t = gap / w.sum(1).clamp(min=torch.finfo(w.dtype).tiny)  # right where the box is not in the way
    tolerance = 100 * torch.finfo(w.dtype).eps
    for _ in range(100):
        missing = gap - (w * torch.minimum(room, t[:, None])).sum(1)
        slope = (w * (room > t[:, None])).sum(1)
        going = (missing > tolerance * gap) & (slope > 0)
        if not going.any():
            break
        t = torch.where(going, t + missing / slope, t)
    return way * torch.minimum(room, t[:, None])


class Fab:
    targeted = True
    alpha_max, eta, beta = 0.1, 1.05, 0.9

    def __init__(self, steps):
        self.length = steps

    def start(self, s, seed):
        return s | {"point": s["x"], "best": s["x"]}

    def again(self, s):
        return s

    def step(self, model, s):
        x, point = s["x"].flatten(1), s["point"].flatten(1)
        _, gap, w = ascend(model, s["point"], difference, s["y"], s["target"])
        w = w.flatten(1)
        # To the linearised boundary, from where it is and from the clean image; then between the two.
        d = project_to_plane(point, w, -gap)
        d_clean = project_to_plane(x, w, -gap - (w * (x - point)).sum(1))
        a, a_clean = (v.abs().amax(1, keepdim=True).clamp(min=1e-8) for v in (d, d_clean))
        alpha = (a / (a + a_clean)).clamp(max=self.alpha_max)
        candidate = ((1 - alpha) * (point + self.eta * d) + alpha * (x + self.eta * d_clean)).clamp(0, 1)
        candidate = candidate.view_as(s["x"])
        with torch.no_grad():
            logits = logits_at(model, candidate)
        wrong = per_image(logits.argmax(1) != s["y"])
        s["point"] = torch.where(wrong, s["x"] + self.beta * (candidate - s["x"]), candidate)
        return candidate, logits


def fab(model, x, y, eps, steps=100, targets=9, **options):
    """Targeted fast adaptive boundary attack (Croce & Hein 2019, arXiv:1907.02044), one trial a target class.

    It looks for the nearest misclassified point; one within eps breaks the image. The rest: see `search`.
    """
    return search(model, x, y, eps, Fab(steps), targets, **options)


class Square:
    targeted = False
    halvings = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    def __init__(self, queries, p, restarts, shape, seed):
        self.length = queries
        # Where query i of a restart puts its square and which colours it has, the same for all images.
        total = queries + again_in_float32(queries)
        self.random = torch.rand(restarts, total, 2 + shape[0], generator=torch.Generator().manual_seed(seed))
        share = [p / 2 ** sum(i > h for h in self.halvings) for i in range(total)]
        self.side = torch.tensor([max(round(math.sqrt(v * shape[1] * shape[2])), 1) for v in share])
        self.side = self.side.clamp(max=min(shape[1:]))

    def start(self, s, seed):
        channels, _, width = s["x"].shape[1:]
        stripes = start_noise(s, seed, (channels, 1, width))
        return self.again(s | {"best": torch.where(stripes > 0, s["high"], s["low"])})

    def again(self, s):
        return s | {"margin": torch.full_like(s["x"][:, 0, 0, 0], -math.inf)}  # nothing known of s["best"]

    def step(self, model, s):
        side = self.side.to(s["x"].device)[s["age"]]
        random = self.random.to(s["x"].device)[s["trial"], s["age"]]
        inside = []
        for n, u in zip(s["x"].shape[2:], random.T):
            corner = (u * (n - side + 1)).long()
            i = torch.arange(n, device=side.device)
            inside.append((i >= corner[:, None]) & (i < (corner + side)[:, None]))
        inside = inside[0][:, None, :, None] & inside[1][:, None, None, :] & per_image(s["margin"] > -math.inf)
        recoloured = torch.where(random[:, 2:, None, None] > 0.5, s["high"], s["low"])
        candidate = torch.where(inside, recoloured, s["best"])
        with torch.no_grad():
            logits = logits_at(model, candidate)
        value = margin(logits, s["y"]).to(s["margin"])
        better = value > s["margin"]
        s["margin"] = torch.where(better, value, s["margin"])
        s["best"] = torch.where(per_image(better), candidate, s["best"])
        return candidate, logits


def square(model, x, y, eps, queries=5000, p=0.8, restarts=1, seed=0, **options):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049, Algorithms 1 and 2): random search, no gradients.

    Starts from vertical stripes of +-eps; a query recolours one square to +-eps and stays if it raises the margin.
    p: share of the image that the square covers, halved after 10, 50, 200, ... queries. The rest: see `search`.
    """
    attack = Square(queries, p, restarts, x.shape[1:], seed)
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
    """Standard AutoAttack (Croce & Hein 2020, arXiv:2003.01690): four attacks, each on what the ones before left.

    APGD-CE (100 iterations), APGD-T and FAB-T (100 iterations for each of 9 target classes), Square (5,000 queries).
    Returns robust (N,) and x_adv (N, C, H, W); the arguments: see `search`.
    """
    robust, x_adv = torch.ones_like(y, dtype=torch.bool), x.clone()
    for name in AUTOATTACK:
        left = robust.nonzero().flatten()
        robust[left], x_adv[left] = ATTACKS[name](model, x[left], y[left], eps, **options)
    return robust, x_adv


# ---------------------------------------------------------------- checks


def check_network(model, x, y, eps, count=250):
    """Reasons to mistrust what any attack finds on this network, a list of sentences; x, y: some images."""
    x, y, found = x[:count], y[:count], []
    logits = outputs(model, x)
    classes = logits.shape[1]
    if isinstance(model, torch.nn.Module) and any(module.training for module in model.modules()):
        found.append("the network is in train mode: call model.eval() first")
    if not torch.allclose(logits, outputs(model, x), rtol=1e-3, atol=1e-4):
        found.append("the network is randomised: two passes differ, and one verdict on a point means little")
    if logits.min() >= 0 and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        found.append("outputs are probabilities, not logits (a softmax at the end?): gradients vanish, leave it out")
    with frozen(model), torch.autocast(x.device.type, enabled=False):
        point = (x + eps * torch.rand_like(x) - eps / 2).clamp(0, 1)
        zero = (ascend(model, point, cross_entropy, y, None)[2] == 0).flatten(1).all(1) & (logits.argmax(1) == y)
    if zero.any():
        found.append(
            f"the gradient is exactly zero at {int(zero.sum())} of {len(x)} images: "
            "it is masked there, and only Square attacks them"
        )
    if classes < 10:
        found.append(f"{classes} classes: the targeted attacks take {classes - 1} targets instead of 9")
    return found


def check_survivors(survivors):
    """The same after the attacks; survivors: {attack: (N,) bool, what was unbroken after it}, in their order."""
    names = list(survivors)
    others = names[: names.index("square")] if "square" in names else []
    if not others:
        return []
    before = torch.stack([survivors[name] for name in others]).all(0)
    more = int((before & ~survivors["square"]).sum())
    if more <= 0.002 * len(before):  # AutoAttack's threshold: one image in a thousand is the luck of a search
        return []
    return [
        f"Square, which uses no gradients, broke {more} of {len(before)} images that {', '.join(others)} "
        "could not: the gradients may be masked, and the robust accuracy too high"
    ]


# ---------------------------------------------------------------- command line


def parse_args():
    import common

    number = common.number
    parser = common.Parser(
        description=__doc__.split("\n")[0],
        formatter_class=common.Help,
        epilog="--model runs the Python file that it names: name only one "
        "that you trust. Weights, states and data files are loaded so that they cannot run code.",
    )
    add = parser.add_argument
    add("run", nargs="?", help="run folder (its model.pt), or a model.pt, best.pt or checkpoint.pt")
    add("--model", metavar="FILE:FUNCTION", help="instead of a run: my_net.py:make_model, which returns a network")
    add("--weights", metavar="FILE", help="a state_dict for --model, alone or under 'state_dict'")
    names = ", ".join([*ATTACKS, "autoattack"])
    add("--attack", default="pgd", help=f"comma-separated, each on what the ones before left: {names}")
    add("--eps", type=number(float, 0, 255), default=8, help="l-infinity radius, in 1/255")
    add("--steps", type=number(int, 1), default=50, help="of PGD")
    add("--restarts", type=number(int, 1), default=10, help="of PGD")
    add("--step-size", type=number(float, 0, 255), help="of PGD, in 1/255 (default: eps / 4)")
    help = "bf16: faster; what it leaves unbroken is attacked again in float32, a twentieth of the iterations"
    add("--search-precision", choices=("fp32", "bf16"), default="fp32", help=help)
    add("--individual", action="store_true", help="every attack on all images")
    add("--n", type=number(int, 1), help="the first N test images (default: all)")
    add("--dataset", help="cifar10, cifar100 or an .npz (default: what the run was trained on)")
    add("--data-dir", default="data", help="where cifar10 and cifar100 are, or are downloaded to")
    add("--batch-size", type=number(int, 1), help="of the active set (default: 64 on a CPU, else 250)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of every random start and query")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--state", metavar="FILE", help="save progress there, and go on from it if it is there")
    add("--json", metavar="FILE", help="write the numbers there")
    add("--examples", metavar="FILE", help="write a PNG of broken images there")
    add("--save-adv", metavar="FILE", help="write all adversarial images there, an .npz")
    help = "uint8: rounded to whole pixel values within eps, and judged again"
    add("--save-adv-as", choices=("float32", "uint8"), default="float32", help=help)
    args = parser.parse_args()
    if (args.run is None) == (args.model is None):
        parser.error("give a run, or --model FILE:FUNCTION instead")
    if args.model and args.dataset is None:
        parser.error("--model needs --dataset: cifar10, cifar100 or an .npz")
    if args.weights and not args.model:
        parser.error("--weights goes with --model")
    for name in args.attack.split(","):
        if name not in (*ATTACKS, "autoattack"):
            parser.error(f"argument --attack: {name!r} is none of {names}")
    for file in filter(None, (args.json, args.examples, args.save_adv, args.state)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"no folder {Path(file).absolute().parent} to write {file} to")
    args.device = common.find_device(args.device)
    return args


def load_network(args):
    """The network that the flags name, in eval mode on its device; ValueError in one line."""
    from wrn import load_file, load_model

    if args.run:
        return load_model(args.run, args.device)
    file, _, function = args.model.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"argument --model: no file {file!r}, it must be FILE:FUNCTION, as in my_net.py:make_model")
    try:
        sys.path.insert(0, str(Path(file).absolute().parent))
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = getattr(module, function)()
    except Exception as error:
        raise ValueError(f"argument --model: {args.model}: {type(error).__name__}: {error}") from None
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"argument --model: {function}() returned a {type(model).__name__}, not an nn.Module")
    if args.weights:
        weights = load_file(args.weights)
        weights = weights.get("state_dict", weights)
        try:  # "module." is what torch's DataParallel puts before every name
            model.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{args.weights} does not fit {args.model}: {reason[:200]}") from None
    return model.float().to(args.device, memory_format=torch.channels_last).eval()


def load_state(args, model, x, y):
    """The --state file's content, {} where there is none yet; ValueError where it is another evaluation's."""
    from wrn import load_file

    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.cpu().flatten().contiguous().numpy().tobytes())
    flags = ("attack", "eps", "steps", "restarts", "step_size", "search_precision", "individual", "n", "seed")
    identity = {"the network or the images": digest.hexdigest()}
    identity |= {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
    if not Path(args.state).exists():
        return {"identity": identity}
    state = load_file(args.state)
    before = state.get("identity")
    if not isinstance(before, dict) or before.keys() != identity.keys():
        raise ValueError(f"{args.state} is no state of an evaluation: name another file")
    for key, value in identity.items():
        if before[key] != value:
            change = f"{key} was {before[key]} there and is {value} now" if key[0] == "-" else f"{key} were others"
            raise ValueError(f"{args.state} is of another evaluation ({change}): name another file, or delete it")
    try:
        masks = {name: mask.to(x.device) for name, mask in {**state["survivors"], "robust": state["robust"]}.items()}
        if any(mask.shape != y.shape or mask.dtype != torch.bool for mask in masks.values()):
            raise ValueError("verdicts on other images")
        seconds = {name: float(value) for name, value in state["seconds"].items()}
        x_adv = state["x_adv"].to(x.device)
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype or not masks.keys() - {"robust"} <= seconds.keys():
            raise ValueError("something is missing")
        robust = masks.pop("robust")
        return state | {"robust": robust, "x_adv": x_adv, "survivors": masks, "seconds": seconds}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{args.state} is damaged ({error}): delete it to start anew") from None


def main():
    import common

    args = parse_args()
    try:
        model = load_network(args)
        data = common.load_test_data(args, model.arguments["num_classes"] if args.run else math.inf)
        x, y = data.test(args.n)
        eps, n = args.eps / 255, len(y)
        state = load_state(args, model, x, y) if args.state else {}
    except ValueError as error:
        common.fail(error)
    network = args.run or args.model
    print(f"network  {network}, {args.device}, search in {args.search_precision}, verdicts in fp32")
    print(f"images   first {n:,} test images of {data.name}, eps {args.eps:g}/255")
    start = time.perf_counter()
    logits = outputs(model, x, args.batch_size)
    if logits.dim() != 2 or logits.shape[1] <= y.max():
        common.fail(f"{network} gives {tuple(logits.shape[1:])} outputs an image, and labels go up to {int(y.max())}")
    if not logits.isfinite().all():
        common.fail(f"{network} gives outputs that are not finite: its weights are no result of a training")
    correct = logits.argmax(1) == y
    rows = [("clean", correct, time.perf_counter() - start)]
    warnings = check_network(model, x, y, eps)

    names = args.attack.replace("autoattack", ",".join(AUTOATTACK)).split(",")
    state = {"robust": correct, "x_adv": x.clone(), "survivors": {}, "seconds": {}, "search": None} | state
    for name in dict.fromkeys(names):
        start = time.perf_counter() - state["seconds"].get(name, 0)

        def save(search, name=name, start=start):
            state["search"], state["seconds"][name] = search, time.perf_counter() - start
            if args.state:
                common.write_torch(args.state, state)

        label = name
        options = {"batch_size": args.batch_size, "seed": args.seed, "precision": args.search_precision}
        if name == "pgd":
            label = f"pgd-{args.steps}-{args.restarts}"
            options |= {"steps": args.steps, "restarts": args.restarts}
            options |= {"step_size": None if args.step_size is None else args.step_size / 255}
        if name not in state["survivors"]:
            report = common.progress_of_attack(label)
            options |= {"report": report, "save": save, "resume": state["search"]}
            todo = (correct if args.individual else state["robust"]).nonzero().flatten()
            try:
                found = ATTACKS[name](model, x[todo], y[todo], eps, **options)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                if options["resume"] is None or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = " ".join(str(error).split())[:200]
                common.fail(f"cannot go on from {args.state} ({reason}): delete it to start anew")
            survivors = torch.zeros_like(correct).index_put((todo,), found[0])
            broken = state["robust"] & ~survivors
            state["x_adv"][broken] = found[1][broken[todo]]
            state["robust"] = state["robust"] & survivors
            state["survivors"][name] = survivors
            save(None)
        rows.append((label, state["survivors"][name], state["seconds"][name]))
    warnings += check_survivors(state["survivors"])
    robust, x_adv = state["robust"], state["x_adv"]
    if "autoattack" in args.attack.split(","):
        left = torch.stack([state["survivors"][name] for name in AUTOATTACK]).all(0)
        rows.append(("autoattack", left, sum(state["seconds"][name] for name in AUTOATTACK)))

    seconds = rows[0][2] + sum(state["seconds"].values())
    accuracy = {name: common.percent(survivors) for name, survivors, _ in rows}
    print(f"\n{'attack':<16}{'accuracy %':>10}{'seconds':>10}")
    whole = [("all of them", robust, seconds)] if len(rows) > 2 else []
    for name, survivors, took in rows + whole:
        print(f"{name:<16}{common.percent(survivors):>10.2f}{took:>10.1f}")
    for warning in warnings:
        print(f"warning: {warning}")
    if args.examples:
        shown = (correct & ~robust).nonzero().flatten()[:10]
        save_examples(args.examples, model, x[shown], x_adv[shown], y[shown], eps, data.classes)
    if args.save_adv:
        save_adversarial(args, model, x, x_adv, y, eps)
    if args.json:
        result = {
            "clean": accuracy.pop("clean"),
            "robust": common.percent(robust),
            "attacks": accuracy,
            "n": n,
            "eps": args.eps,
            "seconds": seconds,
            "seconds_per_attack": {name: took for name, _, took in rows[1:]},
            "individual": args.individual,
            "search_precision": args.search_precision,
            "warnings": warnings,
            "dataset": data.name,
            "seed": args.seed,
            **common.versions(args.device),
            "training": common.training_of(args.run) if args.run else None,
        }
        common.write_text(args.json, json.dumps(result, indent=1) + "\n")


def save_adversarial(args, model, x, x_adv, y, eps):
    """An .npz: x (N, H, W, C) as uint8, or as float32 in [0, 1]; y; adversarial: is x, as it stands there, one?

    Images that no attack broke are there as they are.
    """
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


def save_examples(path, model, x, x_adv, y, eps, classes):
    """PNG: one column an image; clean, perturbation (grey is none, black and white are eps), adversarial."""
    from torchvision.utils import save_image

    if not len(x):
        print(f"no image was broken: {path} not written")
        return
    shown = torch.cat([x, 0.5 + (x_adv - x) / (2 * max(eps, 1e-9)), x_adv])
    save_image(F.interpolate(shown, scale_factor=3), path, nrow=len(x), padding=6, pad_value=1.0)
    print(f"\n{path}: clean, perturbation (grey is none, black and white are eps), adversarial")
    guesses = predict(model, x_adv)
    for column, (label, guess) in enumerate(zip(y.tolist(), guesses.tolist()), 1):
        print(f"  column {column:>2}: {classes[label]} is taken for {classes[guess]}")


if __name__ == "__main__":
    import common

    common.launch(main)
