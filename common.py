"""What every train_*.py needs and a reader of a method does not: flags, data, schedule, run folder, monitor."""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval_attacks import pgd, predict
from wrn import load_file

# ---------------------------------------------------------------- errors


def fail(message, code=2):
    """End the program with one line on stderr: 2 is what the user can mend, 1 a fault in the middle of a run."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def launch(main):
    """Run main(); what a user can cause ends in one line instead of a traceback."""
    try:
        main()
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except torch.OutOfMemoryError:
        fail("out of device memory: give a smaller --batch-size, --width or --depth", 1)
    except KeyboardInterrupt:
        fail("interrupted: the last checkpoint (--resume) or state (--state) is whole", 130)


# ---------------------------------------------------------------- flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but no (default: None) and no (default: False)."""

    def _get_help_string(self, action):
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage in front."""

    def error(self, message):
        fail(message)


def number(kind, low, high=math.inf, below=math.inf):
    """An argparse type: a number of that kind in [low, high] that is less than `below`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not (low <= value <= high and value < below):
            top = f"less than {below:g}" if below < math.inf else f"at most {high:g}"
            top = "" if math.isinf(min(high, below)) else f" and {top}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low:g}{top}")
        return value

    return parse


def make_parser(doc):
    """A parser with the flags that every training script shares; doc is the script's docstring."""
    parser = Parser(
        description=doc.split("\n\n")[0], epilog="eps and step sizes are in units of 1/255.", formatter_class=Help
    )
    add = parser.add_argument
    add("--eps", type=number(float, 0, 255), default=8.0, help="l-infinity radius, in 1/255")
    add("--epochs", type=number(int, 1), default=30, help="passes over the training data")
    add("--batch-size", type=number(int, 2), default=128, help="the last partial batch is dropped")
    add("--lr-max", type=number(float, 0), default=0.2, help="peak of the cyclic learning rate")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
    add(
        "--momentum-cycle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="momentum falls to 0.8 where the learning rate peaks; off: always 0.9",
    )
    add("--dataset", default="cifar10", help="cifar10, cifar100 or the path of an .npz")
    add("--data-dir", default="data", help="where cifar10 and cifar100 are, or are downloaded to")
    add("--limit-train", type=number(int, 1), metavar="N", help="train on the first N training images")
    add("--depth", type=number(int, 10), default=28, help="of the WideResNet: 6n + 4")
    add("--width", type=number(int, 1), default=10, help="of the WideResNet")
    add("--dropout", type=number(float, 0, below=1), default=0.3, help="in every block")
    add("--seed", type=number(int, 0, 2**31), default=0, help="fixes everything on one machine")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the network")
    help = "on CUDA the same command gives the same weights, as it always does on a CPU; slower kernels"
    add("--deterministic", action="store_true", help=help)
    add("--monitor", type=number(int, 1), default=1000, metavar="N", help="images for the accuracies after an epoch")
    add("--out", metavar="DIR", help="run folder (default: runs/METHOD_DATASET_epsEPS_seedSEED)")
    add("--checkpoint-minutes", type=number(float, 0), default=10.0, help="save this often inside an epoch too")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    add("--overwrite", action="store_true", help="replace the run that DIR holds")
    return parser


def parse(parser):
    """The checked arguments: device and precision settled, out filled in."""
    args = parser.parse_args()
    if (args.depth - 4) % 6:
        parser.error(f"argument --depth: {args.depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    args.device = str(find_device(args.device))
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(args.device) else "fp32"
    if args.compile and args.device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        parser.error("--compile on a CPU needs a C++ compiler: install g++, or leave --compile out")
    args.method = parser.prog.removeprefix("train_").removesuffix(".py")
    if args.out is None:
        args.out = f"runs/{args.method}_{Path(args.dataset).stem}_eps{args.eps:g}_seed{args.seed}"
    if 0 < args.eps < 1:
        print(f"note: --eps {args.eps:g} is in units of 1/255", file=sys.stderr)
    return args


# ---------------------------------------------------------------- device


def find_device(name):
    """torch.device of a --device flag, checked to be there. Float32 means float32 on it: no TF32."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        have = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        fail(f"argument --device: no device {name!r} here, only {', '.join(have)}")
    torch.backends.cudnn.allow_tf32 = False
    return device


def has_bf16(device):
    """Does this device's hardware compute in bfloat16?"""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def autocast(args):
    """bfloat16 has the exponents of float32: no gradient underflows that would not there, so no loss is scaled."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def versions(device):
    """What a number depends on beside its flags."""
    if str(device).startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = re.search(r"model name\s*: (.*)", cpuinfo)
        hardware = f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "hardware": hardware,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


# ---------------------------------------------------------------- data


class Data:
    """A data set that lives on the device as uint8: train_x padded by 4 zero pixels, test_x as it is."""

    def __init__(self, name, classes, arrays, device, limit_train=None):
        if "train_x" in arrays:
            x, y = arrays["train_x"], arrays["train_y"]
            # The network's normalisation: of all training images, whatever --limit-train.
            histograms = [np.bincount(x[..., c].ravel(), minlength=256) / x[..., c].size for c in range(3)]
            value = np.arange(256) / 255
            self.mean = [float(h @ value) for h in histograms]
            self.std = [float(max(np.sqrt(h @ (value - m) ** 2), 1e-3)) for h, m in zip(histograms, self.mean)]
            x = torch.from_numpy(x[:limit_train])
            self.train_x = F.pad(x, (0, 0, 4, 4, 4, 4)).to(device)
            self.train_y = torch.from_numpy(y[:limit_train].astype(np.int64)).to(device)
        self.test_x = torch.from_numpy(arrays["test_x"]).to(device)
        self.test_y = torch.from_numpy(arrays["test_y"].astype(np.int64)).to(device)
        self.name, self.classes, self.device = name, classes, device

    def batches(self, epoch, batch_size, seed, done=0):
        """Yield (x, y) of one epoch but its first `done` batches: shuffled, cropped after zero padding by 4, flipped.

        x: (B, 3, H, W) float32 in [0, 1], channels_last. What epoch e of seed s shows depends on
        (s, e) alone: not on the method, nor the device, nor on what was drawn before.
        """
        n = len(self.train_x)
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = torch.from_numpy(random.permutation(n)).to(self.device)
        top, left = torch.from_numpy(random.integers(0, 9, (2, n))).to(self.device)
        flip = torch.from_numpy(random.random(n) < 0.5).to(self.device)
        for part in torch.arange(n - n % batch_size, device=self.device).split(batch_size)[done:]:
            x = crop_and_flip(self.train_x, order[part], top[part], left[part], flip[part])
            yield to_float(x), self.train_y[order[part]]

    def train(self, n=None):
        """The first n training images as they are, (N, 3, H, W) float32 in [0, 1], and their classes."""
        return to_float(self.train_x[:n, 4:-4, 4:-4]), self.train_y[:n]

    def test(self, n=None):
        return to_float(self.test_x[:n]), self.test_y[:n]


def crop_and_flip(padded, index, top, left, flip):
    """Crops of padded[index], uint8 (N, H + 8, W + 8, C) -> (B, H, W, C), in one gather.

    top, left: (B,) offsets in 0..8. flip: (B,) bool, mirror left and right after cropping.
    """
    height, width = padded.shape[1] - 8, padded.shape[2] - 8
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(len(index), -1)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_float(images):
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], channels_last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def read_npz(path, names):
    """Those of the named arrays that an .npz has. Headers are checked before anything is unpacked.

    ValueError for a file that is small and would fill the memory; whatever zipfile and numpy raise for a damaged one.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        unpacked = sum(members[name].file_size for name in names if name in members)
        if unpacked > max(100 * path.stat().st_size, 64e6):
            raise ValueError(f"{path.stat().st_size / 1e6:.1f} MB that unpack to {unpacked / 1e9:.1f} GB")
        for name in names:
            if name not in members:
                continue
            with archive.open(members[name]) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                if math.prod(shape) * dtype.itemsize > members[name].file_size:
                    raise ValueError(f"{name} is shorter than its header says")
                file.seek(0)
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def load_arrays(name, data_dir):
    """(arrays, classes) of a data set: cifar10, cifar100 or the path of an .npz."""
    if name in ("cifar10", "cifar100"):
        import torchvision.datasets as datasets

        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        try:
            splits = [kind(data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:  # the network, the disk, the archive: torchvision raises many kinds
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            fail(
                f"cannot get {name} into {data_dir} ({reason}): give the --data-dir that has it, or --dataset FILE.npz"
            )
        train, test = ((split.data, np.array(split.targets)) for split in splits)
        return dict(train_x=train[0], train_y=train[1], test_x=test[0], test_y=test[1]), splits[0].classes
    path = Path(name)
    if not path.is_file():
        fail(f"no data set {name!r}: give cifar10, cifar100 or the path of an .npz")
    try:
        arrays = read_npz(path, ("train_x", "train_y", "test_x", "test_y", "classes"))
        classes = [str(c) for c in arrays.pop("classes")] if "classes" in arrays else None
        arrays["train_x"], arrays["train_y"], arrays["test_x"], arrays["test_y"]
    except Exception as error:  # zipfile, zlib, struct, numpy: whatever a damaged file makes them raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        fail(f"{path} is no data set, it needs train_x, train_y, test_x, test_y ({reason})")
    for split in ("train", "test"):
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            fail(f"{path}: {split}_x is {x.dtype} {x.shape}, it must be uint8 (N, H, W, 3)")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            fail(f"{path}: {split}_y is {y.dtype} {y.shape}, it must be whole numbers ({len(x)},)")
    if arrays["train_x"].shape[1:] != arrays["test_x"].shape[1:]:
        fail(f"{path}: train_x and test_x hold images of different sizes")
    count = max(int(arrays["train_y"].max()) + 1, 2)
    if count > max(len(arrays["train_y"]), 1000):
        fail(f"{path}: label {count - 1} in train_y, but there are only {len(arrays['train_y'])} images")
    for split in ("train", "test"):
        y = arrays[f"{split}_y"]
        if y.min() < 0 or y.max() >= count:
            bad = y[(y < 0) | (y >= count)][0]
            fail(f"{path}: label {bad} in {split}_y is out of range, train_y has 0 to {count - 1}")
    if classes is None or len(classes) != count:
        classes = [f"class {i}" for i in range(count)]
    return arrays, classes


def load_data(args):
    """The data set of a training run on its device."""
    arrays, classes = load_arrays(args.dataset, args.data_dir)
    data = Data(args.dataset, classes, arrays, args.device, args.limit_train)
    if len(data.train_x) < args.batch_size:
        fail(f"{len(data.train_x)} training images are less than one batch of {args.batch_size}: lower --batch-size")
    return data


def run_folder(run):
    """The folder of a run that is named by its folder or by a file in it."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def load_test_data(args, num_classes):
    """The data set that eval_attacks.py's flags name: by default what the run was trained on."""
    if args.dataset is None:
        folder = run_folder(args.run)
        try:
            args.dataset = json.loads((folder / "config.json").read_text())["dataset"]
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"no config.json in {folder} says what data to use: give --dataset")
    arrays, classes = load_arrays(args.dataset, args.data_dir)
    if arrays["test_y"].max() >= num_classes:
        fail(f"{args.dataset} has {len(classes)} classes and the network {num_classes}")
    return Data(args.dataset, classes, {k: arrays[k] for k in ("test_x", "test_y")}, args.device)


def training_of(run):
    """What is known of the training behind a run folder or a file in it: its config and training seconds."""
    folder = run_folder(run)
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {**config, "seconds": sum(row["seconds"] for row in rows), "last_epoch": rows[-1]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


# ---------------------------------------------------------------- schedule


def cyclic(progress, lr_max, momentum_cycle=True):
    """(learning rate, momentum) when a share `progress`, 0 to 1, of all steps is done.

    Linear from 0 to lr_max over the first 40 %, linear to 0 over the rest; the momentum goes
    0.9, 0.8, 0.9 against it, as torch's CyclicLR lets it do by default.
    """
    height = progress / 0.4 if progress < 0.4 else (1 - progress) / 0.6
    return lr_max * height, 0.9 - 0.1 * height * momentum_cycle


# ---------------------------------------------------------------- screen


def clock(seconds):
    """1:02:03, 2:03 or, from two days on, '9.2 days'."""
    if seconds >= 172800:
        return f"{seconds / 86400:.1f} days"
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StatusLine:
    """One line that redraws itself on a terminal; where the output is a file, a plain line now and then."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.last = time.monotonic()

    def due(self):
        """Is it time to show something? Asked first, because what is shown may make the host wait for a GPU."""
        return time.monotonic() - self.last >= (0.5 if self.terminal else 20)

    def show(self, text):
        if self.due():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)
            self.last = time.monotonic()

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def progress_of_attack(name):
    """A report for eval_attacks' functions: what is unbroken, and a bound on the time left."""
    line, begin = StatusLine(), []

    def report(done, left, robust):
        if not begin:  # a resumed attack begins with some done
            begin[:] = time.perf_counter(), done
        if left == 0:
            line.clear()
        elif line.due():
            bound = clock((time.perf_counter() - begin[0]) * left / max(done - begin[1], 1))
            line.show(f"{name}: {int(robust.sum()):,} of {len(robust):,} unbroken, at most {bound} left")

    return report


# ---------------------------------------------------------------- files


def write_file(path, content):
    """Write bytes to a new file beside path, then move it there: path is whole at any time."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only folder refuses even what is not there
            new.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, text.encode())


def write_torch(path, state):
    # By way of memory: torch.save to a file on a full disk fails in C++, and not with an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


# ---------------------------------------------------------------- monitor


def percent(right):
    """How many of a bool tensor are True, in per cent."""
    return 100 * int(right.sum()) / right.numel()


def monitor(model, x, y, eps):
    """Clean, FGSM and PGD-10 accuracy in per cent of a network in eval mode, and its gradient alignment; no verdict.

    fgsm is the plain accuracy on x + eps sign(grad), so it can exceed clean (label leaking). pgd10 is
    eval_attacks.pgd with 10 steps of eps / 4 from one fixed random start. alignment is the mean cosine of the
    gradients at x and at x + u, u ~ U(-eps, eps) (Andriushchenko & Flammarion 2020, arXiv:2007.02617, eq. 3).
    """

    def gradients(x):
        for part, label in zip(x.split(250), y.split(250)):
            part = part.clone().requires_grad_()
            loss = F.cross_entropy(model(part).float(), label, reduction="sum")
            yield torch.autograd.grad(loss, part)[0]

    gradient = torch.cat(list(gradients(x)))
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    other = torch.cat(list(gradients(x + eps * u)))
    x_fgsm = (x + eps * gradient.sign()).clamp(0, 1)
    return {
        "clean": percent(predict(model, x) == y),
        "fgsm": percent(predict(model, x_fgsm) == y),
        "pgd10": percent(pgd(model, x, y, eps, steps=10, restarts=1)[0]),
        "alignment": F.cosine_similarity(gradient.flatten(1), other.flatten(1)).mean().item(),
    }


def overfitting(row):
    """What is suspicious about the accuracies of an epoch, or None.

    A network that is robust to FGSM but not to PGD has overfitted catastrophically (Wong et al. 2020);
    one that knows FGSM images better than clean ones reads the label off the perturbation (Kurakin et
    al. 2017, arXiv:1611.01236). The margins, 10 and 2 points, are above the noise of a few hundred images.
    """
    clean, fgsm, pgd10 = row["test_clean"], row["test_fgsm"], row["test_pgd10"]
    if fgsm > clean + 2:
        return f"label leaking: FGSM accuracy {fgsm:.1f} % exceeds clean accuracy {clean:.1f} %"
    if pgd10 < fgsm / 2 and pgd10 < fgsm - 10:
        return f"catastrophic overfitting: PGD-10 accuracy {pgd10:.1f} % where FGSM accuracy is {fgsm:.1f} %"
    return None


# ---------------------------------------------------------------- run

FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "best.pt")
# Flags that may differ between a run and its resumption.
FREE_FLAGS = ("device", "compile", "data_dir", "out", "checkpoint_minutes", "resume", "overwrite")
HEADER = "epoch   loss  train |  test clean  fgsm pgd10 |  train clean  fgsm pgd10    time"
ROW = (
    "{epoch:5} {loss:6.3f} {train_acc:6.1f} |  {test_clean:10.1f} {test_fgsm:5.1f} {test_pgd10:5.1f} "
    "|  {train_clean:11.1f} {train_fgsm:5.1f} {train_pgd10:5.1f}"
)


class Interrupted(Exception):
    """A signal arrived where nothing needs to be finished first."""


class Run:
    """A run's folder, its counters and what is printed; the loop itself stands in the script.

    passes: the cost of a step in forward and backward passes, standard training being 3.
    steps_per_batch: optimiser steps on each batch (Free-AT's replays).
    done: batches of this epoch that are behind it; not 0 after a resume inside an epoch.
    extra: what a method carries from step to step; it is saved in the checkpoint.
    """

    def __init__(self, args, model, optimizer, data, passes, steps_per_batch=1):
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        self.out = Path(args.out)
        self.steps_per_batch = steps_per_batch
        self.steps_per_epoch = len(data.train_x) // args.batch_size * steps_per_batch
        self.total_steps = args.epochs * self.steps_per_epoch
        self.epoch = self.step = 0
        self.rows, self.best, self.extra = [], -1.0, {}
        self._begin_epoch()
        self.signal, self.interruptible, self.saved = None, False, time.monotonic()
        self.line = StatusLine()
        self._open_folder()
        self._announce(passes)

    def _open_folder(self):
        args, out = self.args, self.out
        config = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite")}
        if out.exists() and not out.is_dir():
            fail(f"argument --out: {out} is a file, it must name a folder")
        if args.resume:
            if not (out / "config.json").exists():
                fail(f"no run to resume in {out}")
            try:
                before = json.loads((out / "config.json").read_text())
            except ValueError:
                before = None
            if not isinstance(before, dict):
                fail(f"{out}/config.json is damaged: --overwrite starts the run anew")
            for key in sorted(config, key=lambda key: key != "method"):
                if key not in FREE_FLAGS and before.get(key) != config[key]:
                    flag = "--" + key.replace("_", "-") if key != "method" else "the method"
                    fail(f"cannot resume {out}: {flag} was {before.get(key)} there and is {config[key]} now")
            if (out / "checkpoint.pt").exists():  # else it was killed in its first epoch
                self._load_checkpoint()
            return
        found = [name for name in FILES if (out / name).exists()]
        if found and not args.overwrite:
            fail(f"{out} holds a run: --resume goes on with it, --overwrite replaces it, --out names another folder")
        out.mkdir(parents=True, exist_ok=True)
        for name in found:
            (out / name).unlink()
        write_text(out / "config.json", json.dumps({**config, **versions(args.device)}, indent=1) + "\n")

    def _announce(self, passes):
        args, data, m = self.args, self.data, self.model.arguments
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(f"network  WRN-{m['depth']}-{m['width']}, {count:.1f} M parameters, dropout {m['dropout']}")
        print(f"data     {data.name}: {len(data.train_x):,} training, {len(data.test_x):,} test images,", end=" ")
        print(f"{len(data.classes)} classes")
        print(f"device   {versions(args.device)['hardware']}, {args.precision}")
        print(f"run      {self.out}: {args.epochs} epochs, {self.total_steps:,} steps, eps {args.eps:g}/255")
        if args.resume:
            inside = f" and {self.done:,} batches" if self.done else ""
            print(f"resumed  after epoch {self.epoch} of {args.epochs}{inside}")
        if self.epoch < args.epochs:
            seconds = self._time_standard_step() * passes / 3 * (self.total_steps - self.step)
            print(f"estimate about {clock(seconds)} of training on this device, {passes} passes a step")
        print(HEADER, flush=True)

    def _time_standard_step(self):
        """Seconds of a forward and backward pass over one batch, on a copy of the network."""
        args = self.args
        devices = [args.device] if args.device.startswith("cuda") else []
        with torch.random.fork_rng(devices):
            model = copy.deepcopy(self.model).train()
            n, seconds = min(8, args.batch_size), 0.0
            while True:
                x, y = self.data.train(n)
                for _ in range(2):  # the first warms up
                    start = time.perf_counter()
                    with autocast(args):
                        loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    loss.item()
                    seconds = (time.perf_counter() - start) * args.batch_size / n
                if n == args.batch_size or seconds > 2:
                    return seconds
                n = args.batch_size

    def _begin_epoch(self):
        """Sums over the epoch's steps; they stay on the device, so the host need not wait for it."""
        zero = torch.zeros((), device=self.args.device)
        self.sums = {"loss": zero, "correct": zero.long(), "seen": zero.long(), "bad_step": zero.long()}
        self.seconds = 0.0

    @property
    def done(self):
        return (self.step - self.epoch * self.steps_per_epoch) // self.steps_per_batch

    def epochs(self):
        """Yield what epochs are left, in train mode. SIGTERM and Ctrl-C end the run after the step in hand."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.epoch < self.args.epochs:
                self.model.train()
                self.start = time.perf_counter() - self.seconds
                yield self.epoch
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.signal is not None:  # who asks twice will not wait
            raise KeyboardInterrupt
        self.signal = number
        if self.interruptible:
            raise Interrupted

    def _save_inside_epoch(self):
        """What a resume needs to go on at this very step; then end, if a signal asked for that."""
        self._check_loss(weights=True)
        self.seconds = time.perf_counter() - self.start
        self._save_checkpoint()
        if self.signal is not None:
            self.line.clear()
            command = [arg for arg in sys.argv[1:] if arg not in ("--resume", "--overwrite")]
            name = signal.Signals(self.signal).name
            print(f"stopped  by {name} after step {self.step:,} of {self.total_steps:,}; this goes on:")
            print(f"         {shlex.join(['python', Path(sys.argv[0]).name, *command, '--resume'])}", flush=True)
            sys.exit(128 + self.signal)

    def _check_loss(self, weights=False):
        """End the run if a loss was not finite, or with weights=True if weights are not: then nothing more is saved."""
        what, step = "the loss is", int(self.sums["bad_step"])
        if weights and not step and not all(w.isfinite().all() for w in self.model.state_dict().values()):
            what, step = "weights are", self.step
        if step:
            fail(
                f"{what} not finite, first seen in epoch {self.epoch + 1} at step {step:,}: try a lower --lr-max; "
                f"{self.out} keeps its last good checkpoint",
                1,
            )

    def set_lr(self):
        """Give the optimiser this step's learning rate and momentum."""
        lr, momentum = cyclic(self.step / self.total_steps, self.args.lr_max, self.args.momentum_cycle)
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum

    def count(self, loss, logits, y):
        """Count a step that was made; now and then show it, save it, or end here because a signal asked for it."""
        self.step += 1
        sums, loss = self.sums, loss.detach()
        sums["loss"] = sums["loss"] + loss
        sums["correct"] = sums["correct"] + (logits.detach().argmax(1) == y).sum()
        sums["seen"] = sums["seen"] + len(y)
        sums["bad_step"] = torch.where(loss.isfinite() | (sums["bad_step"] > 0), sums["bad_step"], self.step)
        if self.line.due():
            self._check_loss()
            steps = self.step - self.epoch * self.steps_per_epoch
            seen = int(sums["seen"])
            rate = seen / (time.perf_counter() - self.start)
            between = sum(row["monitor_seconds"] for row in self.rows) / max(len(self.rows), 1)
            left = (self.total_steps - self.step) * (seen / steps) / rate + (self.args.epochs - self.epoch) * between
            self.line.show(
                f"epoch {self.epoch + 1}/{self.args.epochs} step {steps}/{self.steps_per_epoch} "
                f"loss {float(sums['loss']) / steps:.3f} acc {100 * int(sums['correct']) / seen:.1f} "
                f"lr {self.optimizer.param_groups[0]['lr']:.3f} {rate:.0f} img/s {clock(left)} left"
            )
        if self.signal is not None or time.monotonic() - self.saved >= 60 * self.args.checkpoint_minutes:
            self._save_inside_epoch()

    def end_epoch(self):
        """Measure, print and save."""
        self._check_loss(weights=True)
        loss = float(self.sums["loss"]) / self.steps_per_epoch  # waits for the device
        seconds, seen = time.perf_counter() - self.start, int(self.sums["seen"])
        self.line.show(f"epoch {self.epoch + 1}/{self.args.epochs}: clean, FGSM and PGD-10 accuracy ...")
        start = time.perf_counter()
        accuracies = self._measure(seconds)
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "train_acc": 100 * int(self.sums["correct"]) / seen,
            "seconds": seconds,
            "images_per_second": seen / seconds,
            **accuracies,
            "monitor_seconds": time.perf_counter() - start,
        }
        row["warning"] = overfitting(row)
        self.rows.append(row)
        self.line.clear()
        print(ROW.format(**row), f"{clock(seconds):>7}", flush=True)
        if row["warning"]:
            print(f"warning: epoch {self.epoch}: {row['warning']}", flush=True)
        # Chosen on training images, never on test images (Andriushchenko & Flammarion 2020).
        if row["train_pgd10"] > self.best:
            self.best = row["train_pgd10"]
            self._save("best.pt")
        self._begin_epoch()
        self._save_checkpoint()

    def _measure(self, seconds):
        """The monitor's accuracies on test and training images; a signal need not wait for them."""
        self.model.eval()
        accuracies = {}
        try:
            self.interruptible = True
            if self.signal is not None:
                raise Interrupted
            # Eager: the active set's batches change their size, and each would be compiled anew.
            with autocast(self.args), torch.compiler.set_stance("force_eager"):
                for split, images in (("test", self.data.test), ("train", self.data.train)):
                    found = monitor(self.model, *images(self.args.monitor), self.args.eps / 255)
                    accuracies |= {f"{split}_{name}": value for name, value in found.items()}
            self.interruptible = False
        except Interrupted:  # all steps of the epoch are made; a resume measures first
            self.interruptible = False
            self.start = time.perf_counter() - seconds
            self._save_inside_epoch()
        return accuracies

    def finish(self):
        """Write model.pt and say where everything is."""
        self._save("model.pt")
        seconds = sum(row["seconds"] for row in self.rows)
        print(f"trained  {clock(seconds)} for {self.total_steps:,} steps; accuracies above are in per cent")
        for row in self.rows:
            if row["warning"]:
                print(f"warning: first seen in epoch {row['epoch']}: {row['warning']}")
                break
        print(f"wrote    {self.out}/model.pt")
        print(f"next     python eval_attacks.py {self.out} --eps {self.args.eps:g}")

    def _weights(self):
        return {"arguments": self.model.arguments, "state_dict": self.model.state_dict()}

    def _save(self, name):
        write_torch(self.out / name, self._weights())

    def _save_checkpoint(self):
        state = {
            **self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "sums": self.sums,
            "seconds": self.seconds,
            "extra": self.extra,
            "rng": torch.get_rng_state(),
        }
        if self.args.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(self.args.device)
        write_torch(self.out / "checkpoint.pt", state)
        self._write_metrics()
        self.saved = time.monotonic()

    def _write_metrics(self):
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _load_checkpoint(self):
        path = self.out / "checkpoint.pt"
        try:
            state = load_file(path)
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
            self.best = state["best"]
            self.extra, self.sums = (
                {key: value.to(self.args.device) for key, value in state[name].items()} for name in ("extra", "sums")
            )
            self.seconds = float(state["seconds"])
            made = self.step - self.epoch * self.steps_per_epoch
            if not (len(self.rows) == self.epoch <= self.args.epochs and 0 <= made <= self.steps_per_epoch):
                raise ValueError(f"step {self.step} is not in epoch {self.epoch + 1}")
            for row in self.rows:
                float(row["seconds"] + row["monitor_seconds"]), row["warning"]
            torch.set_rng_state(state["rng"])
            if self.args.device.startswith("cuda") and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            fail(f"{path} does not fit this run ({str(error).split(chr(10))[0]})")
        self._write_metrics()
