"""What a training step of every method costs, and what an evaluation costs: one command, one table.

    python -m paper.bench                        a step of every train_*.py, WRN-16-2, batch 128
    python -m paper.bench --part evaluation      PGD-50-10 and AutoAttack, images/s, beside a plain loop
    python -m paper.bench --part data            the data pipeline alone

The training scripts are timed as they are, data pipeline included: each runs in a thread of its own, with a Run that
ends its turn after every step (after every replay of Free-AT), so that exactly one of them computes at any time. All
take turns, so that a noisy machine is equally noisy for all; what is compared is the median over rounds of the ratio
within a round. Counted: what the script tells Run, a forward pass being 1 and a backward pass 1 for activations and 1
for weights; standard training costs 3. On CUDA the last column is the share of the device's measured bfloat16 matrix
rate that the counted passes reach.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import common
import eval_attacks
import wrn
from paper.sweep import METHODS, load

EPS = 8 / 255
CONTESTANTS = ("standard", *METHODS, "naive")
ENDLESS = 10**9


class Stop(BaseException):
    """Raised in a contestant to end it; not an Exception, so that no script catches it."""


class Contestant(threading.Thread):
    """A training script in a thread of its own. This object is its Run as well: log() ends a step, and the turn."""

    epoch, step, total_steps = 0, 0, 128 * ENDLESS

    def __init__(self, name, args):
        super().__init__(name=name, daemon=True)
        self.args, self.extra, self.passes, self.error = args, {}, None, None
        self.my_turn, self.their_turn, self.over = threading.Semaphore(0), threading.Semaphore(0), False

    def take_turn(self):
        """Let the script make one step; the seconds it took."""
        self.my_turn.release()
        self.their_turn.acquire()
        if self.error:
            raise self.error
        return self.seconds

    def end(self):
        self.over = True
        self.my_turn.release()
        self.join()

    def run(self):
        try:
            self.begin_turn()
            self.train()
            raise RuntimeError(f"{self.name} ended by itself")
        except Stop:
            pass
        except BaseException as error:
            self.error = error
        self.their_turn.release()

    def begin_turn(self):
        self.my_turn.acquire()
        if self.over:
            raise Stop
        self.start_of_step = time.perf_counter()

    def end_turn(self):
        self.their_turn.release()
        self.begin_turn()

    def train(self):
        """The script's main(), or that of one of the two contestants that are no scripts."""
        if self.name == "naive":
            return naive(self.args, self)
        module = load("fgsm" if self.name == "standard" else self.name)
        if self.name == "standard":
            module.fgsm = lambda model, x, *_: x
        module.Run = self.as_run
        flags = ["--epochs", ENDLESS, *shared_flags(self.args)]
        self.argv, sys.argv = sys.argv, [module.__file__, *map(str, flags)]
        module.main()

    def as_run(self, args, model, optimizer, data, passes, *_):
        sys.argv = self.argv
        self.passes = 3 if self.name == "standard" else passes
        return self

    def log(self, loss, logits, y):
        self.step += 1
        wait(self.args.device)
        self.seconds = time.perf_counter() - self.start_of_step
        self.end_turn()

    def end_epoch(self):
        pass


def shared_flags(args):
    """The flags that a training script and this one have in common."""
    names = ("depth", "width", "dropout", "batch_size", "dataset", "device", "precision")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(args, name))) for name in names]
    return [word for pair in pairs for word in pair] + ["--compile"] * args.compile


def naive(args, run):
    """FGSM as one writes it first: float32, torch's dropout and memory format, weight gradients in both passes."""
    arrays, classes = common.load_arrays(args.dataset, "data")
    data = common.Data(args.dataset, classes, arrays, args.device)
    model = wrn.WideResNet(args.depth, args.width, len(classes), args.dropout).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    run.passes = 5
    for epoch in range(ENDLESS):
        for x, y in data.batches(epoch, args.batch_size, 0):
            with mock.patch.object(wrn, "dropout", F.dropout, create=True):
                x = x.contiguous().requires_grad_()
                F.cross_entropy(model(x), y).backward()
                x_adv = (x + EPS * x.grad.sign()).clamp(0, 1).detach()
                logits = model(x_adv)
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            run.log(loss, logits, y)


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function, device):
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def take_turns(contestants, args):
    """{name: [seconds]}, one of each in every round, until the ratios are known to 1 % or time is up.

    contestants: {name: function that makes a step and returns its seconds}.
    """
    for take_turn in list(contestants.values()) * 2:
        take_turn()  # warms up
    times = {name: [] for name in contestants}
    first, start = next(iter(contestants)), time.perf_counter()
    while True:
        for name, take_turn in contestants.items():
            times[name].append(take_turn())
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
    """Bytes that torch holds at most in three steps, weights and data set included, in a process of its own."""
    command = [sys.executable, "-m", "paper.bench", "--memory-of", name, *shared_flags(args)]
    out = subprocess.run(command, capture_output=True, text=True)
    return int(out.stdout) if out.returncode == 0 else None


class ThreeSteps(Contestant):
    """A contestant that is alone, in the main thread."""

    def begin_turn(self):
        self.start_of_step = time.perf_counter()

    def end_turn(self):
        if self.step == 3:
            raise Stop


def memory_of(args):
    contestant = ThreeSteps(args.memory_of, args)
    if args.device.startswith("cuda"):
        contestant.run()
        peak = torch.cuda.max_memory_allocated(args.device)
    else:
        # What torch's allocator gave out, as on CUDA: the process's own peak varies by a tenth from run to run.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            contestant.run()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        peak = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    if contestant.error:
        raise contestant.error
    print(peak)


def matrix_rate(device):
    """FLOP/s of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(20)]
    return 2 * 8192**3 / statistics.median(times[5:])


def forward_flops(args):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wrn.WideResNet(args.depth, args.width)(torch.rand(1, 3, 32, 32))
    return counter.get_total_flops() * args.batch_size


def steps(args):
    contestants = {name: Contestant(name, args) for name in args.only}
    try:
        for contestant in contestants.values():
            contestant.start()
        times = take_turns({name: contestant.take_turn for name, contestant in contestants.items()}, args)
    finally:
        for contestant in contestants.values():
            contestant.end()
    passes = {name: contestant.passes for name, contestant in contestants.items()}
    base = "standard" if "standard" in times else next(iter(times))
    rate = matrix_rate(args.device) if args.device.startswith("cuda") else None
    head = f"{'step of':<11}{'counted':>8}{'measured':>9}{'spread':>8}{'ms':>9}{'images/s':>10}{'peak MB':>9}"
    print(head + ("   of matrix rate" if rate else ""))
    rows = {}
    for name in times:
        of_base, median = ratios(times, name, base), statistics.median(times[name])
        row = rows[name] = {
            "counted": passes[name] / passes[base],
            "measured": statistics.median(of_base),
            "spread": relative_spread(of_base),
            "ms": 1e3 * median,
            "images_per_second": args.batch_size / median,
            "peak_bytes": peak_memory(args, name) if args.memory else None,
        }
        memory = f"{row['peak_bytes'] / 1e6:>9.0f}" if row["peak_bytes"] else f"{'':>9}"
        print(
            f"{name:<11}{row['counted']:>8.2f}{row['measured']:>9.2f}{row['spread']:>8.1%}{row['ms']:>9.1f}"
            f"{row['images_per_second']:>10.0f}{memory}",
            end="",
        )
        if rate:
            row["of_matrix_rate"] = passes[name] * forward_flops(args) / median / rate
            print(f"{row['of_matrix_rate']:>17.1%}", end="")
        print(flush=True)
    for name in ("slat", "naive"):
        if {name, "fgsm"} <= set(times):
            rows[name]["over_fgsm"] = statistics.median(ratios(times, name, "fgsm"))
            print(f"{name} / fgsm {rows[name]['over_fgsm']:.3f}")
    return {"rounds": len(times[base]), "base": base, "matrix_rate": rate, "steps": rows}


def data(args):
    """Images/s of shuffled, cropped and flipped batches from memory, as the scripts read them."""
    arrays, classes = common.load_arrays(args.dataset, "data")
    loaded = common.Data(args.dataset, classes, arrays, args.device)
    count = len(loaded.train_x) - len(loaded.train_x) % args.batch_size

    def epoch():
        return seconds(lambda: [None for _ in loaded.batches(0, args.batch_size, 0)], args.device)

    times = take_turns({"data": epoch}, args)
    rate = count / statistics.median(times["data"])
    print(f"data        {rate:,.0f} images/s from {len(loaded.train_x):,} images")
    return {"images_per_second": rate}


def evaluation(args):
    """Seconds and robust images of PGD-50-10 and AutoAttack on a network (--run), beside the plain PGD loop."""
    if not args.run:
        common.fail("--part evaluation needs --run, a trained network: a random one breaks at once")
    model = wrn.load_model(args.run, args.device)
    flags = argparse.Namespace(run=args.run, dataset=args.dataset, data_dir="data", device=args.device)
    x, y = common.load_test_data(flags, model.arguments["num_classes"]).test(args.n)
    found = {
        "pgd, plain loop": lambda: eval_attacks.plain_pgd(model, x, y, EPS)[0],
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


PARTS = {"steps": steps, "data": data, "evaluation": evaluation}


def main():
    parser = common.Parser(
        prog="python -m paper.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number = parser.add_argument, common.number
    add("--part", choices=PARTS, default="steps")
    add("--only", default=",".join(CONTESTANTS), help="contestants of --part steps (default: all)")
    add("--depth", type=number(int, 10), default=16, help="default 16")
    add("--width", type=number(int, 1), default=2, help="default 2")
    add("--dropout", type=number(float, 0, below=1), default=0.3, help="default 0.3")
    add("--batch-size", type=number(int, 2), default=128, help="default 128")
    add("--rounds", type=number(int, 1), default=9, help="turns that each contestant has at least (default 9)")
    add("--seconds", type=number(float, 0), default=600, help="no further round after that many (default 600)")
    add("--no-memory", dest="memory", action="store_false", help="without peak memory (one process per contestant)")
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
        if name not in CONTESTANTS:
            parser.error(f"argument --only: {name!r} is not one of {', '.join(CONTESTANTS)}")
    if (args.depth - 4) % 6:
        parser.error(f"argument --depth: {args.depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    args.device = str(common.find_device(args.device))
    if args.precision == "auto":
        args.precision = "bf16" if common.has_bf16(args.device) else "fp32"
    torch.manual_seed(0)
    if args.memory_of:
        return memory_of(args)
    facts = common.versions(args.device) | {"command": shlex.join(["python", "-m", "paper.bench", *sys.argv[1:]])}
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
