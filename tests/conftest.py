import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

# One thread: what the tests compute is too small for two, and runs in other processes must match bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPUs of the machine are somebody else's
ROOT = Path(__file__).parent.parent

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import console
import train_fgsm
from console import load_file
from wrn import WideResNet

torch.set_num_threads(1)
torch.backends.mps.is_available = functools.cache(lambda: False)  # cached, as the real one: for torch.compile
TINY = "data/cifar10_tiny.npz"
FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)
with np.load(ROOT / TINY) as file:  # every other pixel of its first images, in an order that shows all classes at once
    arrays = dict(file)
    for split in ("train", "test"):
        y = arrays[f"{split}_y"][:128]
        order = np.argsort([(y[:i] == label).sum() for i, label in enumerate(y)], kind="stable")
        arrays |= {f"{split}_x": arrays[f"{split}_x"][order, ::2, ::2], f"{split}_y": y[order]}
    np.savez(f"{FOLDER.name}/16x16.npz", **arrays)
# A network and data that make a run of two epochs take a second.
NETWORK = "--depth 10 --width 1 --batch-size 32 --device cpu --monitor 16 --limit-train 128"
SMALL = f"--dataset {FOLDER.name}/16x16.npz {NETWORK}"
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


@contextlib.contextmanager
def command_line(module, arguments):
    """A script's sys.argv in here; afterwards TF32 is as torch has it, for those tests that come next."""
    try:
        with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *arguments.split()]):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = True


def run_main(module, arguments):
    """The exit code of a script's main(), run as its command line would."""
    with command_line(module, arguments):
        try:
            console.launch(module.main)
        except SystemExit as end:
            return end.code
    return 0


def parsed(module, arguments):
    """What a script makes of its flags."""
    with command_line(module, arguments):
        return module.parse_args()


@pytest.fixture
def cli(capsys):
    """Run a script's main() as its command line would: (exit code, stdout, stderr)."""

    def call(module, arguments):
        capsys.readouterr()
        return run_main(module, arguments), *capsys.readouterr()

    return call


@pytest.fixture
def refused(cli):
    """Check that a script's main() ends in one line on stderr that holds these messages."""

    def check(module, arguments, *messages, code=2):
        found, _, err = cli(module, arguments)
        assert found == code and err.count("\n") == 1 and all(message in err for message in messages), (arguments, err)

    return check


def train(method, epochs, out, flags=""):
    """A small run of a method on images of 32 x 32; the folder that it leaves."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_main(SCRIPTS[method], f"--dataset {TINY} {NETWORK} {flags} --epochs {epochs} --out {out}") == 0
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
    """A network that knows something and is partly robust, and 60 test images of 8 x 8."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, 0.0, tiny.mean, tiny.std)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for epoch in range(3):
        for x, y in tiny.batches(epoch, 100, 0):
            x = F.avg_pool2d(x, 4)
            loss = F.cross_entropy(model(train_fgsm.fgsm(model, x, y, 2 / 255, 2 / 255)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, y = tiny.test(60)
    return model.eval(), F.avg_pool2d(x, 4), y


class Linear(nn.Module):
    """On images (N, 3, 2, 2), in float64 and eval mode."""

    def __init__(self, classes=2):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(classes, 12, generator=generator, dtype=torch.float64))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.w.T
