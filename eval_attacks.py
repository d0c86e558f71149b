#!/usr/bin/env python3
"""Robust accuracy of a network on images in [0, 1]: PGD with restarts and AutoAttack, in one file.

    python eval_attacks.py runs/NAME --attack autoattack --n 1000

Copy this file, or all of it above "command line", which needs only torch:

    robust, x_adv = autoattack(model.eval(), x, y, eps=8 / 255)  # (N,) bool; (N, C, H, W)

x: images (N, C, H, W) in [0, 1], float32 or float64; y: (N,) class indices. The network, in eval mode, maps B images to
float logits (B, classes), each image's the same in any batch. What breaks this contract is a ContractError, never a
number. An image is broken if the network misclassifies it as it is, or once a point within eps of it and within [0, 1]
is found that the network misclassifies in float32. `run` has the options that all attacks share. `autoattack` warns of
what makes its number doubtful; before another attack, ask `check_network`.
"""

import collections
import contextlib
import functools
import math
import numbers
import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F

BATCH_SIZE = collections.defaultdict(lambda: 250, cpu=64)  # images in one pass; on a CPU, as many as fit its caches
RANDOMISED = "the network is randomised: two equal passes differ (dropout left on? call eval() first)"
ROUNDING = 5e-7  # |x_adv - x| <= eps rounds too: a few units in the last place of a float32 near 1


class ContractError(ValueError):
    """The call or the network would make the number wrong; the message, one line, says what would be right."""


@contextlib.contextmanager
def exact(device):
    """Inside, float32 is float32: neither autocast nor TF32. device: its type, such as "cuda"."""
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    with contextlib.ExitStack() as undo, torch.autocast(device, enabled=False):
        undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = False  # verdicts come in batches of every size: each would be timed anew
        newer = (cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul) if hasattr(cudnn, "conv") else ()
        try:
            if not newer or any(switch.fp32_precision != "ieee" for switch in newer):  # not within another `exact`
                undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
                undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                cudnn.allow_tf32 = False
                torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # the program uses torch's newer switches, which do not mix with these
            for switch in newer:
                undo.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        yield


PRECISIONS = {None: contextlib.nullcontext, "fp32": exact, "bf16": lambda d: torch.autocast(d, torch.bfloat16)}


def kind(value):
    found = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
    return value if isinstance(value, numbers.Real) else found


def logits_at(model, point):
    """Logits (B, classes), in float32 or better, of images (B, C, H, W); those of -inf, a masked class's, are -1e9."""
    logits = model(point.clone())  # a copy: some networks write into their input
    fits = torch.is_tensor(logits) and logits.is_floating_point() and logits.shape[:-1] == point.shape[:1]
    if not fits or logits.shape[1] < 2:
        raise ContractError(f"the network must return float logits ({len(point)}, classes), not {kind(logits)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-1e9)  # arithmetic with -inf ends in NaN


def outputs(model, x, batch_size=0):
    """Logits (N, classes) of images x (N, C, H, W), in float32 whatever autocast and TF32 are set to."""
    with torch.no_grad(), exact(x.device.type):
        return torch.cat([logits_at(model, part) for part in x.split(batch_size or BATCH_SIZE[x.device.type])])


def is_adversarial(model, x, x_adv, y, eps, batch_size=0):
    """(N,) bool: x_adv lies within eps of x and within [0, 1], and is misclassified in float32."""
    verdict = (((x_adv - x).abs() <= eps + ROUNDING) & (x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return verdict & misclassified(outputs(model, x_adv, batch_size), y) if verdict.any() else verdict


def misclassified(logits, y):
    """(B,) bool. Logits that are not finite are no verdict."""
    return (logits.argmax(1) != y) & logits.isfinite().all(1)


def cross_entropy(logits, y, target=None):
    """-log p(y). Losses map logits (B, classes) to (B,) and are to be maximised."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits, y, target=None):
    """The highest wrong logit, or the target's, minus the right one; above zero, the image is misclassified."""
    others = logits.scatter(1, y[:, None], -math.inf)
    wrong = others.amax(1) if target is None else others.gather(1, target[:, None])[:, 0]
    return wrong - logits.gather(1, y[:, None])[:, 0]


def dlr(logits, y, target=None):
    """Difference of logits ratio (Croce & Hein 2020, eq. 6, or 7 with a target); of two classes, the margin."""
    if logits.shape[1] < 3:
        return margin(logits, y, target)
    top = logits.sort(1, descending=True)[0]
    third = top[:, 2] if target is None else top[:, 2:4].mean(1)
    return margin(logits, y, target) / (top[:, 0] - third + 1e-12)


def ascend(model, point, loss, y, target=None):
    """The logits, the loss (B,) and its gradient at point (B, C, H, W), each image's the same in any batch."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = logits_at(model, point)
        value = loss(logits, y, target)
        gradient = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise ContractError("no gradient reaches the image (no_grad or detach in the network?): only Square attacks it")
    if not gradient.isfinite().all():  # its sign would be 0, and the attack stand still
        raise ContractError("the gradient is not finite at some images, so no attack that follows it means anything")
    return logits.detach(), value.detach().to(gradient.dtype), gradient.contiguous()


def pgd(model, x, y, eps, steps=50, restarts=10, step_size=None, random_start=True, **options):
    """Projected gradient descent (Madry et al. 2017, arXiv:1706.06083) on the cross-entropy.

    step_size: None is eps / 4. Restarts begin uniformly in the ball; random_start=False: at x.
    """
    if step_size is not None and not (0 < step_size <= 1 or eps == 0):
        raise ContractError(f"step_size must be in (0, 1], as images and eps are, such as 2 / 255, not {step_size}")

    def loop(b, point, steps):
        size = eps / 4 if step_size is None else step_size
        if point is None:
            point = (b.x + eps * b.noise()).clamp(b.low, b.high) if random_start else b.x
        for _ in range(steps):
            logits, _, gradient = ascend(model, point, cross_entropy, b.y)
            yield point, logits, point
            point = (point + size * gradient.sign()).clamp(b.low, b.high)

    return run(model, x, y, eps, loop, steps and steps + 1, restarts, False, **options)  # judges the last point too


def apgd(model, x, y, eps, loss="ce", steps=100, restarts=1, targets=9, **options):
    """Auto-PGD (Croce & Hein 2020, arXiv:2003.01690, Algorithm 1): momentum, and steps that halve by themselves.

    loss: "ce" or "dlr"; or "dlr-targeted": one trial for each of the `targets` highest wrong classes, and no restarts.
    """
    targeted, loss = loss == "dlr-targeted", {"ce": cross_entropy, "dlr": dlr, "dlr-targeted": dlr}[loss]

    def loop(b, best, steps):
        size = eps / 4  # where it goes on after a search in bfloat16
        if best is None:
            t, size = b.noise(), 2 * eps
            best = (b.x + eps * (t / t.abs().amax((1, 2, 3), keepdim=True))).clamp(b.low, b.high)
        point, previous, best_gradient = best, best, torch.zeros_like(best)
        previous_loss, best_loss = math.inf, -math.inf
        raised, halved, loss_then = 0, torch.zeros_like(b.y, dtype=torch.bool), best_loss  # as at the last checkpoint
        size = torch.full_like(best[:, :1, :1, :1], size)
        window = checkpoint = max(int(0.22 * (steps - 1)), 1)
        for i in range(steps):
            logits, value, gradient = ascend(model, point, loss, b.y, b.target)
            raised = raised + (value > previous_loss)
            better = value > best_loss
            best_loss = torch.where(better, value, best_loss)
            best, best_gradient = pick(better, point, best), pick(better, gradient, best_gradient)
            yield point, logits, best
            if i == checkpoint:
                halved = (raised < 0.75 * window) | (~halved & (best_loss <= loss_then))
                size, value = pick(halved, size / 2, size), torch.where(halved, best_loss, value)
                point, gradient = pick(halved, best, point), pick(halved, best_gradient, gradient)
                raised, loss_then = 0, best_loss
                window = max(window - max(int(0.03 * (steps - 1)), 1), max(int(0.06 * (steps - 1)), 1))
                checkpoint += window
            z = (point + size * gradient.sign()).clamp(b.low, b.high)
            a = 0.75 if i else 1.0  # the first step has no momentum
            moved = point + a * (z - point) + (1 - a) * (point - previous)
            previous, previous_loss, point = point, value, moved.clamp(b.low, b.high)

    return run(model, x, y, eps, loop, steps and steps + 1, targets if targeted else restarts, targeted, **options)


def project_to_plane(point, w, gap):
    """The smallest d in l-infinity with <w, d> = gap and point + d in [0, 1]; point, w: (B, D); gap: (B,).

    Where the box keeps the plane out of reach, the d that comes nearest to it. Every coordinate moves towards the plane
    by t, or as far as the box allows: d_i = +-min(t, room_i). The distance covered, sum_i |w_i| min(t, room_i), is
    concave and piecewise linear in t, so a few Newton steps find t.
    """
    way = w.sign() * gap.sign()[:, None]
    room = torch.where(way > 0, 1 - point, point)
    w, gap = w.abs(), gap.abs()
    t = gap / w.sum(1).clamp(min=torch.finfo(w.dtype).tiny)  # exact unless the box is in the way
    for _ in range(100):
        missing = gap - (w * torch.minimum(room, t[:, None])).sum(1)
        slope = (w * (room > t[:, None])).sum(1)
        going = (missing > 100 * torch.finfo(w.dtype).eps * gap) & (slope > 0)
        if not going.any():
            break
        t = torch.where(going, t + missing / slope, t)
    return way * torch.minimum(room, t[:, None])


def fab(model, x, y, eps, steps=100, targets=9, alpha_max=0.1, eta=1.05, beta=0.9, **options):
    """Targeted fast adaptive boundary attack (Croce & Hein 2019, arXiv:1907.02044), one trial per target class.

    It looks for the nearest misclassified point, which breaks the image if it lies within eps.
    """

    def loop(b, point, steps):
        clean, point = b.x.flatten(1), b.x if point is None else point
        for _ in range(steps):
            _, gap, w = ascend(model, point, margin, b.y, b.target)
            here, w = point.flatten(1), w.flatten(1)
            # Steps to the linearised boundary from the point and from the clean image, then a mix of the two.
            d = project_to_plane(here, w, -gap)
            d_clean = project_to_plane(clean, w, -gap - (w * (clean - here)).sum(1))
            size, size_clean = (v.abs().amax(1, keepdim=True).clamp(min=1e-8) for v in (d, d_clean))
            alpha = (size / (size + size_clean)).clamp(max=alpha_max)
            tried = ((1 - alpha) * (here + eta * d) + alpha * (clean + eta * d_clean)).clamp(0, 1).view_as(b.x)
            logits = logits_at(model, tried)
            point = pick(misclassified(logits, b.y), b.x + beta * (tried - b.x), tried)
            point = pick(logits.isfinite().all(1), point, b.x)  # where no gradient would be: from the start again
            yield tried, logits, point

    return run(model, x, y, eps, loop, steps, targets, True, **options)


def square(model, x, y, eps, queries=5000, p=0.8, restarts=1, **options):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049, Algorithms 1 and 2): random search, no gradients.

    From vertical stripes of +-eps, each query sets a square to +-eps if the margin then rises: a share p of the image,
    halved after 10, 50, 200, ... queries.
    """

    def loop(b, best, steps):
        first, (channels, height, width) = 0 if best is None else queries, b.x.shape[1:]
        # Where a query puts its square, and how it is coloured: the same for all images.
        random = torch.rand(first + steps, 2 + channels, generator=torch.Generator().manual_seed(b.seed), device="cpu")
        if best is None:
            best = torch.where(b.noise(channels, 1, width) > 0, b.high, b.low)
        tried, best_margin = best, torch.full_like(best[:, 0, 0, 0], -math.inf)
        for i in range(first, first + steps):
            if i > first:
                share = p / 2 ** sum(i > n for n in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
                side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
                top, left = int(random[i, 0] * (height - side + 1)), int(random[i, 1] * (width - side + 1))
                window = (..., slice(top, top + side), slice(left, left + side))
                bright = (random[i, 2:, None, None] > 0.5).to(best.device)
                tried = best.clone()
                tried[window] = torch.where(bright, b.high[window], b.low[window])
            logits = logits_at(model, tried)
            value = margin(logits, b.y)
            better = (value > best_margin) & logits.isfinite().all(1)  # else +inf would stay the best for ever
            best_margin, best = torch.where(better, value, best_margin), pick(better, tried, best)
            yield tried, logits, best

    return run(model, x, y, eps, loop, queries, restarts, False, **options)


def autoattack(model, x, y, eps, batch_size=0, seed=0, precision=None, before=(), report=None):
    """Standard AutoAttack (Croce & Hein 2020, arXiv:2003.01690): four attacks, each on what is still unbroken."""
    options = {"batch_size": batch_size, "seed": seed, "precision": precision, "report": report}
    found = apgd(model, x, y, eps, "ce", before=before, **options)
    for sentence in check_network(model, x, y, eps, batch_size):  # warnings.warn shows a sentence only once
        warnings.warn_explicit(sentence, UserWarning, "eval_attacks.py", 0)
    found = apgd(model, x, y, eps, "dlr-targeted", before=found, **options)
    found = fab(model, x, y, eps, before=found, **options)
    last = square(model, x, y, eps, before=found, **options)
    for sentence in masked_gradients(found[0], last[0]):
        warnings.warn_explicit(sentence, UserWarning, "eval_attacks.py", 0)
    return last


def masked_gradients(before, after):
    """[] or a sentence, if Square broke what attacks with gradients had not; before, after it: robust, (N,) bool."""
    count = int((before & ~after).sum())
    found = f"Square, which uses no gradients, broke {count} of {len(after)} images that the other attacks could not"
    found += ": the gradients may be masked, and the robust accuracy too high"
    return [found] if count > 0.002 * len(after) else []  # AutoAttack's threshold: two images in a thousand are chance


def pick(mask, a, b):
    """Images from a where mask (B,) is True, else from b."""
    return torch.where(mask.view(-1, 1, 1, 1), a, b)


def noise(like, images, seed, trial, *shape):
    """Uniform in [-1, 1], (B, *shape) or like: of seed, trial and an image's index only, whatever else is attacked."""
    shape, seeds = shape or like.shape[1:], [(seed * 1_000_003 + trial) * 1_000_003 + i for i in images.tolist()]
    parts = [torch.rand(shape, generator=torch.Generator().manual_seed(s % 2**63), device="cpu") for s in seeds]
    return torch.stack(parts).to(like) * 2 - 1


@torch.inference_mode(False)
@torch.no_grad()
def run(model, x, y, eps, loop, steps, trials, targeted, batch_size=0, seed=0, precision=None, before=(), report=None):
    """Attack every image in `trials` restarts or target classes of `steps` iterations each, until it is broken.

    batch_size: images at a time (0: 64 on a CPU, else 250). seed: of all that is random. precision: of the search,
    "fp32", "bf16", or None, as it is outside. What a search in bfloat16 leaves unbroken is attacked again in float32,
    from the strongest point of each trial, for a twentieth of the iterations. before: (robust, x_adv) of an earlier
    attack, whose broken images are left out. report(share done, robust) is called after every iteration.
    Returns robust, (N,) bool, and x_adv, (N, C, H, W): a misclassified point, or the strongest of the last trial.

    loop(b, best, steps): the attack, a generator of (point to judge, its logits, strongest point so far, PGD's and
    FAB's being the last). best: that of the search in bfloat16, or None. b: x, y, target, seed, noise(), low, high.
    """
    if min(trials, steps) < 1:
        raise ContractError("restarts, targets, steps and queries must be at least 1: one restart is one run")
    if precision not in PRECISIONS:
        raise ContractError(f"precision must be 'fp32', 'bf16' or None, not {precision!r}")
    x, y, clean = checked(model, x, y, eps, batch_size)
    device, todo = x.device.type, (clean.argmax(1) == y) & (before[0] if before else True)
    if precision is None and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        raise ContractError("gradients vanish in float16: attack outside autocast, or give precision='bf16'")
    robust, x_adv = todo.clone(), (before[1] if before else x).clone()
    ranking = clean.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)  # y comes last
    trials, batch_size = min(trials, clean.shape[1] - 1) if targeted else trials, batch_size or BATCH_SIZE[device]
    total = steps + (math.ceil(steps / 20) if precision == "bf16" else 0)  # from `steps` on in float32
    for trial in range(trials):
        left = robust.nonzero().flatten()
        for k, images in enumerate(left.split(batch_size) if len(left) else ()):
            b = SimpleNamespace(x=x[images], y=y[images], target=ranking[images, trial] if targeted else None)
            b.low, b.high, b.seed = (b.x - eps).clamp(0, 1), (b.x + eps).clamp(0, 1), seed + trial
            b.noise = functools.partial(noise, b.x, images, seed, trial)
            unbroken, best = torch.ones_like(images, dtype=torch.bool), None
            for search_precision, iterations in ((precision, range(steps)), ("fp32", range(steps, total))):
                with PRECISIONS[search_precision](device):
                    for i, found in zip(iterations if unbroken.any() else (), loop(b, best, len(iterations))):
                        point, logits, best = found
                        hit = (unbroken & misclassified(logits, b.y)).nonzero().flatten()
                        if len(hit):  # only these: without TF32, float32 costs a GPU many times what bfloat16 does
                            hit = hit[is_adversarial(model, b.x[hit], point[hit], b.y[hit], eps, batch_size)]
                            unbroken[hit], robust[images[hit]], x_adv[images[hit]] = False, False, point[hit]
                        if report:
                            done = (k * batch_size + len(images) * (i + 1) / total) / len(left)  # of this trial
                            report((trial + done) / trials, robust)
                        if not unbroken.any():
                            break
            x_adv[images[unbroken]] = best.clamp(b.low, b.high)[unbroken]
    # Randomness that is rare passes the checks by luck, and may have broken images by luck: all is judged once more.
    same, broken = unmoved(clean, outputs(model, x, batch_size), 1e-4), todo & ~robust
    if same and broken.any():  # but for rounding, as the batches are others
        again = margin(outputs(model, x_adv[broken], batch_size), y[broken])
        same = bool((again > -0.01 * margin(clean, y).abs().median()).all())
    if not same:
        raise ContractError(RANDOMISED)
    return robust, x_adv


def unmoved(before, after, tolerance):
    """Did logits (N, classes) stay the same between two passes, but for rounding and this share of their spread?

    Compared is how far each logit is below the image's highest, so that an offset which all share, or a class that is
    masked by -1e9 (100 times as far below as any second highest), neither hides a difference nor feigns one.
    """
    finite = before.isfinite().all(1, keepdim=True)
    before, after = (torch.where(finite, logits, 0) for logits in (before, after))
    below, later = (logits.amax(1, keepdim=True) - logits for logits in (before, after))
    masked = 100 * below.topk(2, largest=False)[0].max() or below.max()
    rounding = 4 * torch.finfo(torch.float32).eps * before.amax(1, keepdim=True).abs()
    change = (below.clamp(max=masked) - later.clamp(max=masked)).abs()
    return bool((change <= tolerance * below[below <= masked].max() + rounding).all())  # False where NaN came after


def checked(model, x, y, eps, batch_size=0):
    """x and y as attacks want them and the clean logits, or a ContractError where a number would be wrong."""
    if not (torch.is_tensor(x) and x.dtype in (torch.float32, torch.float64) and x.dim() == 4 and len(x)):
        raise ContractError(f"x must be images (N, C, H, W) in float32 or float64, not {kind(x)}")
    if not ((x >= 0) & (x <= 1)).all():
        raise ContractError(f"x must lie in [0, 1], it goes from {x.min():g} to {x.max():g}")
    if not (isinstance(eps, numbers.Real) and 0 <= eps <= 1):
        raise ContractError(f"eps must be a number in [0, 1], such as 8 / 255, not {kind(eps)}")
    if not torch.is_tensor(y) or y.is_floating_point() or y.dtype == torch.bool or y.shape != x.shape[:1]:
        raise ContractError(f"y must be one class index for each of {len(x)} images, not {kind(y)}")
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if getattr(module, "training", False):  # which a frozen TorchScript module lacks
            raise ContractError(f"{name or 'the network'} is in train mode: call model.eval() first")
    x, y = x.detach().clone(memory_format=torch.contiguous_format), y.long().clone()
    few = torch.cat([x[:4], 1 - x[:4]])[: max(batch_size or 8, 2)]  # a single image has company too
    first, logits = outputs(model, few, 8), outputs(model, x, batch_size)
    if not logits.isfinite().all():
        raise ContractError(f"the logits are not finite at {int((~logits.isfinite()).any(1).sum())} of {len(x)} images")
    if not all(unmoved(first, outputs(model, few, 8), 1e-4) for _ in range(10)):
        raise ContractError(RANDOMISED)
    # Alone goes the last: noise of a fixed seed is the same for whatever comes first.
    if not unmoved(first, torch.cat([first[:-1], outputs(model, few[-1:], 8)]), 0.01):
        raise ContractError("an image's logits depend on its batch (BatchNorm without statistics? seeded noise?)")
    if not 0 <= y.min() <= y.max() < logits.shape[1]:
        raise ContractError(f"y must lie in 0 to {logits.shape[1] - 1}, it goes from {y.min()} to {y.max()}")
    return x, y, logits


@torch.inference_mode(False)
def check_network(model, x, y, eps, batch_size=0):
    """Reasons to distrust what any attack finds on this network, a list of sentences; x, y: images, 250 are used."""
    found = []
    try:
        x, y, logits = checked(model, x[:250], y[:250], eps, batch_size)
        right, chance = logits.argmax(1) == y, 1 / logits.shape[1]
        share = int(right.sum()) / len(right)
        if len(x) >= 50 and share < chance + 3 * math.sqrt(chance / len(x)):  # 3 standard deviations
            found.append(f"{100 * share:.0f} % of {len(x)} images are right, as by chance: check weights and labels")
        if logits.min() >= 0 and logits.max() <= 1:
            found.append("the outputs lie in [0, 1], like probabilities: remove the softmax or sigmoid at the end")
        point = (x + eps / 2 * noise(x, torch.arange(len(x), device=x.device), 0, 0)).clamp(0, 1)
        parts = [v.split(batch_size or BATCH_SIZE[x.device.type]) for v in (point, y)]
        for loss in (cross_entropy, margin):
            gradient = torch.cat([ascend(model, part, loss, label)[2] for part, label in zip(*parts)]).flatten(1)
            if zero := int(((gradient == 0).all(1) & right).sum()):
                found.append(f"the gradient of the {loss.__name__} is exactly zero at {zero} of {len(x)} images")
    except ContractError as error:
        found.append(str(error))
    return found


# ---------------------------------------------------------------- command line

import hashlib
import io
import json
import re
import runpy
import sys
import time
from pathlib import Path

with contextlib.suppress(ModuleNotFoundError):  # who copies this file for its attacks needs none of them
    import numpy as np

    import common
    import console
    from wrn import WideResNet

AUTOATTACK = {"apgd-ce": apgd, "apgd-t": functools.partial(apgd, loss="dlr-targeted"), "fab-t": fab, "square": square}


def fgsm(model, x, y, eps, **options):
    """One step of size eps from x (Goodfellow et al. 2014, arXiv:1412.6572), as an attack."""
    return pgd(model, x, y, eps, 1, 1, eps, False, **options)


ATTACKS = {**AUTOATTACK, "apgd-dlr": functools.partial(apgd, loss="dlr"), "fgsm": fgsm, "pgd": pgd}
NAMES = (*ATTACKS, "autoattack")
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "best.pt")


def percent(right):
    """How many of a bool tensor are True, in per cent."""
    return 100 * int(right.sum()) / right.numel()


def predict(model, x, batch_size=0):
    """Class indices (N,) of images x (N, C, H, W), as `outputs` computes them."""
    return outputs(model, x, batch_size).argmax(1)


def parse_args():
    parser = console.Parser(description=__doc__.split("\n")[0], formatter_class=console.Help)
    network, add = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    number, text = console.number, console.given
    network("run", nargs="?", type=text, help="run folder (its model.pt), or a model.pt, best.pt or checkpoint.pt")
    network("--model", type=text, metavar="FILE:FUNCTION", help="my_net.py:make_model; the file is run: trust it")
    add("--weights", type=text, metavar="FILE", help="for --model: a state_dict, or a checkpoint that holds one")
    attacks = f"separated by commas, each on all images that the network gets right: {', '.join(NAMES)}"
    add("--attack", type=console.names(NAMES), default="pgd", help=attacks)
    add("--eps", type=number(float, 0, 255), help="l-infinity radius, in 1/255 (default: the run's own, or 8)")
    add("--steps", type=number(int, 1), default=50, help="of PGD")
    add("--restarts", type=number(int, 1), default=10, help="of PGD")
    add("--step-size", type=number(float, 0.001, 1), default=0.25, help="of PGD, in multiples of eps")
    add("--search-precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster, and ends in float32")
    add("--n", type=number(int, 1), help="the first N test images (default: all)")
    add("--dataset", type=text, help="cifar10, cifar100 or an .npz (default: what the run was trained on)")
    add("--data-dir", type=text, default="data", help="where cifar10 and cifar100 are, or are downloaded to")
    add("--batch-size", type=number(int, 1), default=0, help="images in one pass; 0: 64 on a CPU, else 250")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of every random start and query")
    add("--device", type=text, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--state", type=text, metavar="FILE", help="save every finished attack here, and go on from there if it exists")
    add("--json", type=text, metavar="FILE", help="write the numbers to this file")
    add("--save-adv", type=text, metavar="FILE", help="write all adversarial images to this file, an .npz")
    args = parser.parse_args()
    if args.weights and not args.model:
        parser.error("--weights needs --model")
    inputs = [args.weights, (args.model or "").rpartition(":")[0]]
    if args.run:
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        inputs += [args.run, *(folder / name for name in RUN_FILES)]
    args.training = training_of(folder) if args.run else {}
    args.eps = args.training.get("eps", 8.0) if args.eps is None else args.eps
    args.dataset = args.dataset or args.training.get("dataset")
    files = {"--state": args.state, "--json": args.json, "--save-adv": args.save_adv}
    console.check_outputs(files, filter(None, [*inputs, args.dataset]))
    if 0 < args.eps < 1:
        console.note(f"--eps {args.eps:g} is in units of 1/255")
    args.device = common.find_device(args.device)
    return args


def training_of(folder):
    """What a run's folder says of its training: config, and seconds and last epoch where it has them; {} if nothing."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.exists():
        return {}
    try:
        training, log = console.load_json(config), {"seconds": None, "last_epoch": None}
        if not (0 <= training["eps"] <= 255 and isinstance(training["dataset"], str)):
            raise ValueError
    except (ValueError, TypeError, LookupError):
        console.fail(f"{config} is damaged, or not that of a run: no eps or no data set")
    try:
        rows = console.load_json(metrics) if metrics.exists() else []
        log = {"seconds": sum(row["seconds"] for row in rows), "last_epoch": rows[-1]} if rows else log
    except (ValueError, TypeError, LookupError):  # only a log
        console.note(f"{metrics} is damaged: the result says nothing of seconds and last epoch")
    return training | log


def load_model(path, device="cpu"):
    """The network of a run folder (its model.pt) or of a .pt file in it, in eval mode; OSError as console.load_file."""
    path = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    checkpoint = path.with_name("checkpoint.pt")
    if path.name == "model.pt" and not path.exists() and checkpoint.exists():
        raise OSError(f"{path.parent} is not finished: name {checkpoint} to load it as it stands")
    content = console.load_file(path)
    arguments, weights = content.get("arguments"), content.get("state_dict")
    try:
        if not isinstance(arguments, dict) or not isinstance(weights, dict):
            raise ValueError("no arguments or no state_dict")
        if arguments["depth"] > len(weights):
            raise ValueError(f"depth {arguments['depth']}, but {len(weights)} tensors")
        with torch.device("meta"):  # without memory: sizes that do not fit the weights are noticed
            WideResNet(**arguments).load_state_dict(weights, assign=True)
        model = WideResNet(**arguments)
        model.load_state_dict(weights)
    except Exception as error:  # whatever a damaged file makes of our own network
        raise OSError(f"{path} does not hold a WideResNet: {' '.join(str(error).split())[:200]}") from None
    return model.to(device, memory_format=common.layout(device)).eval()


def load_network(args):
    """The network that the flags name, in eval mode on its device."""
    if args.run:
        return load_model(args.run, args.device).requires_grad_(False)  # less memory
    file, _, function = args.model.rpartition(":")
    if not Path(file).is_file():
        console.fail(f"--model {args.model}: there is no file {file!r}; it wants FILE:FUNCTION, my_net.py:make_model")
    weights = console.load_file(args.weights) if args.weights else None
    ours = {name: sys.modules.pop(name) for name in ("common", "console", "wrn")}  # the file may import its own
    sys.path.insert(0, str(Path(file).absolute().parent))
    try:
        names = runpy.run_path(file)
        if function not in names:
            console.fail(f"--model {args.model}: there is no {function!r} in {file}")
        factory = names[function]
        model = factory if isinstance(factory, torch.nn.Module) else factory()
    except OSError as error:  # of the user's code, so not one line
        raise RuntimeError(f"--model {args.model}") from error
    finally:
        sys.modules.update(ours)
    if not callable(model):
        console.fail(f"--model {args.model} returns {kind(model)}, no network: is its return missing?")
    if args.weights:
        load_weights(model, weights, args.weights)
    if isinstance(model, torch.nn.Module):
        model = model.float().to(args.device).eval()
        for weight in model.parameters():  # requires_grad_ of the whole is not for TorchScript
            weight.requires_grad_(False)
    return model


def load_weights(model, content, path):
    """Of a state_dict or a checkpoint that holds one; DataParallel and torch.compile put prefixes before its names."""
    if not isinstance(model, torch.nn.Module):
        console.fail(f"--weights {path}: the network is {kind(model)}, which loads its weights itself")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        content = content[key] if isinstance(content.get(key), dict) else content
    if content.keys() != model.state_dict().keys():
        content = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in content.items()}
    try:
        model.load_state_dict(content)
    except RuntimeError as error:  # weights that are missing, too many or of other shapes
        console.fail(f"{path} does not fit the network: {' '.join(str(error).split())[:300]}")


def load_state(args, model, x, y, clean):
    """What finished attacks left in the --state file, or the state of an evaluation that begins."""
    content = hashlib.sha256(Path(args.model.rpartition(":")[0]).read_bytes() if args.model else b"")
    weights = model.state_dict().values() if isinstance(model, torch.nn.Module) else ()
    for tensor in filter(torch.is_tensor, (*weights, x, y, clean)):  # clean: for weights that are elsewhere
        content.update(tensor.cpu().flatten().contiguous().numpy().tobytes())
    settings = {"network and images": content.hexdigest()[:8]}
    flags = ("model", "eps", "steps", "restarts", "step_size", "search_precision", "seed")
    settings |= {flag: getattr(args, flag) for flag in flags}
    if not args.state or not Path(args.state).is_file():
        return {"settings": settings, "masks": {}, "seconds": {}, "x_adv": x.clone()}
    state = console.load_file(args.state)
    for key, value in settings.items():
        before = state.get("settings", {}).get(key)
        if before != value:
            reason = f"{args.state} belongs to another evaluation ({key} was {before} there and is {value} now)"
            console.fail(f"{reason}: delete it, or name another file")
    masks = {label: mask.to(x.device) for label, mask in state["masks"].items()}
    return state | {"masks": masks, "x_adv": state["x_adv"].to(x.device)}


def evaluate(args):
    """Run the attacks that the flags name, write the files, print a table."""
    model, eps = load_network(args), args.eps / 255
    if not args.dataset:
        console.fail("give --dataset: cifar10, cifar100 or an .npz (no config.json of a run names one)")
    data, failed = common.Data(args.dataset, args.data_dir, args.device, ("test",)), []
    x, y = data.test(args.n)
    x = x.contiguous()  # as most networks expect them
    lacking = common.missing_classes(data.labels["test"], args.n, "test") if args.n else None
    if lacking:
        console.note(lacking)

    def save(write, path, content):
        """Write a file; if that fails, the numbers are still printed and the other files written."""
        try:
            write(path, content)
        except OSError as error:
            failed.append(f"cannot write {path}: {error.strerror}")
            console.note(failed[-1])

    start = time.perf_counter()
    doubts = check_network(model, x, y, eps, args.batch_size)
    clean = predict(model, x, args.batch_size)
    state = load_state(args, model, x, y, clean)
    masks, seconds, x_adv = state["masks"], state["seconds"], state["x_adv"]
    masks["clean"], seconds["clean"] = clean == y, time.perf_counter() - start
    of_pgd = {"steps": args.steps, "restarts": args.restarts, "step_size": args.step_size * eps}
    options = {"batch_size": args.batch_size, "seed": args.seed, "precision": args.search_precision}

    def attack(label, name, before=()):
        """(unbroken images, adversarial images), as `before` is; from the state, if the attack is finished there."""
        if label in masks:
            return masks[label], x_adv
        line, start = console.StatusLine(), time.perf_counter()

        def report(share, robust):
            if line.due():
                left = console.clock((time.perf_counter() - start) * (1 - share) / share)
                line.show(f"{label}: {int(robust.sum()):,} of {len(robust):,} unbroken, at most {left} left")

        own = of_pgd if name == "pgd" else {}
        robust, found = ATTACKS[name](model, x, y, eps, before=before, report=report, **options, **own)
        new = torch.stack([~robust, *masks.values()]).all(0)
        x_adv[new], masks[label], seconds[label] = found[new], robust, time.perf_counter() - start
        if args.state:
            save(console.write_torch, args.state, state)
        line.clear()
        return robust, x_adv

    labels, parts = [], {}
    for name in dict.fromkeys(args.attack):
        labels.append(f"pgd-{args.steps}-{args.restarts}" if name == "pgd" else name)
        if name != "autoattack":
            attack(labels[-1], name)
            continue
        found = ()
        for part in AUTOATTACK:
            found = attack(f"autoattack {part}", part, found)
            parts[part] = found[0]
        masks[name], seconds[name] = found[0], sum(seconds[f"autoattack {part}"] for part in parts)
        doubts += masked_gradients(parts["fab-t"], parts["square"])
    parts = {part: percent(mask) for part, mask in parts.items()}
    accuracy = {label: percent(masks[label]) for label in ["clean", *labels]}
    robust = percent(torch.stack([masks[label] for label in accuracy]).all(0))
    if args.json:
        result = {"clean": accuracy["clean"], "robust": robust, "attacks": {label: accuracy[label] for label in labels}}
        result |= {"autoattack_parts": parts, "n": len(y), "eps": args.eps}
        result |= {"steps": args.steps, "restarts": args.restarts, "step_size": args.step_size, "seed": args.seed}
        result |= {"warnings": [lacking, *doubts] if lacking else doubts}
        result |= {"seconds": sum(seconds[label] for label in accuracy), "dataset": data.name, "crc32": data.crc32}
        result |= {"seconds_per_attack": {label: seconds[label] for label in labels}}
        result |= {"search_precision": args.search_precision, **console.versions(args.device)}
        result["training"] = args.training or None
        save(console.write_file, args.json, json.dumps(result, indent=1) + "\n")
    if args.save_adv:
        verdict = is_adversarial(model, x, x_adv, y, eps, args.batch_size)
        arrays, file = {"x": x_adv.permute(0, 2, 3, 1), "y": y, "adversarial": verdict}, io.BytesIO()
        np.savez_compressed(file, **{key: value.cpu().numpy() for key, value in arrays.items()}, eps=args.eps)
        save(console.write_file, args.save_adv, file.getbuffer())
    # Only now, so that a reader of stdout that has gone away costs nothing.
    print(f"network  {args.run or args.model}, {args.device}, search in {args.search_precision}, verdicts in fp32")
    print(f"images   first {len(y):,} test images of {data.name}, eps {args.eps:g}/255")
    print(f"\n{'attack':<16}{'accuracy %':>10}{'seconds':>10}")
    for label, value in accuracy.items():
        print(f"{label:<16}{value:>10.2f}{seconds[label]:>10.1f}")
    if parts:
        print("autoattack after " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    if len(labels) > 1:
        print(f"{'all together':<16}{robust:>10.2f}")
    for doubt in doubts:
        print(f"warning: {doubt}")
    if failed:
        console.fail(failed[0])


def main():
    args = SimpleNamespace(state=None)
    try:
        args = parse_args()
        evaluate(args)
    except ContractError as error:
        console.fail(error)
    except KeyboardInterrupt:
        more = f": the same command goes on from {args.state}" if args.state else ""
        console.fail(f"interrupted{more}", 130)


if __name__ == "__main__":
    console.launch(main)
