"""What a run leaves behind, what resumes it, and what each mistake says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import train_fgsm
import train_fgsm_ckpt
import train_fgsm_ga
import train_fgsm_rs
import train_free
import train_n_fgsm
import train_pgd
import train_slat
import train_yopo
from conftest import SMALL, TINY
from wrn import load_file, load_model

SCRIPTS = {
    "fgsm": train_fgsm,
    "fgsm_rs": train_fgsm_rs,
    "fgsm_ga": train_fgsm_ga,
    "fgsm_ckpt": train_fgsm_ckpt,
    "n_fgsm": train_n_fgsm,
    "free": train_free,
    "yopo": train_yopo,
    "pgd": train_pgd,
    "slat": train_slat,
}
TIMES = {"seconds", "images_per_second", "monitor_seconds"}


def rows(run):
    """metrics.jsonl without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(a, b):
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_what_it_promises(cli, tmp_path, name):
    run = tmp_path / "run"
    code, out, _ = cli(SCRIPTS[name], f"{SMALL} --epochs 2 --seed 3 --out {run}")
    assert code == 0
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "best.pt"}
    assert {path.name for path in run.iterdir()} == files
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 3 and config["torch"] == torch.__version__ and config["device"] == "cpu"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = "epoch step lr loss train_acc seconds images_per_second test_clean test_fgsm test_pgd10 train_pgd10"
    replays = config.get("replays", 1)
    assert [row["epoch"] for row in metrics] == [1, 2]
    assert [row["step"] for row in metrics] == [4 * replays, 8 * replays]
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert all(set(keys.split()) <= set(row) for row in metrics)
    assert metrics[-1]["lr"] == pytest.approx(0.2 / (8 * replays) / 0.6)
    assert re.search(r"estimate about \d+:\d\d of training", out)
    assert max(map(len, out.splitlines())) <= 80 + len(str(run))
    model = load_model(run)
    final = load_file(run / "checkpoint.pt")["state_dict"]
    assert all(torch.equal(value, final[key]) for key, value in model.state_dict().items())
    best = max(metrics, key=lambda row: row["train_pgd10"])
    assert (run / "best.pt").exists() and load_file(run / "checkpoint.pt")["best"] == best["train_pgd10"]


def test_the_same_command_gives_the_same_weights(cli, tmp_path):
    for name in "ab":
        assert cli(train_slat, f"{SMALL} --epochs 1 --out {tmp_path / name}")[0] == 0
    assert_same(load_file(tmp_path / "a/model.pt"), load_file(tmp_path / "b/model.pt"))
    assert cli(train_slat, f"{SMALL} --epochs 1 --seed 1 --out {tmp_path / 'c'}")[0] == 0
    a, c = (load_file(tmp_path / name / "model.pt")["state_dict"]["fc.weight"] for name in "ac")
    assert not torch.equal(a, c)


# Every flag that a script has for itself, at a value that is not its default.
OWN_FLAGS = {
    "fgsm": ["--alpha 8"],
    "fgsm_rs": ["--alpha 8"],
    "fgsm_ga": ["--alpha 8", "--ga-lambda 2"],
    "fgsm_ckpt": ["--alpha 8", "--checkpoints 2"],
    "n_fgsm": ["--alpha 8", "--noise 1"],
    "free": ["--replays 4"],
    "yopo": ["--alpha 8", "--outer 2", "--inner 1"],
    "pgd": ["--alpha 8", "--steps 2", "--init uniform"],
    "slat": ["--layers 0,conv1", "--eta 0.5", "--input-step 0.5", "--no-latent-clamp", "--init uniform"],
}
TRAINING_FLAGS = "eps 4,batch-size 8,lr-max 0.1,weight-decay 0,no-momentum-cycle,dropout 0,seed 1,precision fp32"


def flags_in(text):
    return set(re.findall(r"--([a-z][a-z-]+)", text))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_a_script_reaches_the_training(cli, tmp_path, name):
    shared = flags_in(common.make_parser("").format_help())
    own = flags_in(cli(SCRIPTS[name], "--help")[1]) - shared
    assert own == flags_in(" ".join(OWN_FLAGS[name])) | ({"latent-clamp"} if name == "slat" else set())
    changes = OWN_FLAGS[name] + [f"--{flag}" for flag in TRAINING_FLAGS.split(",")] * (name == "fgsm")
    default = weights_after(cli, SCRIPTS[name], tmp_path / "default", "")
    for i, flags in enumerate(changes):
        changed = weights_after(cli, SCRIPTS[name], tmp_path / str(i), flags)
        assert any(not torch.equal(changed[key], default[key]) for key in default), f"{flags} changes nothing"


def weights_after(cli, script, run, flags):
    code, _, err = cli(script, f"{SMALL} --epochs 1 --limit-train 64 --monitor 1 --eps 16 --seed 0 {flags} --out {run}")
    assert code == 0, err
    return load_file(run / "model.pt")["state_dict"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_uninterrupted(cli, tmp_path, monkeypatch, name):
    flags = f"{SMALL} --epochs 3 --limit-train 64 --out"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(SCRIPTS[name], f"{flags} {whole}")[0] == 0
    with monkeypatch.context() as patch:  # in the middle of the second epoch
        patch.setattr(train_slat.torch.optim.SGD, "step", stop_after(1.5 * epoch_steps(whole)))
        assert cli(SCRIPTS[name], f"{flags} {killed}")[0] == 130
    assert len(rows(killed)) == 1
    code, out, _ = cli(SCRIPTS[name], f"{flags} {killed} --resume")
    assert code == 0 and "resumed  after epoch 1 of 3" in out
    assert_same_run(whole, killed)
    before = (killed / "model.pt").read_bytes()
    assert cli(SCRIPTS[name], f"{flags} {killed} --resume")[0] == 0  # nothing left to do
    assert (killed / "model.pt").read_bytes() == before


def epoch_steps(run):
    return rows(run)[0]["step"]


def stop_after(steps):
    original, made = torch.optim.SGD.step, []

    def step(self, *args, **kwargs):
        made.append(1)
        if len(made) > steps:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    return step


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    for file in ("model.pt", "best.pt", "checkpoint.pt"):
        assert_same(load_file(a / file), load_file(b / file))


def send_at(step, number, times=1):
    """An optimiser step that sends this process signals after it was made for the step-th time."""
    original, made = torch.optim.SGD.step, []

    def patched(self, *args, **kwargs):
        made.append(1)
        result = original(self, *args, **kwargs)
        if len(made) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return result

    return patched


@pytest.mark.parametrize("name", SCRIPTS)
def test_sigterm_ends_after_the_step_and_a_resume_goes_on_there(cli, tmp_path, monkeypatch, name):
    flags = f"{SMALL} --epochs 2 --limit-train 64 --out"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli(SCRIPTS[name], f"{flags} {whole}")[0] == 0
    step = int(1.5 * epoch_steps(whole)) + (3 if name == "free" else 0)  # of Free-AT: between two replays
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", send_at(step, signal.SIGTERM))
        code, out, _ = cli(SCRIPTS[name], f"{flags} {stopped} --overwrite")
    assert code == 143 and f"stopped  by SIGTERM after step {step:,} of" in out
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    command = out.splitlines()[-1].split()
    assert command[:2] == ["python", f"{SCRIPTS[name].__name__}.py"] and command[-1] == "--resume"
    code, out, _ = cli(SCRIPTS[name], " ".join(command[2:]))
    assert code == 0 and "resumed  after epoch 1 of 2 and" in out
    assert_same_run(whole, stopped)


def test_ctrl_c_while_accuracies_are_measured_and_twice(cli, tmp_path, monkeypatch):
    flags = f"{SMALL} --epochs 2 --out"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli(train_slat, f"{flags} {whole}")[0] == 0
    plain = common.monitor

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "monitor", interrupted)
        code, out, _ = cli(train_slat, f"{flags} {stopped}")
        assert code == 130 and "after step 4 of 8" in out
    assert rows(stopped) == []
    with monkeypatch.context() as patch:  # the second one does not wait for the step's end
        patch.setattr(torch.optim.SGD, "step", send_at(2, signal.SIGINT, times=2))
        code, _, err = cli(train_slat, f"{flags} {stopped} --resume")
        assert code == 130 and err.count("\n") == 1
    assert len(rows(stopped)) == 1
    assert cli(train_slat, f"{flags} {stopped} --resume")[0] == 0
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("name", ["slat", "free"])
def test_checkpoints_inside_an_epoch(cli, tmp_path, monkeypatch, name):
    """Saved after every step, stopped dead in the third epoch, and it goes on at that step."""
    flags = f"{SMALL} --epochs 3 --limit-train 64 --checkpoint-minutes 0 --out"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(SCRIPTS[name], f"{flags} {whole} --checkpoint-minutes 99")[0] == 0
    made = int(2.5 * epoch_steps(whole))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stop_after(made))
        assert cli(SCRIPTS[name], f"{flags} {killed}")[0] == 130
    assert load_file(killed / "checkpoint.pt")["step"] == made
    counted = []
    original = common.Run.count
    monkeypatch.setattr(common.Run, "count", lambda self, *args: (counted.append(1), original(self, *args)))
    assert cli(SCRIPTS[name], f"{flags} {killed} --resume")[0] == 0
    assert len(counted) == 3 * epoch_steps(whole) - made
    assert_same_run(whole, killed)


def test_sigkill_and_resume_is_uninterrupted(cli, tmp_path):
    flags = f"{SMALL} --epochs 6 --out"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(train_slat, f"{flags} {whole}")[0] == 0
    process = subprocess.Popen([sys.executable, "train_slat.py", *flags.split(), str(killed)], stdout=subprocess.PIPE)
    while not (killed / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= len(rows(killed)) < 6
    assert cli(train_slat, f"{flags} {killed} --resume")[0] == 0
    assert_same_run(whole, killed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_random_kills(tmp_path):
    """The short version of faults.py."""
    command = [sys.executable, "tests/faults.py", "--kills", "3", "--only", "slat,evaluation"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    assert out.count("all as uninterrupted") == 2


def test_deterministic_algorithms_are_asked_for(cli, tmp_path):
    try:
        assert cli(train_slat, f"{SMALL} --epochs 1 --deterministic --out {tmp_path / 'a'}")[0] == 0
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert cli(train_slat, f"{SMALL} --epochs 1 --out {tmp_path / 'b'}")[0] == 0
    assert_same(load_file(tmp_path / "a/model.pt"), load_file(tmp_path / "b/model.pt"))


def test_a_run_killed_before_its_first_checkpoint_starts_anew(cli, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "count", stop)
        assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path / 'a'}")[0] == 130
    assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path / 'a'} --resume")[0] == 0
    assert cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path / 'b'}")[0] == 0
    assert_same(load_file(tmp_path / "a/model.pt"), load_file(tmp_path / "b/model.pt"))


def test_a_warning_names_the_epoch(cli, tmp_path, monkeypatch):
    seen = iter([(50, 30, 28), (50, 30, 28), (80, 60, 1), (80, 60, 1)])  # test and train, two epochs
    monkeypatch.setattr(common, "monitor", lambda *_: dict(zip(("clean", "fgsm", "pgd10"), next(seen)), alignment=0.5))
    code, out, _ = cli(train_fgsm, f"{SMALL} --epochs 2 --out {tmp_path / 'run'}")
    assert code == 0
    assert "warning: epoch 2: catastrophic overfitting" in out and "warning: epoch 1" not in out
    assert "first seen in epoch 2" in out
    # The collapsed epoch is not the best one.
    best, last = (load_file(tmp_path / "run" / name)["state_dict"]["fc.weight"] for name in ("best.pt", "model.pt"))
    assert not torch.equal(best, last)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(cli, tmp_path):
    run = tmp_path / "run"
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 2 --lr-max 1e30 --out {run}")
    assert code == 1 and err.count("\n") == 1 and "--lr-max" in err
    assert not (run / "model.pt").exists()


@pytest.mark.parametrize("flags", ["", "--checkpoint-minutes 0"])
def test_weights_that_explode_in_an_epochs_last_step_are_not_saved(cli, tmp_path, monkeypatch, flags):
    """The losses of that epoch are all finite."""
    run, plain, made = tmp_path / "run", torch.optim.SGD.step, []

    def step(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(1)
        if len(made) == 8:  # of four steps an epoch
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 3 --out {run} {flags}")
    assert code == 1 and err.count("\n") == 1 and "weights are not finite, first seen in epoch 2 at step 8" in err
    for name, step in (("best.pt", None), ("checkpoint.pt", 7 if flags else 4)):
        state = load_file(run / name)
        assert all(w.isfinite().all() for w in state["state_dict"].values()) and state.get("step") == step


BAD_FLAGS = [
    ("--eps 256", "256 is out of range"),
    ("--eps -1", "-1 is out of range"),
    ("--eps nan", "nan is out of range"),
    ("--eps eight", "'eight' is no number"),
    ("--depth 12", "6n + 4"),
    ("--width 0", "--width"),
    ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "'1.5' is no whole number"),
    ("--batch-size 1", "--batch-size"),
    ("--batch-size 5000", "lower --batch-size"),
    ("--lr-max inf", "--lr-max"),
    ("--dropout 1", "less than 1"),
    ("--device cuda:77", "no device 'cuda:77'"),
    ("--device tpu", "no device 'tpu'"),
    ("--precision fp16", "--precision"),
    ("--dataset imagenet", "no data set 'imagenet'"),
    ("--resume", "no run to resume"),
    ("--resume --overwrite", "--overwrite"),
    ("--seed -1", "--seed"),
    ("--frobnicate", "--frobnicate"),
    ("--eps", "expected one argument"),
    ("--eps 1e400", "1e400 is out of range"),
    ("--limit-train 0", "--limit-train"),
    ("--monitor 0", "--monitor"),
    ("--weight-decay -1", "--weight-decay"),
    ("--dropout -0.1", "--dropout"),
    ("--checkpoint-minutes -1", "--checkpoint-minutes"),
    ("--seed 9999999999", "--seed"),
    ("--alpha 300", "--alpha"),
    ("extra", "unrecognized arguments: extra"),
]
BAD_OWN_FLAGS = [
    ("fgsm_rs", "--alpha 511", "--alpha"),
    ("n_fgsm", "--noise -1", "--noise"),
    ("fgsm_ckpt", "--checkpoints 0", "--checkpoints"),
    ("fgsm_ga", "--ga-lambda -1", "--ga-lambda"),
    ("free", "--replays 0", "--replays"),
    ("yopo", "--outer 0", "--outer"),
    ("yopo", "--inner 1.5", "--inner"),
    ("pgd", "--steps 0", "--steps"),
    ("pgd", "--init random", "--init"),
]
BAD_SLAT_FLAGS = [
    ("--layers 0,conv9", "'conv9' is unknown"),
    ("--layers 0,0", "'0' is unknown or twice"),
    ("--layers ,", "''"),
    ("--eta -1", "--eta"),
    ("--input-step x", "--input-step"),
    ("--init ones", "--init"),
]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [("fgsm", *case) for case in BAD_FLAGS] + [("slat", *case) for case in BAD_SLAT_FLAGS] + BAD_OWN_FLAGS,
)
def test_bad_flags_are_one_line_and_write_nothing(cli, tmp_path, script, flags, message):
    code, _, err = cli(SCRIPTS[script], f"--dataset {TINY} --out {tmp_path / 'run'} {flags}")
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_fgsm_ga_cannot_be_compiled(cli, tmp_path):
    code, _, err = cli(train_fgsm_ga, f"{SMALL} --compile --out {tmp_path / 'run'}")
    assert code == 2 and err.count("\n") == 1 and "--compile" in err and not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_not_overwritten_and_a_resume_must_match(cli, tmp_path):
    flags = f"{SMALL} --epochs 1 --out {tmp_path}"
    (tmp_path / "notes.txt").write_text("mine")
    assert cli(train_fgsm, flags)[0] == 0
    before = (tmp_path / "model.pt").read_bytes()
    for more, message in (
        ("", "holds a run"),
        ("--resume --eps 4", "--eps was 8.0 there and is 4.0"),
        ("--resume --width 2", "--width"),
        ("slat --resume", "the method was fgsm there and is slat now"),
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
    for out, message in (("file", "is a file"), ("file/run", "Not a directory")):
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
    assert load_file(run / "checkpoint.pt")["epoch"] == 1 and not list(run.glob("*.new"))


def test_a_read_only_folder(cli, tmp_path, monkeypatch):
    """Where the tests run as root, no chmod stops them: the error comes from a patch."""
    run = tmp_path / "run"

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        code, _, err = cli(train_fgsm, f"{SMALL} --epochs 1 --out {run}")
        assert code == 2 and err == f"train_fgsm.py: error: Read-only file system: {run}\n"
    run.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(common, "open", refuse, raising=False)
        patch.setattr(Path, "unlink", refuse)
        code, _, err = cli(train_fgsm, f"{SMALL} --epochs 1 --out {run}")
        assert code == 2 and err == f"train_fgsm.py: error: Read-only file system: {run}/config.json\n"
    assert not list(run.iterdir())


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


GOOD = dict(
    train_x=np.zeros((8, 8, 8, 3), np.uint8),
    train_y=np.arange(8, dtype=np.int64) % 4,
    test_x=np.zeros((4, 8, 8, 3), np.uint8),
    test_y=np.arange(4, dtype=np.int64),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": GOOD["train_x"].astype(np.float32)}, "must be uint8"),
        ({"train_x": GOOD["train_x"][..., :1]}, "must be uint8 (N, H, W, 3)"),
        ({"train_y": GOOD["train_y"][:-1]}, "must be whole numbers (8,)"),
        ({"train_y": GOOD["train_y"] * 1.0}, "must be whole numbers"),
        ({"train_y": GOOD["train_y"] - 1}, "label -1 in train_y is out of range"),
        ({"test_y": GOOD["test_y"] + 1}, "label 4 in test_y is out of range"),
        ({"test_x": GOOD["test_x"][:0], "test_y": GOOD["test_y"][:0]}, "test_x"),
        ({"test_x": np.zeros((4, 9, 9, 3), np.uint8)}, "different sizes"),
        ({"train_y": np.array([print] * 8)}, "no data set"),
        ({"train_x": None}, "train_x"),
    ],
)
def test_bad_data_sets(cli, tmp_path, change, message):
    path = tmp_path / "data.npz"
    np.savez(path, **{k: v for k, v in {**GOOD, **change}.items() if v is not None})
    code, _, err = cli(train_fgsm, f"--dataset {path} --depth 10 --width 1 --batch-size 4 --out {tmp_path / 'run'}")
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_a_damaged_and_a_good_data_set(cli, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **GOOD)
    flags = f"--dataset {path} --depth 10 --width 1 --batch-size 4 --epochs 1 --out {tmp_path / 'run'}"
    path.write_bytes(path.read_bytes()[:-900])
    code, _, err = cli(train_fgsm, flags)
    assert code == 2 and err.count("\n") == 1 and str(path) in err
    np.savez(path, **GOOD)
    assert cli(train_fgsm, flags)[0] == 0


def test_a_download_that_fails_names_the_flag_for_local_data(cli, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    code, _, err = cli(train_slat, f"--eps 8 --layers 0,conv1,conv2 --out {tmp_path / 'run'}")
    assert code == 2 and err.count("\n") == 1 and "--data-dir" in err and "no route to host" in err


def readme_code(marker):
    """The README's python block that contains marker."""
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    (block,) = [block for block in blocks if marker in block]
    return block


def test_the_readmes_torchvision_resnet_trains_with_slat(tiny):
    names = {}
    exec(readme_code("class Hooked"), names)
    torch.manual_seed(0)
    model = names["model"]
    x, y = tiny.train(8)
    logits, h = model(x, return_features=True)
    torch.testing.assert_close(model.eval()(x, delta={"conv1": 0 * h["conv1"]}), model(x))
    moved = model(x, delta={"conv1": h["conv1"] * 0 + 0.1}, return_features=True)[1]
    torch.testing.assert_close(moved["conv1"], model(x, return_features=True)[1]["conv1"] + 0.1)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(5):
        x_adv, delta = train_slat.slat(model, x, y, 8 / 255, ["0", *names["layers"]], 8 / 255, 7.2 / 255)
        assert set(delta) == set(names["layers"]) and all(d.abs().max() <= 8.1 / 255 for d in delta.values())
        loss = F.cross_entropy(model(x_adv, delta=delta), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_help_shows_every_flag(cli):
    for script in SCRIPTS.values():
        code, out, _ = cli(script, "--help")
        assert code == 0 and "--eps" in out and "(default: None)" not in out


def test_precision_and_device_are_settled(cli, tmp_path):
    assert cli(train_slat, f"{SMALL} --epochs 1 --precision fp32 --out {tmp_path / 'a'}")[0] == 0
    assert cli(train_slat, f"{SMALL} --epochs 1 --precision bf16 --out {tmp_path / 'b'}")[0] == 0
    a, b = (load_file(tmp_path / name / "model.pt")["state_dict"]["fc.weight"] for name in "ab")
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.5, atol=0.05)
