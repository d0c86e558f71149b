#!/usr/bin/env python3
"""Robust accuracy of a network on images in [0, 1]: FGSM and PGD with restarts.

    python eval_attacks.py runs/NAME --attack pgd --eps 8 --n 1000

The attacks need torch alone and take any network that maps images in [0, 1] to logits:

    from eval_attacks import pgd
    robust, x_adv = pgd(model.eval(), x, y, eps=8 / 255)

Threat model: l-infinity, |x_adv - x| <= eps and x_adv in [0, 1]. An image is broken when the network
misclassifies it as it is, or once a point was found that lies within both bounds and is misclassified
in float32. What the search itself computes in is a matter of speed; what it claims is checked.
"""

import json
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F

# Computing |x_adv - x| <= eps rounds too: a few units in the last place of a float32 near 1.
ROUNDING = 5e-7


def predict(model, x, batch_size=250):
    """Class indices (N,) of images x (N, C, H, W), in float32 whatever autocast is on outside."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.cat([model(part).argmax(1) for part in x.split(batch_size)])


def is_adversarial(model, x, x_adv, y, eps):
    """(N,) bool: x_adv lies within eps of x and within [0, 1], and is misclassified in float32."""
    within_eps = (x_adv - x).abs().flatten(1).amax(1) <= eps + ROUNDING
    within_box = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
    return within_eps & within_box & (predict(model, x_adv) != y)


def noise(shape, seed, image, restart):
    """Uniform in [-1, 1], a function of its arguments alone: not of what else is in the batch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + restart) * 1_000_003 + image)
    return torch.rand(shape, generator=generator) * 2 - 1


def pgd(
    model, x, y, eps, steps=50, restarts=10, step_size=None, random_start=True, batch_size=250, seed=0, report=None
):
    """Projected gradient descent (Madry et al. 2017, arXiv:1706.06083) on the cross-entropy.

    model: images in [0, 1] -> logits, in eval mode. x: (N, C, H, W) float32 in [0, 1]; y: (N,) class indices.
    eps, step_size: in [0, 1] units; step_size None is eps / 4, which is 2/255 at eps 8/255.
    Each restart begins uniformly in the eps-ball (random_start=False: at x itself), clipped to [0, 1].
    Returns robust, (N,) bool, and x_adv, (N, C, H, W): a misclassified point where one was found, else where
    the last restart ended.

    One active set: an image leaves at its first misclassified point, and its place goes to the next image
    or, once all had their first start, to the next restart of one that is unbroken. A start depends on
    (seed, image, restart) alone, so batch_size changes the speed and not the attack. Under autocast the
    search runs in bfloat16. report(done, left, robust): gradient evaluations so far and at most to come.
    """
    step_size = eps / 4 if step_size is None else step_size
    robust = predict(model, x, batch_size) == y
    x_adv = x.clone()
    queue = deque((i, 0) for i in robust.nonzero().flatten().tolist())  # (image, restart)
    done, left = 0, len(queue) * restarts * (steps + 1)
    # The active set. Which image and restart and how many steps to go, on the CPU; where each stands.
    image, restart, steps_left = torch.zeros(3, 0, dtype=torch.long)
    point = x[:0]
    while queue or len(image):
        jobs = [queue.popleft() for _ in range(min(len(queue), batch_size - len(image)))]
        if jobs:
            new_image, new_restart = torch.tensor(jobs).T
            start = x[new_image.to(x.device)]
            if random_start:
                start = start + eps * torch.stack([noise(x.shape[1:], seed, *job) for job in jobs]).to(x)
            point = torch.cat([point, start.clamp(0, 1)])
            image, restart = torch.cat([image, new_image]), torch.cat([restart, new_restart])
            steps_left = torch.cat([steps_left, torch.full((len(jobs),), steps)])
        done, left = done + len(image), left - len(image)
        where = image.to(x.device)
        centre, label = x[where], y[where]

        point.requires_grad_()
        with torch.enable_grad():
            logits = model(point).float()
        broken = logits.detach().argmax(1) != label
        if broken.any():
            claim = broken.nonzero().flatten()
            broken[claim] = is_adversarial(model, centre[claim], point.detach()[claim], label[claim], eps)
            x_adv[where[broken]] = point.detach()[broken]
            robust[where[broken]] = False

        out = broken.cpu()
        left -= int((steps_left + (restarts - 1 - restart) * (steps + 1))[out].sum())
        over = ~out & (steps_left == 0)
        queue.extend((i, r + 1) for i, r in zip(image[over].tolist(), restart[over].tolist()) if r + 1 < restarts)
        x_adv[where[over.to(x.device)]] = point.detach()[over.to(x.device)]
        stay = ~out & ~over
        if stay.any():
            # The sum over the batch, not the mean: an image's gradient must not depend on its neighbours.
            with torch.enable_grad():
                loss = F.cross_entropy(logits, label, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() + step_size * gradient.sign()
            point = torch.minimum(torch.maximum(point, centre - eps), centre + eps).clamp(0, 1)
        point = point.detach()[stay.to(x.device)]
        image, restart, steps_left = image[stay], restart[stay], steps_left[stay] - 1
        if report:
            report(done, left, robust)
    return robust, x_adv


def parse_args():
    import common

    parser = common.Parser(description=__doc__.split("\n")[0], epilog="eps and --step-size are in units of 1/255.")
    parser.add_argument("run", help="run folder (its model.pt), or a model.pt, best.pt or checkpoint.pt")
    parser.add_argument(
        "--attack", default="pgd", help="comma-separated, each on what the ones before left: fgsm, pgd (default pgd)"
    )
    parser.add_argument("--eps", type=common.number(float, 0, 255), default=8, help="l-infinity radius (default 8)")
    parser.add_argument("--steps", type=common.number(int, 1), default=50, help="PGD steps (default 50)")
    parser.add_argument("--restarts", type=common.number(int, 1), default=10, help="PGD restarts (default 10)")
    parser.add_argument("--step-size", type=common.number(float, 0, 255), help="PGD step (default eps / 4)")
    parser.add_argument("--individual", action="store_true", help="every attack on all images")
    parser.add_argument("--n", type=common.number(int, 1), help="the first N test images (default all)")
    parser.add_argument("--dataset", help="cifar10, cifar100 or an .npz (default what the run was trained on)")
    parser.add_argument("--data-dir", default="data", help="where cifar10 and cifar100 are (default data)")
    parser.add_argument("--batch-size", type=common.number(int, 1), default=250, help="active set (default 250)")
    parser.add_argument("--seed", type=common.number(int, 0), default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--examples", metavar="FILE", help="write a PNG of broken images there")
    args = parser.parse_args()
    args.attack = args.attack.split(",")
    for name in args.attack:
        if name not in ("fgsm", "pgd"):
            parser.error(f"argument --attack: {name!r} is none of fgsm, pgd")
    for file in filter(None, (args.json, args.examples)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"no folder {Path(file).absolute().parent} to write {file} to")
    args.device = common.find_device(args.device)
    return args


def main():
    import common
    from wrn import load_model

    args = parse_args()
    try:
        model = load_model(args.run, args.device)
    except ValueError as error:
        common.fail(error)
    data = common.load_test_data(args, model.arguments["num_classes"])
    x, y = data.test(args.n)
    eps, n = args.eps / 255, len(y)
    print(f"network  {args.run}, {args.device}, float32")
    print(f"images   first {n:,} test images of {data.name}, eps {args.eps:g}/255")

    with torch.no_grad():
        if not model(x[:100]).isfinite().all():
            common.fail(f"{args.run} gives outputs that are not finite: its weights are no result of a training")
    begin = time.perf_counter()
    correct = predict(model, x, args.batch_size) == y
    rows = [("clean", 100 * common.share(correct), n - int(correct.sum()), time.perf_counter() - begin)]
    unbroken, adversarial = correct.clone(), x.clone()
    for name in args.attack:
        if name == "fgsm":
            settings = {"steps": 1, "restarts": 1, "step_size": eps, "random_start": False}
        else:
            step_size = None if args.step_size is None else args.step_size / 255
            settings = {"steps": args.steps, "restarts": args.restarts, "step_size": step_size}
            name = f"pgd-{args.steps}-{args.restarts}"
        start = time.perf_counter()
        todo = (correct if args.individual else unbroken).nonzero().flatten()
        robust, x_adv = pgd(
            model,
            x[todo],
            y[todo],
            eps,
            **settings,
            batch_size=args.batch_size,
            seed=args.seed,
            report=common.progress_of_attack(name),
        )
        survivors = torch.zeros_like(correct)
        survivors[todo[robust]] = True
        fresh = unbroken & ~survivors
        adversarial[fresh] = x_adv[fresh[todo]]
        unbroken &= survivors
        seconds = time.perf_counter() - start
        rows.append((name, 100 * common.share(survivors), len(todo) - int(survivors.sum()), seconds))

    print(f"\n{'attack':<14}{'accuracy %':>12}{'broken':>10}{'seconds':>10}")
    for name, accuracy, broken, seconds in rows:
        print(f"{name:<14}{accuracy:>12.2f}{broken:>10,}{seconds:>10.1f}")
    robust = 100 * common.share(unbroken)
    if len(args.attack) > 1:
        print(f"{'robust':<14}{robust:>12.2f}{n - int(unbroken.sum()):>10,}{sum(row[3] for row in rows):>10.1f}")
    if args.examples:
        shown = (correct & ~unbroken).nonzero().flatten()[:10]
        save_examples(args.examples, model, x[shown], adversarial[shown], y[shown], eps, data.classes)
    if args.json:
        result = {
            "clean": rows[0][1],
            "robust": robust,
            "attacks": {name: accuracy for name, accuracy, _, _ in rows[1:]},
            "n": n,
            "eps": args.eps,
            "seconds": sum(row[3] for row in rows),
            "seconds_per_attack": {name: seconds for name, _, _, seconds in rows[1:]},
            "individual": args.individual,
            "dataset": data.name,
            "seed": args.seed,
            **common.versions(args.device),
            "training": common.training_of(args.run),
        }
        common.write_text(args.json, json.dumps(result, indent=1) + "\n")


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
