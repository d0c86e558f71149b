"""What a training step of every method costs compared with one of standard training: time, counted passes, memory.

    python -m paper.bench                                        every train_*.py, WRN-16-2, batch 128
    python -m paper.bench --only standard,fgsm,slat --rounds 30  these three, more exactly

The scripts run as they are, data pipeline included, in short turns: in every round each is started anew, makes two
steps to warm up and then those that are timed. What is compared is the median over rounds of the ratio within a round,
so a noisy machine is equally noisy for all. Passes are counted, not assumed: floating-point operations of a step's
convolutions and matrix products, forward and backward, over those of a forward pass of the same batch. Standard
training is 3, less the gradient at the input, which it does not need. Free-AT's step is one replay.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import common
import console
from bookkeeping import Run
from paper.sweep import METHODS, load

CONTESTANTS = ("standard", *METHODS)
WARM_UP = 2


class Flops(TorchDispatchMode):
    """Counts by the formulas of torch's FlopCounterMode, whose module tracker does not work with autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class Stop(BaseException):
    """Ends a script; not an Exception, so that no script catches it."""


def play(name, args, steps, flops=None):
    """Run a script's main() for some steps after the warm-up: (seconds, counted operations) of a step; its Run."""
    notes = []

    class Turn(Run):
        """A run without a folder, which ends after the last step."""

        def _open_folder(self):
            pass

        def _begin_epoch(self):
            super()._begin_epoch()
            self.epoch = 1  # the second: in its first NuAT has no penalty yet

        def log(self, loss, logits, y):
            super().log(loss, logits, y)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize(args.device)
            notes.append((time.perf_counter(), flops.total if flops else 0))
            if len(notes) == WARM_UP + steps:
                raise Stop(self)

        def end_epoch(self):
            self._begin_epoch()

    module = load("fgsm" if name == "standard" else name)
    if name == "standard":
        module.fgsm = lambda model, x, *_: x
    module.Run = Turn
    names = ("depth", "width", "dropout", "batch_size", "dataset", "device", "precision")
    flags = [word for key in names for word in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    flags += ["--epochs", "1000000000"]  # a turn ends before they do
    errors = io.StringIO()
    try:
        with mock.patch.object(sys, "argv", [module.__file__, *flags]):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                module.main()
    except SystemExit:
        print(errors.getvalue(), end="", file=sys.stderr)
        raise
    except Stop as stop:
        seconds, counted = (last - first for first, last in zip(notes[WARM_UP - 1], notes[-1]))
        return (seconds / steps, counted / steps), stop.args[0]


def passes(name, args):
    """The operations of a step over those of a forward pass of the same batch."""
    with Flops() as flops:
        (_, step), run = play(name, args, args.steps, flops)
    with Flops() as forward, torch.no_grad():
        run.model(run.data.test(1)[0])
    return step / (forward.total * args.batch_size)


def peak_memory(name, args):
    """Bytes that torch has given out at most in a turn, weights and data set included."""
    gc.collect()
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        play(name, args, 1)
        return torch.cuda.max_memory_allocated(args.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    # What torch's allocator gave out, as on CUDA: the process's own peak varies by a tenth from run to run.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        play(name, args, 1)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def main():
    parser = console.Parser(
        prog="python -m paper.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number = parser.add_argument, console.number
    add("--only", type=console.names(CONTESTANTS), default=CONTESTANTS, help="separated by commas (default: all)")
    add("--depth", type=int, choices=range(10, 101, 6), metavar="N", default=16, help="6n + 4 (default 16)")
    add("--width", type=number(int, 1), default=2, help="default 2")
    add("--dropout", type=number(float, 0, 0.99), default=0.3, help="default 0.3")
    add("--batch-size", type=number(int, 2), default=128, help="default 128")
    add("--steps", type=number(int, 1), default=3, help="timed in a turn (default 3)")
    add("--rounds", type=number(int, 1), default=9, help="turns of each contestant (default 9)")
    add("--no-memory", dest="memory", action="store_false", help="without peak memory")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    add("--device", type=console.given, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    tiny = "data/cifar10_tiny.npz"
    add("--dataset", type=console.given, default=tiny, help=f"default {tiny}")
    add("--json", type=console.given, metavar="FILE", help="write the numbers there")
    args = parser.parse_args()
    console.check_outputs({"--json": args.json}, [args.dataset])
    args.device = str(common.find_device(args.device))
    if args.precision == "auto":
        args.precision = "bf16" if common.has_bf16(args.device) else "fp32"
    facts = console.versions(args.device)
    network = f"WRN-{args.depth}-{args.width}, batch {args.batch_size}, {args.precision}"
    print(f"{network}, {facts['hardware']}, torch {facts['torch']}", flush=True)

    seconds = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name in args.only:
            (took, _), _ = play(name, args, args.steps)
            seconds[name].append(took)
    base = "standard" if "standard" in args.only else args.only[0]
    counts, rows = {name: passes(name, args) for name in args.only}, {}
    print("step of     passes counted measured spread      ms" + " peak MB" * args.memory)
    for name in args.only:
        ratios = [a / b for a, b in zip(seconds[name], seconds[base])]
        low, measured, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(seconds[name])
        row = {"passes": counts[name], "counted": counts[name] / counts[base], "measured": measured}
        row |= {"spread": (high - low) / measured, "ms": 1e3 * median, "images_per_second": args.batch_size / median}
        rows[name] = row | {"peak_bytes": peak_memory(name, args) if args.memory else None}
        memory = f"{rows[name]['peak_bytes'] / 1e6:>8.0f}" if args.memory else ""
        print(f"{name:<11}{row['passes']:>7.2f}{row['counted']:>8.2f}{measured:>9.2f}{row['spread']:>7.1%}", end="")
        print(f"{row['ms']:>8.1f}{memory}", flush=True)
    if args.json:
        result = {"rounds": args.rounds, "base": base, "steps": rows}
        flags = {key: value for key, value in vars(args).items() if key != "json"}
        console.write_file(args.json, json.dumps({"flags": flags, **facts, "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    console.launch(main)
