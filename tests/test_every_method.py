"""What every method must pass. A new train_*.py is found by itself; nothing here needs to be edited for it."""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import json
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision

import bookkeeping
import common
import eval_attacks
from conftest import SCRIPTS, SMALL, assert_same_run, parsed, rows, run_main
from console import load_file
from eval_attacks import load_model, percent
from wrn import WideResNet

every_method = pytest.mark.parametrize("name", SCRIPTS)
# Eight steps in which every flag can show: with this seed, ELLE-A's lambda jumps.
FLAGS = "--epochs 2 --limit-train 64 --batch-size 16 --lr-max 0.002 --dropout 0.3 --monitor 2 --eps 16 --seed 6"


@pytest.fixture(scope="module", autouse=True)
def cheap_monitor():
    """The accuracies after an epoch, no method's own, cost as much as the training; test_runs has them."""

    def clean_only(model, x, y, *_):
        clean = percent(model(x).argmax(1) == y)
        return {"clean": clean, "fgsm": clean, "pgd10": clean, "alignment": 1.0}

    with mock.patch.object(bookkeeping, "monitor", clean_only):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A method's uninterrupted run, once: (folder, what it printed, whether each step begins with a graph)."""
    autocast, forward = common.autocast, WideResNet.forward

    @functools.cache
    def run(name):
        folder, first, begun = tmp_path_factory.mktemp(name) / "run", [], []

        def entered(args):
            first.append(True)
            return autocast(args)

        def passed(self, *args, **kwargs):
            if first:
                begun.append(torch.is_grad_enabled())
                first.clear()
            return forward(self, *args, **kwargs)

        with contextlib.redirect_stdout(io.StringIO()) as out:
            with mock.patch.object(common, "autocast", entered), mock.patch.object(WideResNet, "forward", passed):
                assert run_main(SCRIPTS[name], f"{SMALL} {FLAGS} --out {folder}") == 0
        return folder, out.getvalue(), begun

    return run


@every_method
def test_a_run_leaves_what_it_promises(whole, name):
    run, out, _ = whole(name)
    assert {path.name for path in run.iterdir()} == set(eval_attacks.RUN_FILES)
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 6 and config["torch"] == torch.__version__ and config["device"] == "cpu"
    given = {flag.split()[0].replace("-", "_") for flag in f" {SMALL} {FLAGS} --out x".split(" --")[1:]}
    unchanged = {"dropout"} if parsed(SCRIPTS[name], "--device cpu").dropout == 0.3 else set()  # as given
    assert set(config["not_default"]) == given - unchanged
    assert config["method"] == name
    keys = "epoch step lr loss train_acc test_clean test_fgsm test_pgd10 train_pgd10 alignment"
    metrics, replays = rows(run), config.get("replays", 1)
    assert all(set(keys.split()) <= row.keys() for row in metrics)
    assert all(math.isfinite(row["loss"]) and 0 <= row["train_acc"] <= 100 for row in metrics)
    assert name != "fgsm" or 1 < metrics[0]["loss"] < 5  # log(10), about
    assert [(row["epoch"], row["step"]) for row in metrics] == [(1, 4 * replays), (2, 8 * replays)]
    assert metrics[-1]["lr"] == pytest.approx(0.002 / (8 * replays) / 0.6 / config.get("outer", 1))
    assert max(map(len, out.splitlines())) <= 80 + len(str(run))
    final = load_file(run / "checkpoint.pt")["state_dict"]
    assert all(torch.equal(value, final[key]) for key, value in load_model(run).state_dict().items())


@every_method
def test_no_step_begins_in_no_grad(whole, name):
    """In older torch, autocast would keep the copies of the weights which that pass makes, without a graph."""
    begun = whole(name)[2]
    assert len(begun) >= 8 and all(begun)


def test_a_script_is_train_fgsm_with_another_method():
    """But for what is in its `with common.autocast`, a script has every line of train_fgsm's main(), in its order."""

    def around(name):
        source = re.sub(r"(Run\(.*), extra=.*", r"\1)", inspect.getsource(SCRIPTS[name].main))
        head, _, rest = source.partition("            with common.autocast(args):\n")
        return (head + re.sub("^( {16}.*\n)*", "", rest)).splitlines()

    for name in SCRIPTS.keys() - {"free", "yopo"}:  # whose loops are others
        lines = iter(around(name))
        assert all(line in lines for line in around("fgsm")), name
        source = inspect.getsource(SCRIPTS[name].main)
        assert "logits = model(x_adv" in source or f"loss, logits = {name}(" in source


EPS = 16 / 255
GIVEN = {  # to a method, at its defaults and eps 16
    "fgsm": (EPS, EPS),
    "slat": (EPS, ["0", "conv1", "conv2"], EPS, 0.9 * EPS, True),
    "fgsm_rs": (EPS, 1.25 * EPS),
    "n_fgsm": (EPS, 2 * EPS),
    "zero_grad": (EPS, 2 * EPS, 0.35),
    "n_aaer": (EPS, 2 * EPS, 1.0, 8.5, 1.5, False),
    "elle": (EPS,),
    "fgsm_ckpt": (EPS, 1.25 * EPS, 3),
    "fgsm_ga": (EPS, EPS),
    "yopo": (EPS, EPS / 4, 5, 3),
    "pgd": (EPS, EPS / 4, 7, "zero"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_method_is_given(cli, monkeypatch, tmp_path, name):
    class Seen(Exception):
        pass

    def method(model, x, y, *given):
        assert torch.is_autocast_enabled("cpu")
        raise Seen(*given)

    monkeypatch.setattr(SCRIPTS[name], name, method)
    with pytest.raises(Seen) as seen:
        cli(SCRIPTS[name], f"{SMALL} --eps 16 --precision bf16 --out {tmp_path / 'run'}")
    assert seen.value.args == tuple(pytest.approx(v) if isinstance(v, float) else v for v in GIVEN[name])


@pytest.mark.parametrize(("name", "weight"), [("elle", 1000), ("fgsm_ga", 0.2)])
def test_a_penalty_is_added_with_its_weight(cli, monkeypatch, tmp_path, name, weight):
    monkeypatch.setattr(SCRIPTS[name], name, lambda model, x, *_: (x, torch.tensor(7e3)))
    constant = "--constant" * (name == "elle")
    assert cli(SCRIPTS[name], f"{SMALL} --epochs 1 --lr-max 0.001 {constant} --out {tmp_path}")[0] == 0
    checkpoint = load_file(tmp_path / "checkpoint.pt")
    assert 1 < checkpoint["rows"][0]["loss"] - 7e3 * weight < 5
    assert name != "elle" or (checkpoint["extra"]["mean"], checkpoint["extra"]["count"]) == (7e3, 4)


def flags_of(cli, monkeypatch, script):
    """The flags that a script has besides the shared ones, each with a value that is not its default."""
    seen = {}
    shared = {action.dest for action in common.make_parser("")._actions}
    with monkeypatch.context() as patch:
        patch.setattr(common, "parse", lambda parser: seen.update(parser=parser) or parser.error("seen"))
        cli(script, "")
    for action in seen["parser"]._actions:
        if action.dest in shared:
            continue
        flag, default = action.option_strings[0], action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            yield action.option_strings[bool(default)]
        elif action.nargs == 0:
            yield flag
        elif action.choices:
            yield f"{flag} {next(choice for choice in action.choices if choice != default)}"
        elif flag == "--layers":
            yield f"{flag} 0,conv1"
        elif default is None:
            yield f"{flag} 0.5"
        else:
            yield f"{flag} {max(default - 1, 1) if isinstance(default, int) else default / 2}"


OTHER = "fp32" if common.has_bf16("cpu") else "bf16"
TRAINING_FLAGS = f"eps 4,batch-size 8,lr-max 0.1,weight-decay 0,no-momentum-cycle,dropout 0,seed 1,precision {OTHER}"


@every_method
def test_every_flag_of_a_script_reaches_the_training(cli, whole, monkeypatch, tmp_path, name):
    """The weights change, or the mean loss: the lambda_2 term of N-AAER has no gradient."""
    changes = list(flags_of(cli, monkeypatch, SCRIPTS[name]))
    changes += [f"--{flag}" for flag in TRAINING_FLAGS.split(",")] * (name == "fgsm")

    def result(run):
        losses = torch.tensor([row["loss"] for row in rows(run)])
        return load_file(run / "model.pt")["state_dict"] | {"losses": losses}

    default = result(whole(name)[0])
    for i, flags in enumerate(changes):
        code, _, err = cli(SCRIPTS[name], f"{SMALL} {FLAGS} {flags} --out {tmp_path / str(i)}")
        assert code == 0, err
        changed = result(tmp_path / str(i))
        assert not all(torch.equal(changed[key], default[key]) for key in default), f"{flags} changes nothing"


@every_method
def test_killed_and_resumed_is_uninterrupted(cli, whole, tmp_path, monkeypatch, name):
    run, killed = whole(name)[0], tmp_path / "killed"
    flags = f"{SMALL} {FLAGS} --out {killed}"
    original, made = torch.optim.SGD.step, []

    def step(self, *args, **kwargs):  # until the middle of the second epoch
        made.append(1)
        if len(made) > 1.5 * rows(run)[0]["step"]:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        assert cli(SCRIPTS[name], flags)[0] == 130
    assert len(rows(killed)) == 1
    code, out, _ = cli(SCRIPTS[name], f"{flags} --resume")
    assert code == 0 and "resumed  after epoch 1 of 2" in out
    assert_same_run(run, killed)


@every_method
def test_help_shows_every_flag_and_the_docstring_names_the_paper(cli, name):
    code, out, _ = cli(SCRIPTS[name], "--help")
    assert code == 0 and "--eps" in out and "(default: None)" not in out and "(default: False)" not in out
    assert "fixes everything; on CUDA, with --deterministic (default: 0)" in " ".join(out.split())
    assert len(inspect.getsource(SCRIPTS[name]).splitlines()) <= 100
    assert re.match(r"[^\n]+\n\n.*(arXiv:\d{4}\.\d{4,5}|https://proceedings)", SCRIPTS[name].__doc__, re.S)


def shufflenet(depth, width, num_classes, *_):
    """For small images: at 1x1 its depthwise convolutions get random weight gradients in bfloat16 (torch 2.14, CPU)."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    model.conv1[0].stride, model.maxpool = 1, torch.nn.Identity()
    model.arguments = {"depth": 2, "width": 0.5, "dropout": 0}
    return model


@every_method
def test_the_method_can_be_pasted(cli, monkeypatch, tmp_path, name):
    """Its source alone, with torch and F, trains a torchvision network (or what has the features that it needs)."""
    source = inspect.getsource(getattr(SCRIPTS[name], name))
    names, made = {"torch": torch, "F": F}, []
    exec(source, names)
    build = WideResNet if "return_features" in source else shufflenet

    def network(*args, **kwargs):  # its last layer is frozen
        made.append(build(*args, **kwargs))
        for parameter in list(made[0].parameters())[-2:]:
            parameter.requires_grad_(False)
        made.append(copy.deepcopy(made[0].state_dict()))
        return made[0]

    monkeypatch.setattr(SCRIPTS[name], name, names[name])
    monkeypatch.setattr(SCRIPTS[name], "WideResNet", network)
    code, _, err = cli(SCRIPTS[name], f"{SMALL} --limit-train 64 --monitor 1 --epochs 1 --out {tmp_path}/run")
    assert code == 0, err
    moved = {key: not torch.equal(parameter, made[1][key]) for key, parameter in made[0].named_parameters()}
    assert moved == {key: parameter.requires_grad for key, parameter in made[0].named_parameters()}
    assert list(moved.values())[-2:] == [False, False] and any(moved.values())


@every_method
def test_a_step_never_makes_the_host_wait(cli, monkeypatch, tmp_path, name):
    """On meta tensors, whatever needs a value on the host fails, and so does what mixes devices."""
    monkeypatch.setattr(common, "find_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    steps = []
    monkeypatch.setattr(SCRIPTS[name].Run, "end_epoch", lambda run: steps.append(run.step))
    monkeypatch.setattr(SCRIPTS[name].Run, "finish", lambda run: None)
    flags = f"{SMALL} --device meta --epochs 1 --limit-train 64 --out {tmp_path / 'run'}"
    if name == "fgsm_ckpt":  # asks which images are undecided; so a step that waits is noticed
        with pytest.raises((RuntimeError, NotImplementedError)):
            cli(SCRIPTS[name], flags)
        return
    code, _, err = cli(SCRIPTS[name], flags)
    assert code == 0, err
    assert steps and steps[0] >= 2
