"""What every train_*.py shares and its reader may want to look up: flags, device, data, learning rate; then files."""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither (default: None) nor (default: False)."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message):
        fail(message)


def number(kind, low, high=math.inf, below=math.inf):
    """An argparse type: an int or a float (kind) in [low, high] that is less than `below`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not (low <= value <= high and value < below):
            top = f" and less than {below:g}" if below < math.inf else f" and at most {high:g}"
            top = "" if math.isinf(min(high, below)) else top
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low:g}{top}")
        return value

    return parse


def make_parser(doc):
    """A parser with the flags that every training script shares; doc is the script's docstring."""
    doc, note = doc.split("\n\n")[0], "eps and step sizes are in units of 1/255."
    parser = Parser(description=doc, epilog=note, formatter_class=Help)
    add = parser.add_argument
    add("--eps", type=number(float, 0, 255), default=8.0, help="l-infinity radius, in 1/255")
    add("--epochs", type=number(int, 1), default=30, help="passes over the training data")
    add("--batch-size", type=number(int, 2), default=128, help="the last partial batch is dropped")
    add("--lr-max", type=number(float, 0), default=0.2, help="peak of the cyclic learning rate")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
    cycle = "momentum falls to 0.8 where the learning rate peaks; off: always 0.9"
    add("--momentum-cycle", action=argparse.BooleanOptionalAction, default=True, help=cycle)
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
    add("--deterministic", action="store_true", help="repeatable on CUDA too, as a CPU always is; slower kernels")
    add("--monitor", type=number(int, 1), default=1000, metavar="N", help="images for the accuracies after an epoch")
    add("--out", metavar="DIR", help="run folder (default: runs/METHOD_DATASET_epsEPS_seedSEED)")
    add("--resume", action="store_true", help="continue from DIR/checkpoint.pt")
    add("--overwrite", action="store_true", help="replace the run in DIR")
    return parser


def parse(parser):
    """The checked arguments, with device and precision settled and out filled in."""
    args = parser.parse_args()
    args.not_default = sorted(name for name, value in vars(args).items() if value != parser.get_default(name))
    if (args.depth - 4) % 6:
        parser.error(f"argument --depth: {args.depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it: give one of them")
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


def by_eps(args, name, table):
    """Settle a flag that was not given: the value in table {eps: value} at the eps nearest to --eps; says which."""
    if getattr(args, name) is None:
        nearest = min(table, key=lambda eps: abs(eps - args.eps))
        setattr(args, name, table[nearest])
        print(f"note: --{name.replace('_', '-')} {table[nearest]:g}, the value for eps {nearest}", file=sys.stderr)


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

    def batches(self, epoch, batch_size, seed):
        """Yield (x, y) of one epoch: shuffled, cropped after zero padding by 4, flipped.

        x: (B, 3, H, W) float32 in [0, 1], channels_last. What epoch e of seed s shows depends on (s, e) alone:
        neither on the method nor on the device nor on earlier random numbers.
        """
        n = len(self.train_x)
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = torch.from_numpy(random.permutation(n)).to(self.device)
        top, left = torch.from_numpy(random.integers(0, 9, (2, n))).to(self.device)
        flip = torch.from_numpy(random.random(n) < 0.5).to(self.device)
        for part in torch.arange(n - n % batch_size, device=self.device).split(batch_size):
            x = crop_and_flip(self.train_x, order[part], top[part], left[part], flip[part])
            yield to_float(x), self.train_y[order[part]]

    def train(self, n=None):
        """The first n training images, not augmented: (N, 3, H, W) float32 in [0, 1], and their classes (N,)."""
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


NAMES = ("train_x", "train_y", "test_x", "test_y")


def load_arrays(name, data_dir, splits=("train", "test")):
    """({train_x, train_y, test_x, test_y}, class names) of a data set: cifar10, cifar100 or the path of an .npz.

    splits: what an .npz must hold; ("test",) is enough for an evaluation.
    """
    if name in ("cifar10", "cifar100"):
        import torchvision.datasets as datasets

        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        try:
            train, test = (kind(data_dir, train=train, download=True) for train in (True, False))
        except Exception as error:  # the network, the disk, the archive: torchvision raises many kinds
            reason = f"cannot get {name} into {data_dir} ({first_line(error)})"
            fail(f"{reason}: name the folder that holds it with --data-dir, or a file with --dataset FILE.npz")
        values = (train.data, np.array(train.targets), test.data, np.array(test.targets))
        return dict(zip(NAMES, values)), train.classes
    path = Path(name)
    if not path.is_file():
        fail(f"no data set {name!r}: give cifar10, cifar100 or the path of an .npz")
    try:
        with np.load(path, allow_pickle=False) as file:  # so that it cannot run code
            arrays = {key: np.asarray(file[key]) for key in NAMES if key.split("_")[0] in splits}
            classes = [str(c) for c in file["classes"]] if "classes" in file else []
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged file
        fail(f"{path} is not a data set, which needs {', '.join(NAMES)} ({first_line(error)})")
    for split in splits:
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            fail(f"{path}: {split}_x is {x.dtype} {x.shape}, it must be uint8 (N, H, W, 3)")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            fail(f"{path}: {split}_y is {y.dtype} {y.shape}, it must be whole numbers ({len(x)},)")
    if len({arrays[f"{split}_x"].shape[1:] for split in splits}) > 1:
        fail(f"{path}: train_x and test_x hold images of different sizes")
    count = max(min(int(arrays[f"{splits[0]}_y"].max()) + 1, 1000), 2)
    for split in splits:
        y = arrays[f"{split}_y"]
        if y.min() < 0 or y.max() >= count:
            fail(f"{path}: {split}_y has labels {y.min()} to {y.max()}, it must have 0 to {count - 1} at most")
    return arrays, classes if len(classes) == count else [f"class {i}" for i in range(count)]


def load_data(args):
    """The data set of a training run on its device."""
    arrays, classes = load_arrays(args.dataset, args.data_dir)
    data = Data(args.dataset, classes, arrays, args.device, args.limit_train)
    if len(data.train_x) < args.batch_size:
        fail(f"{len(data.train_x)} training images do not fill one batch of {args.batch_size}: lower --batch-size")
    return data


def load_test_data(args, num_classes):
    """The data set that eval_attacks.py's flags name: by default the one that the run was trained on."""
    args.dataset = args.dataset or training_of(args.run).get("dataset")
    if args.dataset is None:
        fail(f"no config.json beside {args.run} names a data set: give --dataset")
    arrays, classes = load_arrays(args.dataset, args.data_dir)
    if arrays["test_y"].max() >= num_classes:
        fail(f"{args.dataset} has {len(classes)} classes and the network {num_classes}")
    return Data(args.dataset, classes, {k: arrays[k] for k in ("test_x", "test_y")}, args.device)


def training_of(run):
    """What a run folder, or that of a file in it, says of the training: config, seconds, last epoch; {} if nothing."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        metrics = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return {**config, "seconds": sum(row["seconds"] for row in rows), "last_epoch": rows[-1] if rows else None}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
    """One line that redraws itself on a terminal; in a file, a plain line every 20 seconds."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.last = time.monotonic()

    def due(self):
        """Is it time to show something? Ask before the numbers are fetched: that makes the host wait for a GPU."""
        return time.monotonic() - self.last >= (0.5 if self.terminal else 20)

    def show(self, text):
        if self.due():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)
            self.last = time.monotonic()

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)


# ---------------------------------------------------------------- files and errors


def write_file(path, content):
    """Write bytes to a new file beside path, then move it there: path is whole at every moment."""
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
        with contextlib.suppress(OSError):  # a read-only folder refuses even this
            new.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, text.encode())


def write_torch(path, state):
    # Through memory: on a full disk torch.save fails in C++, not with an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def fail(message, code=2):
    """End the program with one line on stderr. code: 2 if the user can fix it, 1 if a run failed."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def launch(main):
    """Run main(); what a user can cause ends in one line, not in a traceback."""
    try:
        main()
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except torch.OutOfMemoryError:
        fail("out of device memory: give a smaller --batch-size, --width or --depth", 1)
    except KeyboardInterrupt:
        fail("interrupted: --resume (training) or --state (evaluation) continues", 130)


def first_line(error):
    """Of an exception's message, or its name if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
