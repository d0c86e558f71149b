"""All that touches training besides the script and the network: flags, device, precision, data, learning rate."""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from console import CPUINFO, Help, Parser, checksum, fail, given, load_arrays, note, number


def make_parser(doc):
    """A parser with the flags that every training script shares; doc is the script's docstring."""
    units = "eps is in units of 1/255; steps, radii and noise are multiples of eps."
    parser = Parser(description=doc.split("\n\n")[0], epilog=units, formatter_class=Help)
    add = parser.add_argument
    add("--eps", type=number(float, 0, 255), default=8.0, help="l-infinity radius, in 1/255")
    add("--epochs", type=number(int, 1), default=30, help="passes over the training data")
    add("--batch-size", type=number(int, 2), default=128, help="the last partial batch is dropped")
    add("--lr-max", type=number(float, 0), default=0.2, help="peak of the cyclic learning rate")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
    add("--momentum-cycle", action=argparse.BooleanOptionalAction, default=True, help="0.9, 0.8 at the peak, 0.9")
    add("--dataset", type=given, default="cifar10", help="cifar10, cifar100 or the path of an .npz")
    add("--data-dir", type=given, default="data", help="where cifar10 and cifar100 are, or are downloaded to")
    add("--limit-train", type=number(int, 1), metavar="N", help="train on the first N training images")
    add("--depth", type=int, choices=range(10, 101, 6), metavar="N", default=28, help="of the WideResNet: 6n + 4")
    add("--width", type=number(int, 1), default=10, help="of the WideResNet")
    add("--dropout", type=number(float, 0, 0.99), default=0.3, help="in every block")
    add("--seed", type=number(int, 0, 2**31), default=0, help="fixes everything; on CUDA, with --deterministic")
    add("--device", type=given, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    add("--deterministic", action="store_true", help="repeatable on CUDA too, as a CPU always is; slower kernels")
    add("--monitor", type=number(int, 1), default=1000, metavar="N", help="images for the accuracies after an epoch")
    add("--out", type=given, metavar="DIR", help="run folder (default: runs/METHOD_DATASET_epsEPS_seedSEED)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="continue the run in DIR, or begin it if there is none")
    either("--overwrite", action="store_true", help="replace the run in DIR")
    return parser


def parse(parser):
    """The checked arguments, with device and precision settled and out filled in."""
    args, defaults = parser.parse_args(), vars(parser.parse_args([]))
    args.not_default = sorted(name for name, value in vars(args).items() if value != defaults[name])
    args.method = Path(sys.argv[0]).stem.removeprefix("train_")
    args.out = args.out or f"runs/{args.method}_{Path(args.dataset).stem}_eps{args.eps:g}_seed{args.seed}"
    if 0 < args.eps < 1:
        note(f"--eps {args.eps:g} is in units of 1/255")
    set_up(args)
    return args


def set_up(args):
    """Device and precision: all that is switched in torch for a training run, but for autocast around its passes."""
    args.device = str(find_device(args.device))
    cuda, bf16 = args.device.startswith("cuda"), has_bf16(args.device)
    if cuda and args.precision == "bf16" and not bf16:
        fail(f"argument --precision: cuDNN has no bfloat16 for {torch.cuda.get_device_name(args.device)}: give fp32")
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp32"
    torch.backends.cudnn.benchmark = not args.deterministic  # take the fastest kernel: the shapes stay the same
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory


def find_device(name):
    """torch.device of a --device flag, tried out; if a GPU does not work, auto says torch's reason and takes a CPU.

    From here on float32 means float32: no TF32 in convolutions.
    """
    found = name
    if name == "auto":
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: note(message)  # such as a driver that is too old
            found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        if name != "auto":
            fail(f"argument --device: no device {name!r} here that works: {error}")
        note(f"the CPU is used, for {found!r} does not work: {error}")
        found = "cpu"
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(found)


def layout(device):
    """channels_last, but contiguous on MPS, whose BatchNorm gradients it has made wrong (pytorch/pytorch#175189)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def has_bf16(device):
    """Does this device's hardware compute in bfloat16?"""
    cpu = device == "cpu" and bool(re.search("avx512_bf16|amx_bf16", CPUINFO))
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.startswith("cuda") else cpu


def autocast(args):
    """Run passes in bfloat16 if --precision says so. It has the exponents of float32, so no loss must be scaled."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


class Data:
    """A data set that lives on the device as uint8: train_x padded by 4 zero pixels, test_x as it is."""

    def __init__(self, name, data_dir, device, splits=("train", "test"), limit_train=None):
        arrays, self.classes = load_arrays(name, data_dir, splits)
        if "train_x" in arrays:
            x, y = arrays["train_x"], arrays["train_y"]
            # The network's normalisation: of all training images, whatever --limit-train.
            channels = (torch.from_numpy(x[..., c]).flatten() for c in range(3))
            histograms = [torch.bincount(values, minlength=256).numpy() / len(values) for values in channels]
            value = np.arange(256) / 255
            self.mean = [float(h @ value) for h in histograms]
            self.std = [float(max(np.sqrt(h @ (value - m) ** 2), 1e-3)) for h, m in zip(histograms, self.mean)]
            self.train_x = torch.nn.functional.pad(torch.from_numpy(x[:limit_train]), (0, 0, 4, 4, 4, 4)).to(device)
            self.train_y = torch.from_numpy(y[:limit_train].astype(np.int64)).to(device)
        self.test_x = torch.from_numpy(arrays["test_x"]).to(device)
        self.test_y = torch.from_numpy(arrays["test_y"].astype(np.int64)).to(device)
        self.crc32, self.labels = checksum(arrays), {split: arrays[f"{split}_y"] for split in splits}  # as in the file
        self.name, self.device = name, device

    def steps(self, batch_size):
        """The batches of an epoch."""
        return len(self.train_x) // batch_size

    def batches(self, epoch, batch_size, seed):
        """Yield (x, y) of one epoch: shuffled, cropped after zero padding by 4, flipped; x (B, 3, H, W) in [0, 1].

        What epoch e of seed s shows depends only on (s, e), on no method, device or earlier random number.
        """
        n, random = len(self.train_x), np.random.Generator(np.random.PCG64([seed, epoch]))
        order = torch.from_numpy(random.permutation(n)).to(self.device)
        top, left = torch.from_numpy(random.integers(0, 9, (2, n))).to(self.device)
        mirrored = torch.from_numpy(random.random(n) < 0.5).to(self.device)
        for part in torch.arange(n - n % batch_size, device=self.device).split(batch_size):
            x = crop(self.train_x[order[part]], top[part], left[part])
            x = flip(x, mirrored[part])
            yield to_float(x), self.train_y[order[part]]

    def train(self, n=None):
        """The first n training images, not augmented: (N, 3, H, W) float32 in [0, 1], and their classes (N,)."""
        return to_float(self.train_x[:n, 4:-4, 4:-4]), self.train_y[:n]

    def test(self, n=None):
        return to_float(self.test_x[:n]), self.test_y[:n]


def crop(padded, top, left):
    """Images (B, H, W, C) out of images padded by 4 on each side; top, left: (B,), where each begins."""
    _, height, width, _ = padded[:, 4:-4, 4:-4].shape
    image = torch.arange(len(padded), device=padded.device)
    rows = top[:, None] + torch.arange(height, device=padded.device)  # (B, H)
    columns = left[:, None] + torch.arange(width, device=padded.device)  # (B, W)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(images, mirrored):
    """Images (B, H, W, C), mirrored horizontally where mirrored (B,) is True."""
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def to_float(images):
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], in the memory format of the device."""
    return images.permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=layout(images.device))


def load_data(args):
    """The data set of a training run on its device."""
    data = Data(args.dataset, args.data_dir, args.device, limit_train=args.limit_train)
    if len(data.train_x) < args.batch_size:
        fail(f"{len(data.train_x)} training images do not fill one batch of {args.batch_size}: lower --batch-size")
    if sentence := missing_classes(data.labels["train"], args.limit_train, "training"):
        note(f"--limit-train {args.limit_train}: {sentence}")
    if sentence := missing_classes(data.labels["train"][: args.limit_train], args.monitor, "training"):
        note(f"--monitor {args.monitor}: {sentence}, and best.pt is chosen on these")
    elif sentence := missing_classes(data.labels["test"], args.monitor, "test"):
        note(f"--monitor {args.monitor}: {sentence}")
    return data


def missing_classes(y, n, images):
    """A sentence if the first n of the labels y lack classes that y has, as in data sorted by class; else None."""
    shown, known = (len(np.unique(labels)) for labels in (y[:n], y))
    return f"the first {n} {images} images show {shown} of {known} classes" if shown < known else None


def cyclic(progress, lr_max, momentum_cycle=True):
    """(learning rate, momentum) when a share `progress` of all steps is done, as torch's CyclicLR has them.

    0 to lr_max over the first 40 %, to 0 over the rest; momentum 0.9, 0.8, 0.9 against it.
    """
    height = progress / 0.4 if progress < 0.4 else (1 - progress) / 0.6
    return lr_max * height, 0.9 - 0.1 * height if momentum_cycle else 0.9
