import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

# One thread: what the tests compute is too small for two, and runs in other processes must match bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPUs of the machine are somebody else's
ROOT = Path(__file__).parent.parent

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import train_fgsm
from wrn import WideResNet, load_file

torch.set_num_threads(1)
torch.backends.mps.is_available = functools.cache(lambda: False)  # as it is made, so that torch compiles
TINY = "data/cifar10_tiny.npz"
# A network and data that make a run of two epochs take a second.
SMALL = f"--dataset {TINY} --depth 10 --width 1 --limit-train 128 --batch-size 32 --monitor 16 --device cpu"
# Every method: a new train_*.py is found and tested without an entry anywhere.
SCRIPTS = {path.stem.removeprefix("train_"): importlib.import_module(path.stem) for path in ROOT.glob("train_*.py")}
TIMES = {"seconds", "images_per_second", "monitor_seconds"}


class SmoothNet(nn.Module):
    """Twice differentiable, with the delta / return_features contract, for small images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x, delta=None, return_features=False):
        delta, h = delta or {}, {}
        for name, layer in (("0", None), ("conv1", self.conv1), ("conv2", self.conv2)):
            x = x if layer is None else torch.tanh(layer(x))
            x = x + delta[name] if name in delta else x
            h[name] = x
        logits = self.fc(F.softplus(x).mean((2, 3)))
        return (logits, h) if return_features else logits


@pytest.fixture
def smooth():
    """(network, x, y) in float64; no pixel is so near to 0 or 1 that a small step would be clipped."""
    torch.manual_seed(0)
    return SmoothNet().double(), torch.rand(2, 3, 6, 6).double() * 0.8 + 0.1, torch.tensor([0, 2])


@pytest.fixture(scope="session")
def tiny():
    return common.Data(TINY, "data", "cpu")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a script's main() as its command line would: (exit code, stdout, stderr)."""

    def call(module, arguments):
        name = f"{module.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
        capsys.readouterr()
        try:
            common.launch(module.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def train(method, epochs, out, flags=""):
    """A small run of a method in a process of its own; the folder that it leaves."""
    flags = f"{SMALL} {flags} --epochs {epochs} --out {out}".split()
    command = [sys.executable, f"train_{method}.py", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def rows(run):
    """metrics.jsonl without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(a, b):
    """The same content, to the last bit, but for what a clock says."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - TIMES:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    for file in ("model.pt", "best.pt", "checkpoint.pt"):
        assert_same(load_file(a / file), load_file(b / file))


EPS = 8 / 255
# Small budgets, for what does not depend on them.
SHORT = {
    "pgd": {"steps": 5, "restarts": 2},
    "fgsm": {},
    "apgd-ce": {"steps": 10},
    "apgd-dlr": {"steps": 10},
    "apgd-t": {"steps": 8, "targets": 3},
    "fab-t": {"steps": 6, "targets": 3},
    "square": {"queries": 30},
}


@pytest.fixture(scope="session")
def trained(tiny):
    """A network that knows something and is partly robust, and 60 test images."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, 0.0, tiny.mean, tiny.std)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for epoch in range(3):
        for x, y in tiny.batches(epoch, 50, 0):
            loss = F.cross_entropy(model(train_fgsm.fgsm(model, x, y, 2 / 255, 2 / 255)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), *tiny.test(60)


class Linear(nn.Module):
    """On images (N, 3, 2, 2), in float64 and eval mode."""

    def __init__(self, classes=2):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(classes, 12, generator=generator, dtype=torch.float64))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.w.T
