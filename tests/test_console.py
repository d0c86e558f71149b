"""What is written and read: links, pipes, full disks, damaged and foreign files; consoles that lack letters."""

import io
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import console
import paper.slat_hidden
import train_fgsm
from conftest import ROOT, TINY, parsed

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes of POSIX")


def written(path, content):
    """What a thread reads from a pipe while console.write_file writes into it."""
    found = []
    reader = threading.Thread(target=lambda: found.append(Path(path).read_bytes()))
    reader.start()
    console.write_file(path, content)
    reader.join(10)
    return found[0]


@posix
def test_a_link_is_followed_and_a_pipe_written_into(tmp_path):
    target, link, loose, pipe = (tmp_path / name for name in ("a/target", "link", "loose", "pipe"))
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("a/target")
    loose.symlink_to("a/new")
    for path, end in ((link, target), (loose, tmp_path / "a/new")):
        console.write_file(path, "content")
        assert path.is_symlink() and end.read_text() == "content" and not end.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640  # as its owner has set it
    os.mkfifo(pipe)
    assert written(pipe, b"content") == b"content" and stat.S_ISFIFO(pipe.stat().st_mode)
    read, write = os.pipe()
    console.write_file(f"/dev/fd/{write}", "content")  # as `>(cat)` names it
    os.close(write)
    assert os.read(read, 100) == b"content"
    os.close(read)
    assert not list(tmp_path.rglob("*.new"))


WRITES = """
import sys, console
for i, name in enumerate(sys.argv[1:]):
    print(i)
    console.write_file(name, "content\\n")
print("last")
"""


@posix
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_stdout_goes_on_where_a_file_that_is_stdout_ends(tmp_path, to):
    """By name, and where stdout is a file that is named by itself."""
    out = tmp_path / "out"
    names = ["/dev/fd/1"] + [str(out)] * (to == "file")
    with open(out, "wb") as file:
        command = [sys.executable, "-c", WRITES, *names]
        done = subprocess.run(command, stdout=file if to == "file" else subprocess.PIPE, cwd=ROOT, check=True)
    expected = b"0\ncontent\nlast\n" if to == "pipe" else b"0\ncontent\n1\ncontent\nlast\n"
    assert (out.read_bytes() if to == "file" else done.stdout) == expected


def test_what_cannot_be_written_is_one_line_before_the_work(tmp_path, capsys, monkeypatch):
    def refused(outputs, message, inputs=()):
        with pytest.raises(SystemExit):
            console.check_outputs(outputs, inputs)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err, err
        assert not list(tmp_path.rglob("*.new"))

    a, b = tmp_path / "a", tmp_path / "b"
    console.check_outputs({"--json": str(a), "--state": None, "--save-adv": str(b)}, [tmp_path / "c"])
    assert not a.exists() and not b.exists()
    a.write_text("mine")
    console.check_outputs({"--json": str(a)})
    assert a.read_text() == "mine"
    refused({"--json": str(tmp_path)}, "--json: cannot write", [tmp_path])
    refused({"--json": str(tmp_path / "no/such")}, "No such file")
    refused({"--json": str(a), "--state": str(a)}, f"--state: {a} is the file of --json, too")
    refused({"--json": str(b), "--state": f"{tmp_path}/./b"}, "is the file of --json, too")
    refused({"--json": str(b), "--state": f"{b}.new"}, "is a temporary file of --json, too")
    refused({"--json": str(b)}, f"{b}.new is the input {b}.new, too", [f"{b}.new"])
    refused({"--json": str(a)}, f"is the input {a}, too", [a])
    if os.name == "posix":
        (tmp_path / "soft").symlink_to(a)
        (tmp_path / "hard").hardlink_to(a)
        for name in ("soft", "hard"):
            refused({"--json": str(tmp_path / name)}, f"is the input {a}, too", [a])
        refused({"--json": str(tmp_path / "soft")}, f"is the input {a}.new, too", [f"{a}.new"])
        refused({"--json": "/proc/no-such-file"}, "cannot write /proc/no-such-file")
        with monkeypatch.context() as patch:  # root may write everywhere
            patch.setattr(os, "access", lambda path, mode: False)
            refused({"--json": str(a)}, "no permission")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused({"--json": str(b)}, "No space left on device")


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize("flag", ["--out", "--dataset", "--data-dir", "--device"])
def test_empty_values_are_one_line(refused, flag):
    refused(train_fgsm, f"{flag}=", f"argument {flag}: the value is empty")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_letter_that_the_console_lacks_ends_nothing(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, "strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit, match="2"):
        console.launch(lambda: (print("± ≤"), console.note("≤"), console.fail("≤")))
    out, err = (stream.flush() or stream.buffer.getvalue() for stream in streams.values())
    assert out.endswith(b" \\u2264\n") and err.count(b"\\u2264\n") == err.count(b"\n") == 2


@posix
def test_closed_streams_end_nothing(tmp_path):
    code = f"import console\nconsole.launch(lambda: (print(1), console.write_file({str(tmp_path / 'a')!r}, 'whole')))"
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "a").read_text() == "whole"


def test_the_command_of_a_module_can_be_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/paper/slat_hidden.py", "--eps", "8"])
    for spec, program in ((None, "slat_hidden.py"), (paper.slat_hidden.__spec__, "-m paper.slat_hidden")):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        assert console.versions("cpu")["command"] == f"python {program} --eps 8"


# ---------------------------------------------------------------- files that are read


def test_no_flipped_bit_of_a_file_of_weights_changes_them(tmp_path):
    """Every 13th bit; some mean nothing. torch reads what is marked as a folder as whatever is in memory."""
    path, weights = tmp_path / "w.pt", {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.double)}
    torch.save(weights, path)
    content, refused = path.read_bytes(), 0
    for i in range(0, 8 * len(content), 13):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            found = console.load_file(path)
            assert all(torch.equal(found[key], value) for key, value in weights.items()), i
        except OSError:
            refused += 1
    assert refused > 0.07 * len(content)


def test_records_that_only_look_whole_are_refused(tmp_path):
    path, weights = tmp_path / "w.pt", {"a": torch.arange(1000.0), "b": torch.ones(3)}
    torch.save(weights, path)
    with zipfile.ZipFile(path) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}

    def archive(change):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in records.items():
                record = zipfile.ZipInfo(name)
                content = change(record, content)
                file.writestr(record, content)
                change(record, content)  # the directory is written at the end

    archive(lambda record, content: content)
    assert torch.equal(console.load_file(path)["a"], weights["a"])

    def folder(record, content):
        record.external_attr |= 16 * record.filename.endswith("data/0")
        return content

    for change in (folder, lambda record, content: content[:8] if record.filename.endswith("data/0") else content):
        archive(change)
        with pytest.raises(OSError, match="w.pt is damaged"):
            console.load_file(path)


def numpys(path):
    np.savez(path.with_suffix(".npz"), a=np.ones(3))
    path.with_suffix(".npz").rename(path)


STRANGERS = {
    "a safetensors file: convert it": lambda path: path.write_bytes(struct.pack("<Q", 20) + b'{"__metadata__":{}}  '),
    "a TorchScript archive: load it": lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path)),
    "a file of numpy: write tensors": numpys,
    "holds a list, no dictionary: torch.save": lambda path: torch.save([torch.ones(2)], path),
    "a pointer of Git LFS: fetch": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid 1\n"),
    "a web page: download": lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"),
    "is damaged, or was not written by torch.save": lambda path: path.write_bytes(b"\x80\x02hello"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", STRANGERS)
def test_strangers_files_are_named_as_what_they_are(tmp_path, message):
    path = tmp_path / "w.pt"
    STRANGERS[message](path)
    with pytest.raises(OSError, match=re.escape(message)) as error:
        console.load_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[" * 200_000, b"\xff"])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="^.*a.json is missing or damaged$"):
        console.load_json(path)


def test_reading_data_takes_no_more_than_two_and_a_half_times_its_size(tmp_path):
    """Peak of the process, in a process of its own: 5 times, when bincount made 64 bits of every pixel."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(20_000) % 10).astype(np.uint8)
    arrays = {"train_x": images, "train_y": labels, "test_x": images[:4000], "test_y": labels[:4000]}
    np.savez(tmp_path / "data.npz", **arrays)
    code = "import sys, torch, common, resource\n"
    code += "def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "before = peak()\ncommon.Data(sys.argv[1], None, 'cpu')\nprint(peak() - before)"
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "data.npz"], cwd=ROOT, capture_output=True, check=True
    )
    assert int(done.stdout) < 2.5 * (images.nbytes * 1.2)


def test_data_sorted_by_class_is_said(tmp_path, capsys):
    with np.load(TINY) as file:
        arrays = dict(file)
    for split in ("train", "test"):
        order = np.argsort(arrays[f"{split}_y"], kind="stable")
        arrays |= {f"{split}_{letter}": arrays[f"{split}_{letter}"][order] for letter in "xy"}
    np.savez(tmp_path / "sorted.npz", **arrays)
    flags = f"--dataset {tmp_path}/sorted.npz --depth 10 --width 1 --epochs 1 --device cpu --out {tmp_path}/run"
    for more, message in (
        ("--monitor 100 --limit-train 300", "note: --limit-train 300: the first 300 training images show 2 of 10"),
        ("--monitor 300", "note: --monitor 300: the first 300 training images show 2 of 10 classes, and best.pt"),
    ):  # fmt: skip
        common.load_data(parsed(train_fgsm, f"{flags} {more}"))
        assert capsys.readouterr().err.count(message) == 1
    common.load_data(parsed(train_fgsm, flags))  # 1000 of 2000
    assert "show 5 of 10 classes, and best.pt" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("git"), reason="asks git")
def test_the_commit_of_the_code_is_recorded(tmp_path, monkeypatch):
    """That of the folder's own repository, with -dirty after a change; none within a stranger's repository."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    code = tmp_path / "code"
    code.mkdir()
    (tmp_path / "console.py").write_text("")
    for words in (["init", "-q"], ["add", "console.py"], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(console, "__file__", str(tmp_path / "console.py"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert console.versions("cpu")["commit"] == head and len(head) == 40
    (tmp_path / "console.py").write_text("changed")
    assert console.commit() == f"{head}-dirty"
    monkeypatch.setattr(console, "__file__", str(code / "console.py"))
    assert console.commit() is None
    monkeypatch.setenv("PATH", "")
    assert console.commit() is None
