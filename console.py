"""The terminal and the disk: flag types, one-line errors, progress line, files. No training step depends on it."""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither (default: None) nor (default: False)."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message):
        fail(message)


def number(kind, low, high=1e9):
    """An argparse type: an int or a float (kind) in [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low:g} to {high:g}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's "invalid number value: 'eight'"
    return convert


def names(known):
    """An argparse type: some of the known names, separated by commas, as a list; each once."""

    def convert(text):
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return convert


def given(text):
    """An argparse type: any text but none, as an unset shell variable leaves it ("$WEIGHTS")."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def check_outputs(outputs, inputs=()):
    """End with one line if an output cannot be written or names the same file as another one or as an input.

    outputs: {flag: path or None}; inputs: paths.
    """

    def identity(path):
        found = os.stat(path) if os.path.exists(path) else None
        return (found.st_dev, found.st_ino) if found else os.path.realpath(path)

    taken = {identity(path): f"the input {path}" for path in inputs}
    for flag, path in outputs.items():
        if path is None:
            continue
        if os.path.isdir(path):
            fail(f"argument {flag}: cannot write {path}: it is a folder")
        for name in (path, temporary(path)):
            if other := taken.get(identity(name)):
                fail(f"argument {flag}: {name} is {other}, too: name another file")
        taken |= {identity(path): f"the file of {flag}", identity(temporary(path)): f"a temporary file of {flag}"}
        try:
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise OSError(0, "no permission")
            if not os.path.exists(path) or stat.S_ISREG(os.stat(path).st_mode):
                with written_next_to(path, bytes(2**16)):  # a full disk still makes empty files
                    pass
        except OSError as error:
            fail(f"argument {flag}: cannot write {path}: {error.strerror}")


def temporary(path):
    """The file that is written before it replaces path, or what path links to."""
    return f"{os.path.realpath(path)}.new"


@contextlib.contextmanager
def written_next_to(path, content):
    """The path of a new file with this content in the folder of path, or of what path links to; gone afterwards."""
    new = temporary(path)
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield new
    finally:
        with contextlib.suppress(OSError):  # it has moved; or a read-only folder refuses even this
            os.unlink(new)


def write_file(path, content):
    """Write bytes or text. A file is replaced, so that it is whole at every moment; a symbolic link to it is followed.

    What is no regular file (a pipe, /dev/stdout, /dev/null) is written into.
    """
    content = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    try:
        found = os.stat(path) if os.path.exists(path) else None
        into = path if found and not stat.S_ISREG(found.st_mode) else None
        for descriptor in (2, 1) if found else ():  # stdout, perhaps a file, goes on where this ends
            with contextlib.suppress(OSError):  # closed
                if os.path.samestat(found, os.fstat(descriptor)):
                    into = descriptor
                    sys.stdout.flush()
        if into is not None:
            with open(into, "wb", closefd=into is path) as file:
                file.write(content)
            return
        with written_next_to(path, content) as new:
            if found:
                shutil.copymode(path, new)
            os.replace(new, os.path.realpath(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_torch(path, state):
    buffer = io.BytesIO()  # through memory: on a full disk torch.save fails in C++, not with an OSError
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_json(path):
    """The content of a JSON file, or the list of a .jsonl's lines; ValueError of one line if it is damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if Path(path).suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path} is missing or damaged") from None


# Files that are named where weights are wanted: how they begin (or what torch says), what they are, what to do.
STRANGERS = {
    r".{8}\{": "a safetensors file: convert it by torch.save(safetensors.torch.load_file(FILE), 'weights.pt')",
    r"PK.{28}[^/]*\.npy|\x93NUMPY": "a file of numpy: write tensors by torch.save({'name': tensor}, FILE)",
    r".*TorchScript": "a TorchScript archive: load it in a file of your own, --model FILE:FUNCTION, by torch.jit.load",
    r"version https://git-lfs": "a pointer of Git LFS: fetch the file itself by git lfs pull",
    r"\s*<(!doctype|html)": "a web page: download the file itself",
    r".*?GLOBAL (?P<code>\S+)": "code that is not run: save the weights by themselves, torch.save(state_dict, FILE)",
}


def load_file(path):
    """The dictionary in a file that any version of torch.save wrote, on the CPU; OSError of one line otherwise."""
    if not Path(path).is_file():
        raise OSError(f"no file {path}")
    reason = "is damaged, or was not written by torch.save"
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # which cannot run code
        if isinstance(content, dict):
            return content
        reason = f"holds a {type(content).__name__}, no dictionary: torch.save(model.state_dict(), FILE) writes one"
    except Exception as error:  # pickle, zip and torch each raise their own for a damaged file
        with open(path, "rb") as file:
            texts = file.read(200).decode("latin-1"), str(error)
        for pattern, what in STRANGERS.items():
            for found in filter(None, (re.match(pattern, text, re.S | re.I) for text in texts)):
                reason = f"holds {found['code']}, {what}" if "code" in found.groupdict() else f"is {what}"
    raise OSError(f"{path} {reason}")


def check_archive(path):
    """ValueError if a zip is not as it was written. torch.load notices nothing, and may read uninitialised memory.

    It ignores checksums, and reads nothing of a record that is marked as a folder or that has two sizes.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        odd = [r for r in records if r.external_attr & 16 or not r.compress_type and r.file_size != r.compress_size]
        if odd or archive.testzip() or len({record.filename for record in records}) < len(records):
            raise ValueError("damaged")


def load_arrays(name, data_dir, splits=("train", "test")):
    """({train_x, train_y, test_x, test_y}, class names) of a data set: cifar10, cifar100 or the path of an .npz."""
    names = [f"{split}_{letter}" for split in splits for letter in "xy"]
    if name in ("cifar10", "cifar100"):
        import torchvision.datasets as datasets

        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        try:
            parts = [kind(data_dir, train=split == "train", download=True) for split in splits]
        except Exception as error:  # the network, the disk, the archive: torchvision raises many kinds
            fail(f"cannot get {name} into {data_dir}: say where it is with --data-dir or --dataset FILE.npz: {error}")
        values = [array for part in parts for array in (part.data, np.array(part.targets))]
        return dict(zip(names, values)), parts[0].classes
    try:
        with np.load(name, allow_pickle=False) as file:  # so that it cannot run code
            arrays = {key: np.asarray(file[key]) for key in names}
            classes = [str(c) for c in file["classes"]] if "classes" in file else []
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged file
        fail(f"no data set {name!r}: give cifar10, cifar100 or an .npz with {', '.join(names)}: {error}")
    size = arrays[names[0]].shape[1:3]
    for split in splits:
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        if x.dtype != np.uint8 or x.shape[1:] != (*size, 3) or 0 in x.shape:
            fail(f"{name}: {split}_x is {x.dtype} {x.shape}, it must be uint8 (N, H, W, 3), the same H, W everywhere")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            fail(f"{name}: {split}_y is {y.dtype} {y.shape}, it must be whole numbers ({len(x)},)")
        count = max(min(int(arrays[names[1]].max()) + 1, 1000), 2)
        if y.min() < 0 or y.max() >= count:
            fail(f"{name}: {split}_y has labels {y.min()} to {y.max()}, it must have 0 to {count - 1} at most")
    return arrays, classes if len(classes) == count else [f"class {i}" for i in range(count)]


def checksum(arrays):
    """CRC-32 of the images and labels of a data set, {name: array}: the same whatever its file is called."""
    found = 0
    for array in arrays.values():
        found = zlib.crc32(np.ascontiguousarray(array.astype(np.uint8, copy=False)), found)
    return found


def commit():
    """The commit of this code, with -dirty where a tracked file was changed; None if the code has no repository."""
    folder = Path(__file__).resolve().parent
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}"]  # not that of a folder above
    git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def hardware(device):
    """The name of a GPU, or of the CPU with its number of threads."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = re.search(r"model name\s*: (.*)", CPUINFO)
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def versions(device):
    """What a number depends on besides its flags."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "device": str(device),
        "hardware": hardware(device),
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
    }


def clock(seconds):
    """1:02:03, or 9 days, 1:02:03."""
    return str(datetime.timedelta(seconds=int(seconds)))


class StatusLine:
    """A line on stderr that redraws itself on a terminal; in a file, a plain line every 20 seconds."""

    def __init__(self):
        self.terminal, self.last = sys.stderr.isatty(), time.monotonic()

    def due(self):
        """Is it time to show something? Ask before the numbers are fetched: that makes the host wait for a GPU."""
        return time.monotonic() - self.last >= (0.5 if self.terminal else 20)

    def show(self, text):
        if self.due():
            self.last = time.monotonic()
            line = f"\r\033[K\033[?7l{text}\033[?7h" if self.terminal else f"{text}\n"  # ?7l: cut, not wrapped
            print(line, end="", file=sys.stderr, flush=True)

    def clear(self):
        print("\r\033[K" if self.terminal else "", end="", file=sys.stderr, flush=True)


def note(message, kind="note"):
    """Something to know, in one line on stderr."""
    line = str(message).strip().split("\n")[0]
    print("\r\033[K" if sys.stderr.isatty() else "", f"{kind}: {line}", sep="", file=sys.stderr)  # over a status line


def fail(message, code=2):
    """End the program with one line on stderr. code: 2 if the user can fix it, 1 if a run failed."""
    sys.stdout.flush()
    note(message, f"{Path(sys.argv[0]).name}: error")
    sys.exit(code)


def launch(main):
    """Run main(); what a user can cause ends in one line, not in a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):  # a letter that the console lacks ends nothing
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python would try to write the rest as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail("nothing reads this output any more (a training run: --resume continues it)")
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except RuntimeError as error:
        if not re.search("out of memory|not enough memory|allocate memory", str(error)):
            raise
        fail("out of memory: give a smaller --batch-size (a training run: or --width or --depth)", 1)
    except KeyboardInterrupt:
        fail("interrupted (a training run: --resume continues it)", 130)
