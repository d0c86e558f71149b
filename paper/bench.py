#!/usr/bin/env python3
"""What a training step of every method costs, and what an evaluation costs: one command, one table.

    python bench.py                        steps of all methods, WRN-16-2, batch 128
    python bench.py --part evaluation      PGD-50-10 and AutoAttack, images/s, beside a plain loop
    python bench.py --part growth          cost against batch size, width, depth and number of images
    python bench.py --part data            the data pipeline alone

Contestants take turns in one process, so that a noisy machine is equally noisy for all; what is compared is the median
over rounds of the ratio within a round. Counted: a forward pass is 1, a backward pass 1 for activations and 1 for
weights, so standard training costs 3. On CUDA the last column is the share of the device's measured bfloat16 matrix
rate that the counted passes reach.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import eval_attacks
import wrn
from train_fgsm import fgsm
from train_fgsm_ckpt import fgsm_ckpt
from train_fgsm_ga import fgsm_ga
from train_fgsm_rs import fgsm_rs
from train_free import free
from train_n_fgsm import n_fgsm
from train_pgd import pgd
from train_slat import slat
from train_yopo import yopo

EPS = 8 / 255


def make_model(args, depth=None, width=None):
    model = wrn.WideResNet(depth or args.depth, width or args.width, dropout=args.dropout)
    model.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model


def contestants(args, model):
    """{name: (counted passes, step(x, y))}: the loops of the scripts, without what the screen and the disk cost."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

    def train_on(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(attack):
        """A step on the images that attack(x, y) gives, and SLAT's deltas with them."""

        def run(x, y):
            with common.autocast(args):
                x_adv, delta = attack(x, y)
                loss = F.cross_entropy(model(x_adv, delta), y)
            train_on(loss)

        return run

    def images(function, *settings):
        return step(lambda x, y: (function(model, x, y, EPS, *settings), None))

    def step_ga(x, y):
        with common.autocast(args):
            x_adv, misalignment = fgsm_ga(model, x, y, EPS, EPS)
            loss = F.cross_entropy(model(x_adv), y) + 0.2 * misalignment
        train_on(loss)

    def step_free(x, y):
        x_adv = x.clone().requires_grad_()
        with common.autocast(args):
            loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        free(x, x_adv.detach(), x_adv.grad, EPS)
        optimizer.step()

    def step_yopo(x, y):
        optimizer.zero_grad()
        with common.autocast(args):
            yopo(model, x, y, EPS, EPS / 4, 5, 3)
        optimizer.step()

    def step_naive(x, y):
        """FGSM as one writes it first: float32, torch's dropout and memory format, weight gradients in both passes."""
        x = x.contiguous().requires_grad_()
        with plain_dropout():
            F.cross_entropy(naive(x), y).backward()
            x_adv = (x + EPS * x.grad.sign()).clamp(0, 1).detach()
            loss = F.cross_entropy(naive(x_adv), y)
        naive_optimizer.zero_grad()
        loss.backward()
        naive_optimizer.step()

    if "naive" in args.only:
        naive = wrn.WideResNet(args.depth, args.width, dropout=args.dropout).to(args.device)
        naive_optimizer = torch.optim.SGD(naive.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    layers = ["0", "conv1", "conv2"]
    found = {
        "standard": (3, step(lambda x, y: (x, None))),
        "fgsm": (5, images(fgsm, EPS)),
        "fgsm_rs": (5, images(fgsm_rs, 1.25 * EPS)),
        "n_fgsm": (5, step(lambda x, y: (n_fgsm(model, x, y, EPS, 2 * EPS), None))),
        "slat": (5, step(lambda x, y: slat(model, x, y, EPS, layers, EPS, 0.9 * EPS))),
        "fgsm_ckpt": (6.5, images(fgsm_ckpt, 1.25 * EPS, 3)),
        "fgsm_ga": (11, step_ga),
        "free": (3, step_free),  # one replay
        "yopo": (15, step_yopo),
        "pgd": (17, images(pgd, EPS / 4, 7)),
        "naive": (5, step_naive),
    }
    return {name: found[name] for name in args.only}


@contextlib.contextmanager
def plain_dropout():
    ours, wrn.dropout = wrn.dropout, F.dropout
    try:
        yield
    finally:
        wrn.dropout = ours


def batch(args, n=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = n or args.batch_size
    x = torch.rand(n, 3, 32, 32, generator=generator).to(args.device, memory_format=torch.channels_last)
    return x, torch.randint(10, (n,), generator=generator).to(args.device)


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function, device):
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def take_turns(functions, args):
    """{name: [seconds]} with a time of each in every round; until the ratios are known to 1 % or time is up."""
    for function in functions.values():
        seconds(function, args.device)  # warms up
    times = {name: [] for name in functions}
    first, start = next(iter(functions)), time.perf_counter()
    while True:
        for name, function in functions.items():
            times[name].append(seconds(function, args.device))
        rounds = len(times[first])
        if rounds >= args.rounds:
            spread = max(relative_spread(ratios(times, name, first)) for name in times)
            if spread / rounds**0.5 < 0.01 or time.perf_counter() - start > args.seconds:
                return times


def ratios(times, name, base):
    return [a / b for a, b in zip(times[name], times[base])]


def relative_spread(values):
    """The distance of the quartiles over the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def peak_memory(args, name):
    """Bytes that torch holds at most in three steps of a contestant, weights included, in a process of its own."""
    flags = ["--memory-of", name, "--only", name, "--depth", args.depth, "--width", args.width]
    flags += ["--batch-size", args.batch_size, "--device", args.device, "--precision", args.precision]
    flags += ["--dropout", args.dropout] + ["--compile"] * args.compile
    out = subprocess.run([sys.executable, __file__, *map(str, flags)], capture_output=True, text=True)
    return int(out.stdout) if out.returncode == 0 else None


def memory_of(args):
    def make_steps():
        model, (x, y) = make_model(args), batch(args)
        (_, step) = contestants(args, model)[args.memory_of]
        for _ in range(3):
            step(x, y)

    if args.device.startswith("cuda"):
        make_steps()
        print(torch.cuda.max_memory_allocated(args.device))
        return
    # What torch's allocator gave out, as on CUDA: the process's own peak varies by a tenth from run to run.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        make_steps()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    print(max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"))


def matrix_rate(device):
    """FLOP/s of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(20)]
    return 2 * 8192**3 / statistics.median(times[5:])


def forward_flops(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def steps(args):
    model, (x, y) = make_model(args), batch(args)
    found = contestants(args, model)
    times = take_turns({name: (lambda f=function: f(x, y)) for name, (_, function) in found.items()}, args)
    base = "standard" if "standard" in times else next(iter(times))
    rate = matrix_rate(args.device) if args.device.startswith("cuda") else None
    flops = forward_flops(model, x)
    head = f"{'step of':<11}{'counted':>8}{'measured':>9}{'spread':>8}{'ms':>9}{'images/s':>10}{'peak MB':>9}"
    print(head + ("   of matrix rate" if rate else ""))
    rows = {}
    for name, (passes, _) in found.items():
        of_base, median = ratios(times, name, base), statistics.median(times[name])
        row = rows[name] = {
            "counted": passes / found[base][0],
            "measured": statistics.median(of_base),
            "spread": relative_spread(of_base),
            "ms": 1e3 * median,
            "images_per_second": len(x) / median,
            "peak_bytes": peak_memory(args, name) if args.memory else None,
        }
        memory = f"{row['peak_bytes'] / 1e6:>9.0f}" if row["peak_bytes"] else f"{'':>9}"
        print(
            f"{name:<11}{row['counted']:>8.2f}{row['measured']:>9.2f}{row['spread']:>8.1%}{row['ms']:>9.1f}"
            f"{row['images_per_second']:>10.0f}{memory}",
            end="",
        )
        if rate:
            row["of_matrix_rate"] = passes * flops / median / rate
            print(f"{row['of_matrix_rate']:>17.1%}", end="")
        print(flush=True)
    if {"slat", "fgsm"} <= set(times):
        print(f"slat / fgsm {statistics.median(ratios(times, 'slat', 'fgsm')):.3f}")
        rows["slat"]["over_fgsm"] = statistics.median(ratios(times, "slat", "fgsm"))
    if {"naive", "fgsm"} <= set(times):
        print(f"naive / fgsm {statistics.median(ratios(times, 'naive', 'fgsm')):.2f}")
    return {"rounds": len(times[base]), "base": base, "matrix_rate": rate, "steps": rows}


def data(args):
    """Images/s of shuffled, cropped and flipped batches from memory, as the scripts read them."""
    arrays, classes = common.load_arrays(args.dataset, "data")
    loaded = common.Data(args.dataset, classes, arrays, args.device)
    count = len(loaded.train_x) - len(loaded.train_x) % args.batch_size
    times = take_turns({"data": lambda: [None for _ in loaded.batches(0, args.batch_size, 0)]}, args)
    rate = count / statistics.median(times["data"])
    print(f"data        {rate:,.0f} images/s from {len(loaded.train_x):,} images")
    return {"images_per_second": rate}


def plain_pgd(model, x, y, eps, steps=50, restarts=10):
    """PGD as one writes it first: all restarts and steps for every image, float32."""
    robust = torch.ones_like(y, dtype=torch.bool)
    for _ in range(restarts):
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            loss = F.cross_entropy(model(x_adv), y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + eps / 4 * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
        robust &= eval_attacks.predict(model, x_adv) == y
    return robust


def evaluation(args):
    """Seconds and robust images of PGD-50-10 and AutoAttack on a network (--run), beside the plain PGD loop."""
    if args.run:
        model = wrn.load_model(args.run, args.device)
    else:
        common.fail("--part evaluation needs --run, a trained network: a random one breaks at once")
    flags = argparse.Namespace(run=args.run, dataset=args.dataset, data_dir="data", device=args.device)
    x, y = common.load_test_data(flags, model.arguments["num_classes"]).test(args.n)
    found = {
        "pgd, plain loop": lambda: plain_pgd(model, x, y, EPS),
        "pgd fp32": lambda: eval_attacks.pgd(model, x, y, EPS, precision="fp32")[0],
        "pgd bf16": lambda: eval_attacks.pgd(model, x, y, EPS, precision="bf16")[0],
        "autoattack fp32": lambda: eval_attacks.autoattack(model, x, y, EPS, precision="fp32")[0],
        "autoattack bf16": lambda: eval_attacks.autoattack(model, x, y, EPS, precision="bf16")[0],
    }
    print(f"{'evaluation':<18}{'robust':>8}{'seconds':>9}{'images/s':>10}")
    rows = {}
    for name, function in found.items():
        if name.split()[0].rstrip(",") not in args.attacks.split(","):
            continue
        robust = []
        took = seconds(lambda f=function, out=robust: out.append(f()), args.device)
        rows[name] = {"robust": int(robust[0].sum()), "seconds": took, "images_per_second": len(x) / took}
        print(f"{name:<18}{rows[name]['robust']:>8}{took:>9.1f}{len(x) / took:>10.2f}", flush=True)
    return {"n": len(x), **rows}


def growth(args):
    """ms of a SLAT step and its GFLOP/s while one size grows; us an image while their number does."""
    rows = {}
    for what, values in (("batch size", (32, 64, 128, 256)), ("width", (1, 2, 4)), ("depth", (10, 16, 28))):
        cells = []
        for value in values:
            sizes = {"depth": args.depth, "width": args.width} | {what: value}
            model = make_model(args, sizes["depth"], sizes["width"])
            x, y = batch(args, value if what == "batch size" else None)
            flags = argparse.Namespace(**{**vars(args), "only": ["slat"]})
            step = contestants(flags, model)["slat"][1]
            times = take_turns({"slat": lambda f=step, x=x, y=y: f(x, y)}, args)
            per_flop = statistics.median(times["slat"]) / (5 * forward_flops(model, x))
            cells.append((value, 1e3 * statistics.median(times["slat"]), 1e-9 / per_flop))
        rows[what] = cells
        print(f"{what:<11}" + "".join(f"{value:>6}: {ms:8.1f} ms {rate:6.1f} GFLOP/s" for value, ms, rate in cells))
    return rows | growth_with_images(args)


def growth_with_images(args):
    """Microseconds an image that batches, and the bookkeeping of PGD, cost beside a network that costs nothing."""
    rows = {"batches": [], "attack": []}

    def network(x):
        return x.mean((2, 3)).repeat(1, 2)[:, :4]

    for n in (1000, 4000, 16000):
        x, y = batch(args, n)
        images = (x * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        arrays = {"train_x": images, "train_y": y.cpu().numpy(), "test_x": images[:1], "test_y": y[:1].cpu().numpy()}
        loaded = common.Data("random", [], arrays, args.device)
        functions = {
            "batches": lambda loaded=loaded: [None for _ in loaded.batches(0, args.batch_size, 0)],
            # Robust to eps 0: nothing ends early.
            "attack": lambda x=x: eval_attacks.pgd(network, x, network(x).argmax(1), 0.0, 5, 2, report=lambda *_: None),
        }
        for name, times in take_turns(functions, args).items():
            rows[name].append((n, 1e6 * statistics.median(times) / n))
    for name, cells in rows.items():
        print(f"{name:<11}" + "".join(f"{n:>6} images: {micro:8.1f} us an image" for n, micro in cells))
    return rows


PARTS = {"steps": steps, "data": data, "evaluation": evaluation, "growth": growth}
METHODS = ("standard", "fgsm", "fgsm_rs", "n_fgsm", "slat", "fgsm_ckpt", "fgsm_ga", "free", "yopo", "pgd", "naive")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--part", choices=PARTS, default="steps")
    add("--only", default=",".join(METHODS), help=f"contestants of --part steps (default {','.join(METHODS)})")
    add("--depth", type=number(int, 10), default=16, help="default 16")
    add("--width", type=number(int, 1), default=2, help="default 2")
    add("--dropout", type=number(float, 0, below=1), default=0.3, help="default 0.3")
    add("--batch-size", type=number(int, 2), default=128, help="default 128")
    add("--rounds", type=number(int, 1), default=9, help="turns of each contestant at least (default 9)")
    add("--seconds", type=number(float, 0), default=600, help="no further round after that many (default 600)")
    add(
        "--no-memory", dest="memory", action="store_false", help="leave peak memory out (a process for each contestant)"
    )
    add("--compile", action="store_true", help="torch.compile the network")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--run", help="run folder or model.pt for --part evaluation")
    add("--attacks", default="pgd,autoattack", help="of --part evaluation (default pgd,autoattack)")
    add("--dataset", default="data/cifar10_tiny.npz", help="default data/cifar10_tiny.npz")
    add("--n", type=number(int, 1), default=500, help="images of --part evaluation (default 500)")
    add("--json", metavar="FILE", help="write the numbers there")
    add("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    for name in args.only:
        if name not in METHODS:
            parser.error(f"argument --only: {name!r} is none of {', '.join(METHODS)}")
    if (args.depth - 4) % 6:
        parser.error(f"argument --depth: {args.depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    args.device = str(common.find_device(args.device))
    if args.precision == "auto":
        args.precision = "bf16" if common.has_bf16(args.device) else "fp32"
    torch.manual_seed(0)
    if args.memory_of:
        return memory_of(args)
    facts = common.versions(args.device)
    print(
        f"WRN-{args.depth}-{args.width}, batch {args.batch_size}, {args.precision}, {facts['hardware']}, torch", end=" "
    )
    print(facts["torch"], flush=True)
    result = PARTS[args.part](args)
    if args.json:
        flags = {key: value for key, value in vars(args).items() if key not in ("json", "memory_of")}
        common.write_text(args.json, json.dumps({"flags": flags, **facts, "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    common.launch(main)
