"""What a run does beside training: files, resumption, and what each mistake says."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision

import bookkeeping
import common
import train_fgsm
import train_slat
from conftest import SCRIPTS, SMALL, TINY, assert_same, assert_same_run, rows, train
from wrn import WideResNet, load_file


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_random_kills():
    """The short version of faults.py."""
    command = [sys.executable, "tests/faults.py", "--kills", "3", "--only", "slat,evaluation"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    assert out.count("all as uninterrupted") == 2


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


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize(
    ("place", "name", "call", "saved"),  # what stops in which call, and the epochs that are in the checkpoint then
    [(bookkeeping.Run, "log", 1, 0), (bookkeeping.Run, "log", 4, 1), (bookkeeping, "monitor", 3, 2),
     (bookkeeping, "write_text", 3, 2)],
)  # fmt: skip
def test_a_fault_at_any_moment_loses_the_epoch_in_hand(cli, tmp_path, monkeypatch, fault, place, name, call, saved):
    flags, plain, calls = f"{SMALL} --epochs 3 --limit-train 64 --out {tmp_path}", getattr(place, name), []
    assert cli(train_fgsm, f"{flags}/whole")[0] == 0

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise fault
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        assert cli(train_fgsm, f"{flags}/killed")[0] == (130 if isinstance(fault, KeyboardInterrupt) else 1)
    checkpoint = tmp_path / "killed/checkpoint.pt"
    assert saved == (len(load_file(checkpoint)["rows"]) if checkpoint.exists() else 0)
    assert cli(train_fgsm, f"{flags}/killed --resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_accuracies_need_less_memory_than_training(cli, tmp_path, monkeypatch):
    """No weight wants a gradient, no batch is larger than --batch-size; and the epoch has been saved before."""
    forward, sizes = WideResNet.forward, set()

    def watched(model, x, *args, **kwargs):
        if not model.training:
            assert not any(weight.requires_grad for weight in model.parameters())
            assert load_file(tmp_path / "run/checkpoint.pt")["rows"][-1].keys() == EPOCH
            sizes.add(len(x))
        return forward(model, x, *args, **kwargs)

    monkeypatch.setattr(WideResNet, "forward", watched)
    assert cli(train_fgsm, f"{SMALL} --epochs 1 --monitor 80 --out {tmp_path / 'run'}")[0] == 0
    assert max(sizes) == 32


EPOCH = {"epoch", "step", "lr", "loss", "train_acc", "seconds", "images_per_second"}


def test_a_folder_is_for_one_process_at_a_time(cli, tmp_path):
    fcntl, run = pytest.importorskip("fcntl"), train("fgsm", 1, tmp_path / "run")
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    before = {path: path.read_bytes() for path in run.iterdir()}
    for more in ("", "--resume", "--overwrite"):
        code, _, err = cli(train_fgsm, f"{SMALL} --epochs 1 --out {run} {more}")
        assert code == 2 and err.count("\n") == 1 and "another process is training in" in err
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    os.close(other)
    assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {run} --resume")[0] == 0


def test_a_resume_wants_the_same_images(cli, tmp_path):
    with np.load(TINY) as file:
        arrays = {key: file[key][:64] for key in file.files}
    flags = f"{SMALL} --dataset {tmp_path / 'data.npz'} --epochs 1 --out {tmp_path / 'run'}"
    np.savez(tmp_path / "data.npz", **arrays)
    assert cli(train_fgsm, flags)[0] == 0
    for change in ({"train_x": 255 - arrays["train_x"]}, {key: arrays[key][:40] for key in ("test_x", "test_y")}):
        np.savez(tmp_path / "data.npz", **arrays | change)
        code, _, err = cli(train_fgsm, f"{flags} --resume")
        assert code == 2 and err.count("\n") == 1 and "cannot resume" in err and "data was {" in err


def test_a_warning_names_the_epoch(cli, tmp_path, monkeypatch):
    seen = iter([(50, 30, 28), (50, 30, 28), (80, 60, 1), (80, 60, 1)])  # test and train, two epochs
    monkeypatch.setattr(
        bookkeeping, "monitor", lambda *_: dict(zip(("clean", "fgsm", "pgd10"), next(seen)), alignment=0.5)
    )
    code, out, _ = cli(train_fgsm, f"{SMALL} --epochs 2 --out {tmp_path / 'run'}")
    assert code == 0
    assert "warning: epoch 2: catastrophic overfitting" in out and "warning: epoch 1" not in out
    # The collapsed epoch is not the best one.
    best, last = (load_file(tmp_path / "run" / name)["state_dict"]["fc.weight"] for name in ("best.pt", "model.pt"))
    assert not torch.equal(best, last)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(cli, tmp_path):
    run = tmp_path / "run"
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 2 --lr-max 1e9 --out {run}")
    assert code == 1 and err.count("\n") == 1 and "not finite in epoch 1" in err and "--lr-max" in err
    assert {path.name for path in run.iterdir()} == {"config.json"}


def test_weights_that_explode_in_an_epochs_last_step_are_not_saved(cli, tmp_path, monkeypatch):
    """The losses of that epoch are all finite."""
    run, plain, made = tmp_path / "run", torch.optim.SGD.step, []

    def step(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(1)
        if len(made) == 8:  # of four steps an epoch
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 3 --out {run}")
    assert code == 1 and err.count("\n") == 1 and "not finite in epoch 2" in err
    for name in ("best.pt", "checkpoint.pt"):
        assert all(w.isfinite().all() for w in load_file(run / name)["state_dict"].values())
    assert len(load_file(run / "checkpoint.pt")["rows"]) == 1


BAD_FLAGS = [
    ("--eps 256", "256 is out of range"),
    ("--eps eight", "invalid number value: 'eight'"),
    ("--depth 12", "choose from 10, 16, 22"),
    ("--epochs 1.5", "invalid whole number value: '1.5'"),
    ("--batch-size 5000", "lower --batch-size"),
    ("--lr-max inf", "--lr-max"),
    ("--dropout 1", "out of range: 0 to 0.99"),
    ("--device cuda:77", "no device 'cuda:77'"),
    ("--device tpu", "no device 'tpu'"),
    ("--precision fp16", "--precision"),
    ("--dataset imagenet", "no data set 'imagenet'"),
    ("--resume", "no run to resume"),
    ("--resume --overwrite", "--overwrite"),
    ("--seed -1", "--seed"),
    ("--eps", "expected one argument"),
    ("--alpha 8", "8 is out of range"),
    ("extra", "unrecognized arguments: extra"),
]
BAD_OWN_FLAGS = [
    ("n_fgsm", "--noise -1", "--noise"),
    ("fgsm_ckpt", "--checkpoints 0", "--checkpoints"),
    ("yopo", "--inner 1.5", "--inner"),
    ("pgd", "--init random", "--init"),
]
BAD_SLAT_FLAGS = [
    ("--layers 0,conv9", "'conv9' is unknown"),
    ("--layers 0,0", "'0' is unknown or twice"),
    ("--layers ,", "''"),
    ("--input-step x", "--input-step"),
]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [("fgsm", *case) for case in BAD_FLAGS] + [("slat", *case) for case in BAD_SLAT_FLAGS] + BAD_OWN_FLAGS,
)
def test_bad_flags_are_one_line_and_write_nothing(cli, tmp_path, script, flags, message):
    code, _, err = cli(SCRIPTS[script], f"--dataset {TINY} --out {tmp_path / 'run'} {flags}")
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ("--device cpu --compile", {"shutil.which": None}, "install g++"),
        ("--device cuda --compile", {"shutil.which": None, "has_bf16": True}, "install gcc"),
        ("--device cuda --precision bf16", {"has_bf16": False}, "no bfloat16 for Tesla T4: give fp32"),
    ],
)  # fmt: skip
def test_what_a_gpu_cannot_do_is_one_line(cli, monkeypatch, flags, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(common, "find_device", torch.device)
    for name, result in changes.items():
        monkeypatch.setattr(f"common.{name}", lambda *_, result=result: result)
    code, _, err = cli(train_fgsm, flags)
    assert code == 2 and err.count("\n") == 1 and message in err


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
        common.launch(mock.Mock(side_effect=RuntimeError(f"{message}\nMore")))
    assert re.fullmatch(".*: error: out of memory: give a smaller --batch-size .*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="mine"):
        common.launch(mock.Mock(side_effect=RuntimeError("mine")))


def test_a_reader_that_goes_away_ends_no_epoch(tmp_path):
    """`| head`: the run ends where it prints the next line, and what that says is in its files."""
    command = [sys.executable, "train_fgsm.py", *f"{SMALL} --epochs 2 --out {tmp_path}".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch"))  # the header's last
        process.stdout.close()
        assert process.wait() == 2
        assert process.stderr.read().endswith("nothing reads this output any more: --resume continues a training run\n")
    assert [row["epoch"] for row in rows(tmp_path)] == [1]


def test_the_status_line_outlives_its_stream(monkeypatch, capsys):
    line, gone = common.StatusLine(), mock.Mock(write=mock.Mock(side_effect=BrokenPipeError))
    line.show("too early")
    for stream, text in ((sys.stderr, "epoch 1"), (gone, "epoch 2"), (sys.stderr, "epoch 3")):
        monkeypatch.setattr(sys, "stderr", stream)
        line.last -= 20
        line.show(text)
        line.clear()
    assert capsys.readouterr() == ("", "epoch 1\nepoch 3\n")


def test_a_gpus_random_numbers_are_in_the_checkpoint(monkeypatch):
    state = torch.arange(3)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.copy_(new))
    assert bookkeeping.device_rng("cpu") is None and bookkeeping.device_rng("mps") is state
    bookkeeping.device_rng("mps", torch.ones(3))
    assert state.tolist() == [1, 1, 1]


def test_a_folder_with_a_run_is_not_overwritten_and_a_resume_must_match(cli, tmp_path):
    flags = f"{SMALL} --epochs 1 --out {tmp_path}"
    (tmp_path / "notes.txt").write_text("mine")
    assert cli(train_fgsm, flags)[0] == 0
    before = (tmp_path / "model.pt").read_bytes()
    for more, message in (
        ("", "holds a run"),
        ("--resume --eps 4", "eps was 8.0 there and is 4.0"),
        ("--resume --width 2", "width was 1 there and is 2 now"),
        ("slat --resume", "method was fgsm there and is slat now"),
    ):
        script = train_slat if more.startswith("slat") else train_fgsm
        code, _, err = cli(script, f"{flags} {more.removeprefix('slat')}")
        assert code == 2 and message in err and err.count("\n") == 1
        assert (tmp_path / "model.pt").read_bytes() == before
    assert cli(train_fgsm, f"{flags} --overwrite --seed 1")[0] == 0
    assert (tmp_path / "model.pt").read_bytes() != before and (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    code, _, err = cli(train_fgsm, f"{flags} --resume --seed 1")
    assert code == 2 and "damaged" in err and err.count("\n") == 1


def test_a_run_folder_that_cannot_be(cli, tmp_path):
    (tmp_path / "file").write_text("")
    for out, message in (("file", "File exists"), ("file/run", "Not a directory")):
        code, _, err = cli(train_fgsm, f"{SMALL} --out {tmp_path / out}")
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    replaced = []

    def replace(new, path, original=common.os.replace):
        if Path(path).name == "checkpoint.pt" and replaced.count("checkpoint.pt") == 1:
            raise OSError(28, "No space left on device")
        replaced.append(Path(path).name)
        original(new, path)

    monkeypatch.setattr(common.os, "replace", replace)
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 3 --out {run}")
    assert code == 2 and err == f"train_fgsm.py: error: No space left on device: {run}/checkpoint.pt\n"
    assert len(load_file(run / "checkpoint.pt")["rows"]) == 1 and not list(run.glob("*.new"))


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fault):
    path = tmp_path / "checkpoint.pt"
    common.write_text(path, "old")

    def fsync(_):  # half-way: the new bytes are in the file beside it
        raise fault

    monkeypatch.setattr(common.os, "fsync", fsync)
    with pytest.raises(type(fault)):
        common.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_download_that_fails_names_the_flag_for_local_data(cli, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    code, _, err = cli(train_slat, f"--eps 8 --layers 0,conv1,conv2 --out {tmp_path / 'run'}")
    assert code == 2 and err.count("\n") == 1 and "--data-dir" in err and "no route to host" in err
