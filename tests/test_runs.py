"""What a run does besides training: files, resumption, and what each mistake and each damaged or hostile file says."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision

import bookkeeping
import common
import console
import train_fgsm
import train_slat
from conftest import SCRIPTS, SMALL, assert_same, assert_same_run, parsed, rows, run_main
from console import load_file
from eval_attacks import load_model
from wrn import WideResNet

FINISHED = f"{SMALL} --epochs 3 --limit-train 64"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of three epochs, two steps each. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_main(train_fgsm, f"{FINISHED} --out {folder}") == 0
    return folder


def test_deterministic_algorithms_are_asked_for(cli, tmp_path, monkeypatch):
    backend, memory = torch.backends.cudnn, torch.utils.deterministic
    monkeypatch.setattr(memory, "fill_uninitialized_memory", True)
    assert cli(train_slat, f"{SMALL} --epochs 1 --out {tmp_path / 'b'}")[0] == 0
    assert backend.benchmark and not torch.are_deterministic_algorithms_enabled()
    try:
        assert cli(train_slat, f"{SMALL} --epochs 1 --deterministic --out {tmp_path / 'a'}")[0] == 0
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not backend.benchmark and not memory.fill_uninitialized_memory  # which would double the launches
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(load_file(tmp_path / "a/model.pt"), load_file(tmp_path / "b/model.pt"))


KILL = KeyboardInterrupt()


@pytest.mark.parametrize(
    ("place", "call", "fault", "code", "message", "saved"),  # saved: the epochs that are in the checkpoint then
    [("log", 1, KILL, 130, "interrupted (a training run: --resume", 0),
     ("log", 4, RuntimeError("can't allocate memory"), 1, "give a smaller --batch-size", 1),
     ("monitor", 3, KILL, 130, "interrupted", 2), ("checkpoint.pt", 2, KILL, 130, "interrupted", 1),
     ("checkpoint.pt", 2, OSError(28, "No space left"), 2, "No space left: {run}/checkpoint.pt\n", 1),
     ("metrics.jsonl", 2, KILL, 130, "interrupted", 2)],
)  # fmt: skip
def test_a_fault_loses_the_epoch_in_hand(
    cli, refused, finished, tmp_path, monkeypatch, place, call, fault, code, message, saved
):
    """In the given call of Run.log or monitor, or before that file is put in place that many times."""
    run = tmp_path / "run"
    flags, calls = f"{FINISHED} --out {run}", []
    owner, name = {"log": (bookkeeping.Run, "log"), "monitor": (bookkeeping, "monitor")}.get(place, (os, "replace"))
    plain = getattr(owner, name)

    def fail(*args, **kwargs):
        calls.append(name != "replace" or Path(args[1]).name == place)
        if calls[-1] and sum(calls) == call:
            raise fault
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        refused(train_fgsm, flags, message.format(run=run), code=code)
    assert not list(run.glob("*.new"))
    (run / "checkpoint.pt.new").write_bytes(b"half")  # as SIGKILL leaves it
    assert saved == (len(load_file(run / "checkpoint.pt")["rows"]) if (run / "checkpoint.pt").exists() else 0)
    assert cli(train_fgsm, f"{flags} --resume")[0] == 0
    assert_same_run(finished, run)
    assert not list(run.glob("*.new"))


def test_the_accuracies_need_no_more_memory_than_training(cli, tmp_path, monkeypatch):
    """No batch is larger than --batch-size; and the epoch has been saved before. Nothing is in TF32."""
    forward, sizes = WideResNet.forward, set()

    def watched(model, x, *args, **kwargs):
        assert not torch.backends.cudnn.allow_tf32
        if not model.training:
            assert "test_clean" not in load_file(tmp_path / "run/checkpoint.pt")["rows"][-1]
            sizes.add(len(x))
        return forward(model, x, *args, **kwargs)

    monkeypatch.setattr(WideResNet, "forward", watched)
    assert cli(train_fgsm, f"{SMALL} --epochs 1 --monitor 80 --out {tmp_path / 'run'}")[0] == 0
    assert max(sizes) == 32


def test_a_folder_is_for_one_process_at_a_time(cli, refused, finished, tmp_path):
    fcntl, run = pytest.importorskip("fcntl"), shutil.copytree(finished, tmp_path / "run")
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    before = {path: path.read_bytes() for path in run.iterdir()}
    flags = f"{FINISHED} --out {run}"
    for more in ("", "--resume", "--overwrite"):
        refused(train_fgsm, f"{flags} {more}", "another process is training in")
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    os.close(other)
    assert cli(train_fgsm, f"{flags} --resume")[0] == 0


def test_a_warning_names_the_epoch_and_the_best_one_is_chosen_on_training_images(cli, tmp_path, monkeypatch):
    """On training images the first is the best, on test images the second."""
    data, keys = common.load_data(parsed(train_fgsm, SMALL)), ("clean", "fgsm", "pgd10", "alignment")
    seen = {"test": iter([(80, 60, 1, 0.1), (50, 30, 28, 0.2)]), "train": iter([(80, 60, 40, 0.3), (80, 60, 2, 0.4)])}

    def monitor(_, x, y, eps, batch_size):
        assert eps == 8 / 255 and torch.is_autocast_enabled("cpu")
        (split,) = (name for name in seen if torch.equal(x, getattr(data, name)(16)[0]))
        return dict(zip(keys, next(seen[split])))

    monkeypatch.setattr(bookkeeping, "monitor", monitor)
    code, out, _ = cli(train_fgsm, f"{SMALL} --epochs 2 --precision bf16 --out {tmp_path}")
    assert code == 0 and "\nwarning: epoch 1: catastrophic overfitting: FGSM 60.0 %, PGD-10 1.0 %\n" in out
    assert "warning: epoch 2" not in out
    assert [row["alignment"] for row in rows(tmp_path)] == [0.1, 0.2]
    best, last = (load_file(tmp_path / name)["state_dict"]["fc.weight"] for name in ("best.pt", "model.pt"))
    assert not torch.equal(best, last)


@pytest.mark.parametrize(("name", "value"), [("weights", "inf"), ("loss", "nan")])
def test_an_epoch_with_weights_or_losses_that_are_not_finite_is_not_saved(refused, tmp_path, monkeypatch, name, value):
    """Weights may explode in an epoch's last step, after its last loss; a loss may be bad and the weights not yet."""
    plain, made = bookkeeping.Run.log, []

    def log(self, loss, logits, y):
        made.append(1)
        if len(made) == 8 and name == "weights":  # of four steps an epoch
            next(self.model.parameters()).data[0] = float(value)
        plain(self, loss * float(value) if len(made) == 8 and name == "loss" else loss, logits, y)

    monkeypatch.setattr(bookkeeping.Run, "log", log)
    refused(train_fgsm, f"{SMALL} --epochs 3 --out {tmp_path}", "not finite in epoch 2", "--lr-max", code=1)
    for file in ("best.pt", "checkpoint.pt"):
        assert all(w.isfinite().all() for w in load_file(tmp_path / file)["state_dict"].values())
    assert len(load_file(tmp_path / "checkpoint.pt")["rows"]) == 1


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [("fgsm", "--eps 256", "256 is out of range"), ("fgsm", "--eps eight", "invalid number value: 'eight'"),
     ("fgsm", "--epochs 1.5", "invalid whole number value: '1.5'"), ("fgsm", "--batch-size 5000", "lower --batch-size"),
     ("fgsm", "--lr-max inf", "--lr-max"), ("fgsm", "--dropout 1", "out of range: 0 to 0.99"),
     ("fgsm", "--depth 12", "choose from 10, 16, 22"), ("fgsm", "--device cuda:77", "no device 'cuda:77'"),
     ("fgsm", "--precision fp16", "--precision"), ("fgsm", "--dataset imagenet", "no data set 'imagenet'"),
     ("fgsm", "--resume --overwrite", "--overwrite"), ("slat", "--layers 0,conv9", "'conv9' is not one of 0, conv1")],
)  # fmt: skip
def test_bad_flags_are_one_line_and_write_nothing(refused, tmp_path, script, flags, message):
    refused(SCRIPTS[script], f"{SMALL} --out {tmp_path / 'run'} {flags}", message)
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_bfloat16_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(common, "find_device", torch.device)
    monkeypatch.setattr(common, "has_bf16", lambda _: False)
    refused(train_fgsm, "--device cuda --precision bf16", "no bfloat16 for Tesla T4: give fp32")


def test_auto_says_why_it_does_not_take_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("the driver is too old\nMore", stacklevel=1))
    assert common.find_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == "note: the driver is too old\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=RuntimeError("no kernel\nMore")))
    assert common.find_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == "note: the CPU is used, for 'cuda' does not work: no kernel\n"
    with pytest.raises(SystemExit):
        common.find_device("cuda")
    assert capsys.readouterr().err.endswith(": error: argument --device: no device 'cuda' here that works: no kernel\n")


@pytest.mark.parametrize("message", ["CUDA out of memory.", "CPU: not enough memory", "can't allocate memory:"])
def test_running_out_of_memory_is_one_line(capsys, message):
    with pytest.raises(SystemExit, match="1"):
        console.launch(mock.Mock(side_effect=RuntimeError(f"{message}\nMore")))
    assert re.fullmatch(".*: error: out of memory: give a smaller --batch-size .*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="mine"):
        console.launch(mock.Mock(side_effect=RuntimeError("mine")))


def test_a_reader_that_goes_away_ends_no_epoch(tmp_path):
    """`| head`: the run ends where it prints the next line, and what that says is in its files."""
    command = [sys.executable, "train_fgsm.py", *f"{SMALL} --epochs 2 --out {tmp_path}".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch"))  # the header's last
        process.stdout.close()
        assert process.wait() == 2
        message = "nothing reads this output any more (a training run: --resume continues it)\n"
        assert process.stderr.read().endswith(message)
    assert [row["epoch"] for row in rows(tmp_path)] == [1]


def test_a_gpus_random_numbers_are_in_the_checkpoint(cli, tmp_path, monkeypatch):
    state = torch.arange(3)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.copy_(new))
    assert bookkeeping.device_rng("cpu") is None and bookkeeping.device_rng("mps") is state
    bookkeeping.device_rng("mps", torch.ones(3))
    assert state.tolist() == [1, 1, 1]
    given = []
    monkeypatch.setattr(bookkeeping, "device_rng", lambda device, state=None: given.append(state) or torch.arange(3))
    for more in ("", "--resume"):
        assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path} {more}")[0] == 0
    assert given[0] is None and given[-1].tolist() == [0, 1, 2]


def test_a_folder_with_a_run_is_not_overwritten_and_a_resume_must_match(cli, refused, finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    flags, before = f"{FINISHED} --out {run}", (run / "model.pt").read_bytes()
    (run / "notes.txt").write_text("mine")
    for script, more, message in (
        (train_fgsm, "", "holds a run"),
        (train_fgsm, "--resume --eps 4", "eps was 8.0 there and is 4.0"),
        (train_fgsm, "--resume --width 2", "width was 1 there and is 2 now"),
        (train_slat, "--resume", "method was fgsm there and is slat now"),
    ):
        refused(script, f"{flags} {more}", message)
        assert (run / "model.pt").read_bytes() == before
    arrays, classes = common.load_arrays(json.loads((run / "config.json").read_text())["dataset"], None)
    other = {"train_y": arrays["train_y"][[1, 0, *range(2, len(arrays["train_y"]))]]}  # the same mean and deviation
    for change in ({"train_x": 255 - arrays["train_x"]}, other, {k: arrays[k][:40] for k in ("test_x", "test_y")}):
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_arrays", mock.Mock(return_value=(arrays | change, classes)))
            refused(train_fgsm, f"{flags} --resume", "cannot resume", "data was {")
    assert cli(train_fgsm, f"{flags} --overwrite --seed 1")[0] == 0
    assert (run / "model.pt").read_bytes() != before and (run / "notes.txt").read_text() == "mine"
    (run / "checkpoint.pt").write_bytes(b"damaged")
    refused(train_fgsm, f"{flags} --resume --seed 1", "damaged")


def test_resume_begins_a_run_where_there_is_none(cli, tmp_path):
    """So that one line can be started, killed and requeued; elsewhere than where it began, and with its data moved."""
    run, data = tmp_path / "run", tmp_path / "data.npz"
    shutil.copy(SMALL.split()[1], data)
    line = SMALL.replace(SMALL.split()[1], "{}") + f" --epochs 2 --out {run} --resume"
    for begun in (False, True):
        before = (run / "model.pt").read_bytes() if begun else None
        code, out, err = cli(train_fgsm, line.format(data))
        assert code == 0 and ("resumed  after epoch 2 of 2" in out) == begun
        assert err == ("" if begun else f"note: there is no run in {run} yet: this one begins\n")
        assert before in (None, (run / "model.pt").read_bytes())  # with nothing left to do it stays as it is
        data = data.rename(tmp_path / "elsewhere.npz")


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_files_of_a_run_may_be_links(cli, tmp_path):
    """To a larger disk; --overwrite replaces what they lead to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    for more in ("", "--overwrite"):
        assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path}/run {more}")[0] == 0
        assert {path.name for path in (tmp_path / "disk").iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
        assert (tmp_path / "run/checkpoint.pt").is_symlink()


def test_a_download_that_fails_names_the_flags_for_local_data(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", mock.Mock(side_effect=OSError("no route to host")))
    flags = f"--eps 8 --layers 0,conv1,conv2 --out {tmp_path / 'run'}"
    refused(train_slat, flags, "--data-dir", "--dataset FILE.npz", "no route to host")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def saved(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
GOOD = {"train_x": IMAGES, "train_y": np.arange(20) % 4, "test_x": IMAGES[:5], "test_y": np.arange(5) % 4}
BAD_DATA = {
    "float images": ({"train_x": IMAGES.astype(np.float32)}, "it must be uint8"),
    "four channels": ({"train_x": IMAGES.repeat(2, -1)[..., :4]}, "(N, H, W, 3)"),
    "no images": ({"train_x": IMAGES[:0], "train_y": GOOD["train_y"][:0]}, "it must be uint8"),
    "no pixels": ({"test_x": GOOD["test_x"][:, :0]}, "it must be uint8"),
    "other sizes": ({"test_x": GOOD["test_x"][:, :6]}, "the same H, W everywhere"),
    "labels too few": ({"train_y": GOOD["train_y"][:-1]}, "whole numbers (20,)"),
    "labels with fractions": ({"test_y": GOOD["test_y"] + 0.5}, "whole numbers (5,)"),
    "label below zero": ({"train_y": GOOD["train_y"] - 1}, "train_y has labels -1 to 2"),
    "label of no class": ({"test_y": GOOD["test_y"] + 3}, "test_y has labels 3 to 6, it must have 0 to 3"),
    "label without end": ({"train_y": GOOD["train_y"] + 10**9}, "0 to 999 at most"),
    "labels of 64 bits": ({"train_y": GOOD["train_y"].astype(np.uint64) + 2**63}, "0 to 999 at most"),
    "an array missing": ({"test_y": None}, "test_y"),
    "objects": ({"train_y": np.array([print] * 20)}, "no data set"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_wrong_data(refused, tmp_path, name):
    change, message = BAD_DATA[name]
    (tmp_path / "data.npz").write_bytes(saved({k: v for k, v in (GOOD | change).items() if v is not None}))
    refused(train_fgsm, f"--dataset {tmp_path / 'data.npz'} --out {tmp_path / 'run'}", "data.npz", message)


def test_damaged_and_hostile_data(cli, refused, tmp_path):
    path, trap, packed = tmp_path / "data.npz", pickle.dumps(Payload(tmp_path / "pwned")), io.BytesIO()
    flags = f"--dataset {path} --depth 10 --width 1 --batch-size 4 --epochs 1 --device cpu --out {tmp_path / 'run'}"
    with zipfile.ZipFile(packed, "w") as file:
        for name in GOOD:
            file.writestr(f"{name}.npy", trap)
    for content in (trap, packed.getvalue(), saved(GOOD)[:-900], b"hello", b""):
        path.write_bytes(content)
        refused(train_fgsm, flags, "data.npz")
    assert [*tmp_path.iterdir()] == [path]
    path.write_bytes(saved(GOOD))
    assert cli(train_fgsm, flags)[0] == 0


def test_wrong_and_hostile_weights(finished, tmp_path):
    good, path = torch.load(finished / "model.pt", weights_only=True), tmp_path / "model.pt"
    weights, arguments = good["state_dict"], good["arguments"]
    trap = Payload(tmp_path / "pwned")
    bad = [
        (good | {"state_dict": trap}, ""),
        (good | {"state_dict": [1]}, "no state_dict"),
        (good | {"arguments": "hello"}, "no arguments"),
        (good | {"arguments": arguments | {"depth": 600004}}, "depth 600004, but"),
        (good | {"arguments": arguments | {"width": 10**9}}, "size mismatch|overflow"),
        (good | {"arguments": arguments | {"width": 2}}, "size mismatch"),
        (good | {"state_dict": {k: v for k, v in weights.items() if k != "fc.bias"}}, 'missing.*"fc.bias"'),
        ({"state_dict": weights}, "no arguments"),
        ((finished / "model.pt").read_bytes()[:5000], "damaged"),
        (b"", "damaged"),
    ]
    for content, message in bad:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(OSError, match="model.pt") as error:
            load_model(path)
        text = str(error.value)
        assert "\n" not in text and len(text) < 400 and re.search(message, text, re.I), text
    path.unlink()
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    with pytest.raises(OSError, match="is not finished: name .*checkpoint.pt to load it as it stands"):
        load_model(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("optimizer"), "does not fit"),
        (lambda s: s.update(extra={"delta": torch.ones(3)}), "it carries ['delta'], the method []"),
        (lambda s: s["state_dict"].pop("fc.bias"), "does not fit"),
    ],
)
def test_wrong_checkpoints(refused, finished, tmp_path, change, message):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"epochs": 4}
    (run / "config.json").write_text(json.dumps(config))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, run / "checkpoint.pt")
    refused(train_fgsm, f"{FINISHED} --epochs 4 --out {run} --resume", message)


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_a_damaged_config(refused, finished, tmp_path, content):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.json").write_text(content)
    message = "cannot resume" if content.endswith("}") else "config.json is damaged"
    refused(train_fgsm, f"{FINISHED} --out {run} --resume", message)
