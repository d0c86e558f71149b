import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchattacks

import common
import console
import eval_attacks
from conftest import EPS, SHORT, TINY, Linear, train
from eval_attacks import (
    ATTACKS,
    ContractError,
    apgd,
    autoattack,
    check_network,
    fab,
    is_adversarial,
    load_model,
    noise,
    pgd,
    predict,
    square,
)

every_attack = pytest.mark.parametrize("name", ATTACKS)

# ---------------------------------------------------------------- PGD and verdicts


def plain_pgd(model, x, y, eps, steps, restarts, seed):
    """What pgd has to find, in its simplest form: all restarts and steps for every image, in one batch."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    robust, x_adv = model(x).argmax(1) == y, x
    for trial in range(restarts):
        point = (x + eps * noise(x, torch.arange(len(x)), seed, trial, *x.shape[1:])).clamp(low, high)
        for _ in range(steps + 1):  # the last point is checked too
            logits = model(point.requires_grad_())
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), point)
            x_adv = torch.where(robust.view(-1, 1, 1, 1), point.detach(), x_adv)
            robust = robust & (logits.argmax(1) == y)
            point = (point.detach() + eps / 4 * gradient.sign()).clamp(low, high)
    return robust, x_adv


def test_pgd_finds_what_plain_pgd_finds(trained):
    """The same noise: the same verdicts, and survivors end at the same points, whatever the batch size."""
    model, x, y = trained
    model, x, y = model.double(), x[:30].double(), y[:30]
    robust, x_adv = plain_pgd(model, x, y, EPS, 5, 3, seed=3)
    assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
    assert 0 < robust.sum() < (predict(model, x) == y).sum()
    for batch_size in (7, 1000):
        fast, fast_adv = pgd(model, x, y, EPS, 5, 3, seed=3, batch_size=batch_size)
        assert torch.equal(fast, robust)
        torch.testing.assert_close(fast_adv[robust], x_adv[robust])
    model.float()


def test_noise_depends_on_seed_image_and_trial_alone():
    x, image = torch.zeros(2, 3, 4, 4), torch.tensor([7, 8])
    first = noise(x, image, 1, 2, 3, 4, 4)
    assert torch.equal(first.flip(0), noise(x, image.flip(0), 1, 2, 3, 4, 4)) and first.abs().max() <= 1
    others = [noise(x, image, *key, 3, 4, 4) for key in ((1, 3), (2, 2))]
    assert all(not torch.equal(a, b) for a, b in ((first[0], first[1]), (first, others[0]), (first, others[1])))


def test_survivors_end_where_torchattacks_pgd_ends(trained):
    """Without random start both attacks walk the same path; ours stops early only where it has won."""
    model, x, y = trained
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    robust, x_adv = pgd(model, x, y, EPS, steps=10, restarts=1, random_start=False)
    same = (x_adv[robust] - theirs[robust]).abs() < 1e-6
    assert same.double().mean() > 0.999  # a gradient of about zero may round to either sign
    assert robust.any() and not robust[predict(model, theirs) != y].any()


def test_a_claim_outside_the_ball_or_the_box_does_not_count():
    def never_right(images):
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    x, y = torch.full((5, 3, 2, 2), 0.5), torch.ones(5, dtype=torch.long)
    x_adv = x + torch.tensor([0.0, 0.1, 0.11, 0.6, -0.6]).view(5, 1, 1, 1)
    assert is_adversarial(never_right, x, x_adv, y, 0.1).tolist() == [True, True, False, False, False]
    assert is_adversarial(never_right, x, x_adv, y, 1.0).tolist() == [True, True, True, False, False]
    assert not is_adversarial(never_right, x, x_adv, 0 * y, 1.0).any()


CUDNN, MATMUL, MKLDNN = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
SWITCHES = {"older": [(CUDNN, "allow_tf32", True), (MATMUL, "allow_tf32", True)]}
if hasattr(CUDNN, "conv"):
    SWITCHES["newer"] = [(switch, "fp32_precision", "tf32") for switch in (CUDNN.conv, MATMUL, MKLDNN.conv)]
SWITCHES = {name: [*switches, (CUDNN, "benchmark", True)] for name, switches in SWITCHES.items()}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_verdicts_use_neither_autocast_nor_tf32(trained, precision, switches):
    """With both allowed outside, by torch's older switches or its newer ones; afterwards they are as they were."""
    model, x, y = trained[0], *(v[:20] for v in trained[1:])
    calls = collections.Counter()

    def settings():
        return *(getattr(thing, name) for thing, name, _ in SWITCHES[switches]), torch.is_autocast_enabled("cpu")

    def watched(images):
        calls[torch.is_grad_enabled(), settings()] += 1
        return model(images)

    with contextlib.ExitStack() as undo, torch.autocast("cpu", torch.bfloat16):
        for thing, name, value in SWITCHES[switches]:
            undo.callback(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)
        outside = settings()
        robust, x_adv = pgd(watched, x, y, EPS, steps=3, restarts=1, precision=precision)
        assert settings() == outside
    exact = (*({True: False, "tf32": "ieee"}[value] for value in outside[:-1]), False)
    assert {s for grad, s in calls if not grad} == {exact}
    assert {s for grad, s in calls if grad} == {None: {outside}, "fp32": {exact}, "bf16": {outside, exact}}[precision]
    assert ((predict(model, x_adv) != y) == ~robust).all()


def test_only_what_the_search_broke_is_judged(trained):
    """A verdict costs a GPU, whose float32 is slow without TF32, many times what the search in bfloat16 does."""
    model, x, y = trained
    judged = collections.Counter()

    def watched(images):
        judged[eps] += 0 if torch.is_grad_enabled() else len(images)
        return model(images)

    for eps in (0.0, EPS):
        robust, _ = pgd(watched, x, y, eps, steps=5, restarts=2)
    broken = int((predict(model, x) == y).sum() - robust.sum())
    assert broken > 5 and judged[EPS] - judged[0.0] == 2 * broken  # once more at the end


# ---------------------------------------------------------------- the contract of a call

X, Y = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    """A linear network with a twist, in eval mode; x are images that it is called with."""

    def __init__(self, forward):
        super().__init__()
        self.linear, self.twist = Linear(3), forward
        self.eval()

    def forward(self, x):
        return self.twist(self.linear, x)


HALF_TRAINED = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.1), nn.Flatten(), nn.Linear(12, 3)).double().eval()
HALF_TRAINED[0].train()
CALLS = {
    "above 1": (255 * X, Y, EPS, r"x must lie in \[0, 1\], it goes from .* to 2"),
    "normalised": (X - 0.5, Y, EPS, r"x must lie in \[0, 1\], it goes from -0"),
    "not a number": (X * torch.nan, Y, EPS, r"x must lie in \[0, 1\]"),
    "uint8": ((255 * X).byte(), Y, EPS, r"float32 or float64, not torch.uint8 \(6, 3, 2, 2\)"),
    "half": (X.half(), Y, EPS, "float32 or float64, not torch.float16"),
    "numpy": (X.numpy(), Y, EPS, "float32 or float64, not ndarray"),
    "one image": (X[0], Y, EPS, r"\(N, C, H, W\) in float32 or float64, not .* \(3, 2, 2\)"),
    "no image": (X[:0], Y[:0], EPS, r"not torch.float64 \(0, 3, 2, 2\)"),
    "eps in pixels": (X, Y, 8, r"eps must be a number in \[0, 1\], such as 8 / 255, not 8"),
    "eps below 0": (X, Y, -EPS, "eps must be a number"),
    "eps is nan": (X, Y, float("nan"), "eps must be a number"),
    "eps is text": (X, Y, "8/255", "eps must be a number in .*, not str"),
    "eps is None": (X, Y, None, "eps must be a number in .*, not NoneType"),
    "eps is a tensor": (X, Y, torch.tensor(EPS), "eps must be a number in .*, not torch.float32"),
    "one-hot": (X, F.one_hot(Y), EPS, "one class index for each of 6 images"),
    "float labels": (X, Y.double(), EPS, "one class index for each of 6 images"),
    "labels too few": (X, Y[:5], EPS, r"each of 6 images, not torch.int64 \(5,\)"),
    "label of no class": (X, Y + 1, EPS, "y must lie in 0 to 2, it goes from 1 to 3"),
    "label below 0": (X, Y - 1, EPS, "y must lie in 0 to 2, it goes from -1 to 1"),
}
NETWORKS = {
    "train mode": (Linear(3).train(), r"the network is in train mode: call model.eval\(\)"),
    "a module in train mode": (HALF_TRAINED, r"0 is in train mode: call model.eval\(\)"),
    "a tuple": (Net(lambda f, x: (f(x), x)), r"must return float logits \(6, classes\), not tuple"),
    "a dict": (Net(lambda f, x: {"logits": f(x)}), r"must return float logits \(6, classes\), not dict"),
    "squeezed": (Net(lambda f, x: f(x).squeeze(0)), r"float logits \(1, classes\), not torch.float64 \(3,\)"),
    "one logit": (Net(lambda f, x: f(x)[:, :1]), r"float logits \(6, classes\), not torch.float64 \(6, 1\)"),
    "integers": (Net(lambda f, x: f(x).long()), r"float logits \(6, classes\), not torch.int64 \(6, 3\)"),
    "half the batch": (Net(lambda f, x: f(x)[::2]), r"float logits \(6, classes\), not torch.float64 \(3, 3\)"),
    "depends on the batch": (Net(lambda f, x: f(x - x.mean(0))), "depend on its batch"),
    "noise of a fixed seed": (Net(lambda f, x: f(x + noise(x, torch.arange(len(x)), 0, 0, 3, 2, 2))), "on its batch"),
    "randomised": (Net(lambda f, x: F.dropout(f(x))), "the network is randomised: two equal passes differ"),
    "not finite": (Net(lambda f, x: f(x) / (x.amax((1, 2, 3)) < 0.9)[:, None]), "the logits are not finite at"),
}
# What must not blind the checks: a large offset, a masked class.
VEILS = {
    "offset": lambda logits: logits - 1000,
    "the batch's offset": lambda logits: logits + logits[:1].mean(),
    "-1e9": lambda logits: F.pad(logits, (0, 1), value=-1e9),
    "-inf": lambda logits: F.pad(logits, (1, 0), value=-math.inf).roll(-1, 1),
    "two of five": lambda logits: F.pad(logits, (0, 2), value=-1e9),
}
SHAKY = {
    "dropout": (lambda f, x: f(F.dropout(x, 0.3)), "the network is randomised"),
    "batch statistics": (lambda f, x: f(x - x.mean(0)), "an image's logits depend on its batch"),
}
for (veil, hide), (name, (twist, message)) in itertools.product(VEILS.items(), SHAKY.items()):
    NETWORKS[f"{name} behind {veil}"] = Net(lambda f, x, hide=hide, twist=twist: hide(twist(f, x))), message
BROKEN = {name: (Linear(3), *rest) for name, rest in CALLS.items()}
# Three images: with their opposites, six in the first pass.
BROKEN |= {name: (model, X[:3], Y[:3], EPS, message) for name, (model, message) in NETWORKS.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_contract_is_one_line(name):
    model, *call, message = BROKEN[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for attack in (pgd, square, autoattack):
        with pytest.raises(ContractError, match=message) as error:
            attack(model, *call)
        assert "\n" not in str(error.value)
    assert len(check_network(model, *call)) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("attack", "option"), [(pgd, "restarts"), (pgd, "steps"), (apgd, "steps"), (fab, "targets"), (square, "queries")]
)
def test_an_attack_of_nothing_is_refused(attack, option):
    """Elsewhere no restart may mean one run; here it would be no attack."""
    with pytest.raises(ContractError, match="restarts, targets, steps and queries must be at least 1"):
        attack(Linear(3), X, Y, EPS, **{option: 0})


def test_a_loss_that_there_is_not_is_an_error():
    with pytest.raises(KeyError, match="CE"):
        apgd(Linear(3), X, Y, EPS, "CE")


def test_a_search_in_float16_is_refused():
    """Where the gradients of confident images vanish PGD would stand still."""
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ContractError, match="gradients vanish in float16: attack outside autocast"):
            pgd(Linear(3), X, Y, EPS)
        found = pgd(Linear(3), X, Y, 0.1, precision="bf16")[0]
    assert torch.equal(found, pgd(Linear(3), X, Y, 0.1)[0])


@every_attack
@pytest.mark.parametrize("veil", VEILS)
def test_an_offset_or_a_masked_class_changes_nothing(name, veil):
    """Neither is refused, and the same images are broken."""
    attack, y = functools.partial(ATTACKS[name], **SHORT[name]), predict(Linear(3), X)
    plain = attack(Linear(3), X, y, 0.1)[0]
    found, x_adv = attack(Net(lambda f, x: VEILS[veil](f(x))), X, y, 0.1)
    assert x_adv.isfinite().all() and 0 < plain.sum() < 6
    assert torch.equal(found, plain)


def test_randomness_that_is_rare_is_refused_in_the_end():
    """A network that flips images, or resizes them, now and then passes a few passes by luck."""
    model, x, y = Linear(3), X, predict(Linear(3), X)
    dice, refused = random.Random(1), 0  # one run in about 30 has the luck to get through
    for _ in range(10):

        def flips(images):
            return model(images.flip(3) if dice.random() < 0.25 else images)

        try:
            pgd(flips, x, y, EPS, steps=5, restarts=1)
        except ContractError as error:
            refused += "the network is randomised" in str(error)
    assert refused == 10


def test_a_network_that_is_random_for_single_images_breaks_none_by_luck():
    """It passes all passes over clean images, but its verdicts on others do not last."""
    torch.manual_seed(0)

    def lucky(f, x):
        new = (x[:, None] != torch.cat([X, 1 - X])).flatten(2).any(2).all(1)
        return f(x).roll(1, 1) * (new & (torch.rand(len(x)) < 0.3))[:, None] + f(x)

    with pytest.raises(ContractError, match="the network is randomised"):
        square(Net(lucky), X, predict(Linear(3), X), 0.01, queries=50)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("attack", [square, fab])
def test_logits_that_are_not_finite_break_no_image(attack, bad):
    """Between the image and the boundary, where they would be the first thing that is found."""

    def brittle(f, x):
        far = (x - X[: len(x)]).abs().flatten(1).amax(1) > 0.02 if len(x) == len(X) else torch.zeros(len(x)).bool()
        return f(x) + torch.where(far, bad, 0.0)[:, None]

    options = {"queries": 50} if attack is square else {"steps": 20}
    robust, x_adv = attack(Net(brittle), X, predict(Linear(3), X), 0.3, batch_size=6, **options)
    assert x_adv.isfinite().all()
    within = (x_adv - X).abs().flatten(1).amax(1) <= 0.02
    assert (robust | within).all() and robust.any()


@every_attack
def test_logits_in_float64_of_a_network_in_float32(name):
    model, x = Linear(3).float(), X.float()
    y, attack = predict(model, x), functools.partial(ATTACKS[name], **SHORT[name])
    found = attack(lambda images: model(images).double(), x, y, 0.1)
    assert found[1].dtype == torch.float32 and torch.equal(found[0], attack(model, x, y, 0.1)[0])


@pytest.mark.parametrize("option", [{"steps": 20}, {"restarts": 2}, {"targets": 3}, {"queries": 9}])
def test_autoattack_has_no_budget_to_set(option):
    def never(_):
        raise AssertionError("something ran")

    with pytest.raises(TypeError, match="unexpected keyword"):
        autoattack(never, X, Y, EPS, **option)
    with pytest.raises(ContractError, match="precision must be 'fp32', 'bf16' or None, not 'fp16'"):
        autoattack(never, X, Y, EPS, precision="fp16")
    for size in (0, 2):
        with pytest.raises(ContractError, match=f"step_size must be in .0, 1., .* not {size}"):
            pgd(never, X, Y, EPS, step_size=size)


def test_the_part_to_copy_works_in_a_notebook():
    """Where there is no __file__ and no other file of ours; warnings included."""
    part = Path(eval_attacks.__file__).read_text().partition("# ------")[0]
    names = {"__name__": "__main__"}
    exec(part, names)
    net, y = nn.Sequential(Linear(3), nn.Softmax(1)).eval(), predict(Linear(3), X)
    for attack, options in ((pgd, {"steps": 5}), (fab, {"steps": 5}), (square, {"queries": 20})):
        robust, x_adv = names[attack.__name__](net, X, y, 0.1, **options)
        assert torch.equal(robust, attack(net, X, y, 0.1, **options)[0]) and not torch.equal(x_adv, X)
    with pytest.warns(UserWarning, match="probabilities"):
        names["autoattack"](net, X, y, 1.0)


def test_the_whole_file_can_be_copied_alone(tmp_path):
    """With torch and nothing of ours next to it."""
    shutil.copy(eval_attacks.__file__, tmp_path)
    code = "import eval_attacks; print(eval_attacks.pgd.__name__)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True).stdout == "pgd\n"


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_torchscript_module():
    """Which has no `training`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(12, 3, 8, 8)
    y, frozen = predict(net, x), torch.jit.freeze(torch.jit.script(net))
    for attack in (functools.partial(pgd, steps=5), functools.partial(square, queries=20)):
        assert torch.equal(attack(frozen, x, y, EPS)[0], attack(net, x, y, EPS)[0])


def stuck(linear, x):
    with torch.no_grad():
        return linear(x)


SUSPICIOUS = {
    "no_grad": (stuck, "no gradient reaches the image", True),
    "detach": (lambda f, x: f(x.detach()), "no gradient reaches the image", True),
    "gradient is nan": (lambda f, x: f(x + 1e-9 * (x - x.detach()).abs().sqrt()), "the gradient is not finite", True),
    "sigmoid": (lambda f, x: torch.sigmoid(1e4 * f(x)), "remove the softmax or sigmoid", False),
    "zero gradients": (lambda f, x: torch.sigmoid(1e4 * f(x)), "gradient of the margin is exactly zero", False),
}


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_what_makes_a_number_doubtful_is_said(name):
    """Where no gradient could be followed the attacks that follow one refuse, and Square goes on."""
    twist, sentence, refused = SUSPICIOUS[name]
    model = Net(twist)
    y = predict(model, X)
    assert any(sentence in line for line in check_network(model, X, y, EPS))
    if refused:
        for attack in (pgd, autoattack):
            with pytest.raises(ContractError, match=sentence):
                attack(model, X, y, EPS)
        plain = square(Linear(3), X, y, 0.2, queries=50)[0]
        assert torch.equal(square(model, X, y, 0.2, queries=50)[0], plain) and not plain.all()


@every_attack
def test_habits_of_other_peoples_networks_and_callers_change_nothing(name):
    """Networks that write into their input or want NCHW in memory; images with a graph, channels_last; int32 labels."""
    model, attack = Linear(3), functools.partial(ATTACKS[name], **SHORT[name])
    y = predict(model, X)
    robust, x_adv = attack(model, X, y, 0.1)
    assert 0 < robust.sum() < 6

    def shallow(f, x):
        assert x.grad_fn is None or type(x.grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"
        return f(x.view(len(x), -1).view(x.shape))

    graph = X.clone().requires_grad_() + 0
    for x, labels in ((X.contiguous(memory_format=torch.channels_last), y), (graph, y.int())):
        found, adv = attack(Net(shallow), x, labels, 0.1)
        assert torch.equal(found, robust) and torch.equal(adv, x_adv) and not adv.requires_grad
    sentences = check_network(model, X, y, 0.1)
    for mode in (torch.inference_mode(), torch.device("meta")):
        with mode:
            assert torch.equal(attack(model, X + 0, y + 0, 0.1)[0], robust)
            assert check_network(model, X, y, 0.1) == sentences
    before, shifted = X.clone(), Net(lambda f, x: f(x - 0.1))
    y = predict(shifted, X)
    found = attack(Net(lambda f, x: f(x.sub_(0.1))), X, y, 0.1)
    assert torch.equal(found[0], attack(shifted, X, y, 0.1)[0]) and torch.equal(X, before)


@every_attack
def test_no_pass_is_larger_than_batch_size(name):
    sizes = set()

    def watched(f, x):
        sizes.add(len(x))
        return f(x)

    ATTACKS[name](Net(watched), X, Y, EPS, batch_size=4, **SHORT[name])
    check_network(Net(watched), X, Y, EPS, batch_size=4)
    assert max(sizes) == 4


@pytest.mark.parametrize("wrap", ["DataParallel", "compile"])
def test_wrapped_networks(trained, wrap):
    """A batch keeps its size, so that torch.compile sees few of them; weights are as they were."""
    model, x, y = trained
    graphs = []

    def backend(graph, _):
        graphs.append(1)
        return graph.forward

    if wrap == "compile":
        torch._dynamo.reset()
        wrapped = torch.compile(model, backend=backend)
    else:
        wrapped = nn.DataParallel(model).eval()
    for name in ("pgd", "apgd-t", "square"):
        found, plain = (ATTACKS[name](m, x, y, EPS, batch_size=16, **SHORT[name])[0] for m in (wrapped, model))
        assert torch.equal(found, plain)
    assert len(graphs) <= 12 and all(w.requires_grad for w in model.parameters())


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an eps of its own."""
    return train("slat", 2, tmp_path_factory.mktemp("run") / "slat", "--eps 2")


def result(cli, flags, path):
    """The JSON of an evaluation, which ends well, and what it printed."""
    code, out, err = cli(eval_attacks, f"{flags} --json {path}")
    assert code == 0, err
    return json.loads(path.read_text()), out, err


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with budgets for tests."""
    for table in (ATTACKS, eval_attacks.AUTOATTACK):
        for name in table.keys() - {"pgd"}:
            monkeypatch.setitem(table, name, functools.partial(table[name], **SHORT[name]))


def test_command_line(cli, run, tiny, tmp_path, short):
    """eps is the run's; every attack is alone on all images; autoattack's parts go on from one another."""
    flags = f"{run} --attack square,pgd,autoattack,fgsm --steps 3 --restarts 2 --n 50"
    found, out, err = result(cli, flags, tmp_path / "r.json")
    assert not err and max(map(len, out.splitlines()[1:])) <= 80
    keys = {"clean", "robust", "attacks", "n", "eps", "seconds", "torch", "device", "command", "training"}
    assert keys <= found.keys() and found["n"] == 50 and found["eps"] == 2
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert found["training"]["seconds"] == sum(line["seconds"] for line in lines)
    assert found["training"]["method"] == "slat" and found["training"]["last_epoch"]["epoch"] == 2
    model, (x, y) = load_model(run), tiny.test(50)
    masks = {name: ATTACKS[name](model, x, y, 2 / 255)[0] for name in ("square", "fgsm")}
    masks["pgd-3-2"] = pgd(model, x, y, 2 / 255, 3, 2)[0]
    before, parts = (), []
    for attack in eval_attacks.AUTOATTACK.values():
        before = attack(model, x, y, 2 / 255, before=before)
        parts.append(eval_attacks.percent(before[0]))
    masks["autoattack"] = before[0]
    assert found["clean"] == eval_attacks.percent(predict(model, x) == y)
    assert found["attacks"] == {name: eval_attacks.percent(mask) for name, mask in masks.items()}
    assert list(found["attacks"]) == ["square", "pgd-3-2", "autoattack", "fgsm"]
    assert list(found["autoattack_parts"].values()) == parts and parts == sorted(parts, reverse=True)
    assert found["robust"] == eval_attacks.percent(torch.stack(list(masks.values())).all(0)) < found["clean"]
    for name in ("best.pt", "checkpoint.pt"):
        assert cli(eval_attacks, f"{run / name} --steps 1 --restarts 1 --n 5")[0] == 0


def test_attacks_are_given_the_flags_and_the_first_to_break_an_image_is_saved(cli, run, tiny, tmp_path, monkeypatch):
    given, place = {}, torch.arange(20)

    def fake(name, n, model, x, y, eps, before, report, **options):
        given[name] = eps, options
        return place % n > 0, x + n / 100

    monkeypatch.setitem(ATTACKS, "pgd", functools.partial(fake, "pgd", 2))
    monkeypatch.setitem(ATTACKS, "square", functools.partial(fake, "square", 3))
    flags = "--eps 4 --steps 3 --restarts 2 --step-size 0.5 --seed 5 --search-precision bf16 --batch-size 7 --n 20"
    found, *_ = result(cli, f"{run} --attack pgd,square {flags} --save-adv {tmp_path / 'adv.npz'}", tmp_path / "r.json")
    options = {"batch_size": 7, "seed": 5, "precision": "bf16"}
    of_pgd = {"steps": 3, "restarts": 2, "step_size": 2 / 255}
    assert given == {"pgd": (4 / 255, options | of_pgd), "square": (4 / 255, options)}
    x, y = tiny.test(20)
    clean = predict(load_model(run), x) == y
    assert found["robust"] == eval_attacks.percent(clean & (place % 2 > 0) & (place % 3 > 0))
    step = torch.where(place % 2 == 0, 2, torch.where(place % 3 == 0, 3, 0)) * clean / 100
    saved = torch.from_numpy(np.load(tmp_path / "adv.npz")["x"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(saved, x + step.view(-1, 1, 1, 1))


@pytest.mark.parametrize("more", [2, 3])
def test_square_breaking_more_than_chance_is_said(cli, run, tmp_path, monkeypatch, more):
    """AutoAttack's threshold: more than one image in 500."""
    calls = []

    def fake(model, x, y, eps, **_):
        calls.append(1)
        return torch.arange(len(y)) >= 10 * (len(calls) > 1) + more * (len(calls) == 4), x  # APGD-T breaks 10

    for name in eval_attacks.AUTOATTACK:
        monkeypatch.setitem(ATTACKS, name, fake)
    x, y = torch.zeros(1000, 3, 8, 8), torch.zeros(1000, dtype=torch.long)
    data = SimpleNamespace(name="", test=lambda _: (x, y), labels={"test": y}, crc32=0)
    monkeypatch.setattr(common, "Data", lambda *_: data)
    found, out, _ = result(cli, f"{run} --attack autoattack", tmp_path / "r.json")
    assert any("Square, which uses no gradients, broke 3 of 1000" in line for line in found["warnings"]) == (more == 3)
    assert ("warning: Square" in out) == (more == 3)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_result(cli, run, tmp_path, short, monkeypatch):
    """Killed after every attack; each is saved once."""
    flags = f"{run} --attack autoattack,pgd --steps 3 --restarts 1 --n 40 --eps 8"
    state, adv = tmp_path / "state.pt", tmp_path / "adv.npz"
    whole = result(cli, f"{flags} --save-adv {adv}", tmp_path / "whole.json")[0]
    plain, kills, file, again = console.write_torch, 0, tmp_path / "file.json", tmp_path / "again.npz"

    def write(path, content):
        plain(path, content)
        raise SystemExit("killed")

    monkeypatch.setattr(console, "write_torch", write)
    while not file.exists():
        code, _, _ = cli(eval_attacks, f"{flags} --state {state} --json {file} --save-adv {again}")
        kills += code == "killed"
    found = json.loads(file.read_text())
    assert kills == 5 and all(found[key] == whole[key] for key in ("attacks", "autoattack_parts"))
    assert np.array_equal(np.load(adv)["x"], np.load(again)["x"])
    (tmp_path / "short.pt").write_bytes(state.read_bytes()[:1000])
    other = torch.load(run / "model.pt")
    other["state_dict"]["fc.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with np.load(TINY) as file:
        np.savez(tmp_path / "other.npz", test_x=file["test_x"], test_y=9 - file["test_y"])
    for mismatch, reason in (
        (f"{flags} --seed 4 --state {state}", "another evaluation (seed was 0 there and is 4 now"),
        (f"{flags} --n 20 --state {state}", "another evaluation (network and images was"),
        (f"{flags} --dataset {tmp_path}/other.npz --state {state}", "another evaluation (network and images was"),
        (f"{tmp_path}/other.pt --dataset {TINY} {flags.partition(' ')[2]} --state {state}", "(network and images was"),
        (f"{flags} --eps 4 --state {state}", "another evaluation (eps was 8.0 there and is 4.0 now"),
        (f"{flags} --step-size 1 --state {state}", "another evaluation (step_size was 0.25 there and is 1.0 now"),
        (f"{flags} --search-precision bf16 --state {state}", "another evaluation (search_precision was fp32 there"),
        (f"{flags} --state {tmp_path}/other.pt", "another evaluation (network and images was None"),
        (f"{flags} --state {tmp_path}/short.pt", "short.pt is damaged"),
    ):
        code, _, err = cli(eval_attacks, mismatch)
        notes = err.count("note: the first 20 test images show 8 of 10 classes\n")
        assert code == 2 and reason in err and err.count("\n") == 1 + notes == 1 + ("--n 20" in mismatch)


def test_adversarial_images_are_saved_as_what_they_are(cli, run, tiny, tmp_path):
    flags = f"{run} --attack pgd,fgsm --steps 5 --restarts 1 --eps 8.5 --n 50 --save-adv {tmp_path / 'adv.npz'}"
    robust = result(cli, flags, tmp_path / "r.json")[0]["robust"]
    with np.load(tmp_path / "adv.npz", allow_pickle=False) as content:
        x_adv, y, adversarial = (torch.from_numpy(content[key]) for key in ("x", "y", "adversarial"))
    x_adv, (x, label) = x_adv.permute(0, 3, 1, 2), tiny.test(50)
    assert x_adv.dtype == torch.float32 and torch.equal(y, label) and adversarial.sum() == 50 - robust / 2
    assert torch.equal(is_adversarial(load_model(run), x, x_adv, y, 8.5 / 255), adversarial)


@pytest.mark.parametrize("flag", ["state", "json", "save-adv"])
def test_a_write_that_fails_after_the_attack_loses_no_number(cli, run, tmp_path, monkeypatch, flag):
    """The table, the other files, and then the error."""
    names = {name: tmp_path / name for name in ("state", "json", "save-adv")}
    plain = console.write_file

    def full(path, content):
        if Path(path) == names[flag]:
            raise OSError(28, "No space left on device", str(path))
        plain(path, content)

    monkeypatch.setattr(console, "write_file", full)
    flags = " ".join(f"--{name} {path}" for name, path in names.items())
    code, out, err = cli(eval_attacks, f"{run} --steps 2 --restarts 1 --n 50 {flags}")
    assert (
        code == 2
        and re.search(r"^pgd-2-1 +\d", out, re.M)
        and {f.name for f in tmp_path.iterdir()} == names.keys() - {flag}
    )
    assert err.endswith(f"eval_attacks.py: error: cannot write {names[flag]}: No space left on device\n")


def test_outputs_are_not_inputs(refused, run, net, tmp_path):
    for flags in (f"{run} --json {run}/metrics.jsonl", f"{run}/best.pt --state {run}/model.pt",
                  f"{run} --json {tmp_path}/a --save-adv {tmp_path}/a", f"{net} --save-adv {tmp_path}/net.py",
                  f"{run} --dataset {tmp_path}/net.py --json {tmp_path}/net.py"):  # fmt: skip
        refused(eval_attacks, flags, "too: name another file")
    folder, data = shutil.copytree(run, tmp_path / "run"), tmp_path / "data.npz"
    data.write_text("images")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dataset": str(data)}))
    refused(eval_attacks, f"{folder} --json {data}", f"{data} is the input {data}, too")
    assert data.read_text() == "images"


def test_a_damaged_config_is_one_line_and_a_damaged_log_a_note(cli, refused, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    flags, config = f"{folder} --steps 1 --restarts 1 --n 20", (folder / "config.json").read_text()
    whole, _, _ = result(cli, flags, tmp_path / "r.json")
    for content in ("", "[1]", '{"eps": 8}', '{"eps": "8", "dataset": "x"}', '{"eps": -1, "dataset": ""}'):
        (folder / "config.json").write_text(content)
        refused(eval_attacks, flags, "config.json is damaged, or not that of a run")
    (folder / "config.json").write_text(config)
    for content in ("{", "[1]", '{"epoch": 1}', "\n".join(["[" * 99_999] * 2)):
        (folder / "metrics.jsonl").write_text(content)
        found, _, err = result(cli, flags, tmp_path / "r.json")
        assert err.startswith("note: ") and "metrics.jsonl is damaged" in err
        assert found["attacks"] == whole["attacks"] and found["training"]["seconds"] is None


def test_images_of_some_classes_only_and_a_small_eps_are_said(cli, run, tmp_path):
    found, _, err = result(cli, f"{run} --steps 1 --restarts 1 --n 20 --eps 0.9", tmp_path / "r.json")
    classes = "note: the first 20 test images show 8 of 10 classes\n"
    assert err == "note: --eps 0.9 is in units of 1/255\n" + classes and found["warnings"][0] in err


NETWORK = """
import torch
from wrn import SHIFT
def make_model():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10 + SHIFT))
twin = make_model
def broken():
    return open("/no/such/file")
def nothing():
    make_model()
def function():
    return make_model().forward
def viewing():
    class View(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 3, padding=1)
        def forward(self, x):
            return self.conv(x).view(len(x), -1)[:, :12]
    return View()
def script():
    return torch.jit.script(make_model())
def frozen():
    return torch.jit.freeze(torch.jit.script(make_model().eval()))
module = make_model()
def tuples():
    class Tuples(torch.nn.Linear):
        def forward(self, x):
            return (x.no_such_thing,)
    return Tuples(1, 1)
"""


@pytest.fixture
def net(tmp_path):
    """A file of a network that imports a wrn.py of its own, with 12 classes."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "wrn.py").write_text("SHIFT = 2")
    return f"--model {tmp_path / 'net.py'}:make_model --dataset {TINY} --n 30 --steps 3 --restarts 1"


WEIGHTS = {
    "by themselves": lambda w: w,
    "of DataParallel": lambda w: {f"module.{key}": value for key, value in w.items()},
    "compiled": lambda w: {"model": {f"_orig_mod.{key}": value for key, value in w.items()}, "epoch": 3},
    "both": lambda w: {"net": {f"_orig_mod.module.{key}": value for key, value in w.items()}},
    "a checkpoint": lambda w: {"state_dict": w, "optimizer": {}},
    "another": lambda w: {"model_state_dict": w, "best_acc": 3.0},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_weights_file(cli, net, tiny, tmp_path, name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 12))
    torch.save(WEIGHTS[name](network.state_dict()), tmp_path / "w.pt", _use_new_zipfile_serialization=name != "both")
    ours = sys.modules["wrn"]
    found, _, err = result(cli, f"{net} --weights {tmp_path / 'w.pt'}", tmp_path / "r.json")
    assert not err and found["training"] is None and found["eps"] == 8 and sys.modules["wrn"] is ours
    x, y = tiny.test(30)
    assert found["clean"] == eval_attacks.percent(predict(network.eval(), x) == y)


def test_a_state_is_not_that_of_an_edited_network(cli, net, tmp_path):
    """The weights are the same, the code is not: what a user edits whose number looked wrong."""
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(3072, 12)).state_dict(), tmp_path / "w.pt")
    flags, file = f"{net} --weights {tmp_path}/w.pt --state {tmp_path}/state.pt", tmp_path / "net.py"
    assert cli(eval_attacks, flags)[0] == cli(eval_attacks, flags)[0] == 0
    code, _, err = cli(eval_attacks, flags.replace("make_model", "twin"))
    assert code == 2 and "another evaluation (model was" in err
    file.write_text(NETWORK.replace("tuples", "pairs"))
    code, _, err = cli(eval_attacks, flags)
    assert code == 2 and "another evaluation (network and images was" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, code that is not run: save the weights by"),
        ({"acc": np.float64(3)}, "multiarray.scalar, code that is not run: save the weights by themselves"),
        (nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, code that is not run: save the weights"),
        ({"1.weight": torch.zeros(12, 5)}, "w.pt does not fit the network: Error(s) in loading state_dict"),
    ],
)
def test_weights_that_do_not_fit(refused, net, tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    refused(eval_attacks, f"{net} --weights {tmp_path / 'w.pt'}", message)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["function", "viewing", "script", "frozen", "module"])
def test_other_kinds_of_networks(cli, net, tmp_path, name):
    assert not result(cli, net.replace("make_model", name), tmp_path / "r.json")[2]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_state_knows_weights_that_are_nowhere_to_be_seen(cli, net, tmp_path):
    """Those of a plain function, and constants of a frozen TorchScript module."""
    for name in ("function", "frozen"):
        flags = f"{net.replace('make_model', name)} --state {tmp_path}/{name}.pt"
        for seed, code in ((0, 0), (0, 0), (1, 2)):
            torch.manual_seed(seed)
            found, _, err = cli(eval_attacks, flags)
            assert found == code and ("another evaluation (network and images was" in err) == bool(code)


def test_errors_in_the_users_code_keep_their_traceback(cli, net):
    with pytest.raises(AttributeError, match="no_such_thing"):
        cli(eval_attacks, net.replace("make_model", "tuples"))
    with pytest.raises(RuntimeError) as error:
        cli(eval_attacks, net.replace("make_model", "broken"))
    assert error.value.__cause__.filename == "/no/such/file"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "no file nowhere"),
        ("{run} --attack cw", "'cw' is not one of apgd-ce, apgd-t, fab-t, square"),
        ("{run} --eps 300", "--eps"),
        ("{run} --eps nan", "--eps"),
        ("{run} --n 0", "--n"),
        ("{run} --device tpu", "no device 'tpu'"),
        ("{run} --dataset nothing.npz", "nothing.npz"),
        ("{run} --json no/such/folder.json", "no/such"),
        ("{run} --save-adv {run}", "it is a folder"),
        ("{run} --state no/such/state.pt", "no/such"),
        ("{run}/config.json", "config.json is damaged"),
        ("", "run"),
        ("--model x.py:f --dataset x", "there is no file 'x.py'"),
        ("--model {py}:make_model", "give --dataset"),
        ("runs/x --model x.py:f", "not allowed with argument"),
        ("runs/x --weights w.pt", "--weights needs --model"),
        ("--model {py}:make_model --weights=", "argument --weights: the value is empty"),
        ("{run} --dataset=", "argument --dataset: the value is empty"),
        ("--model= --dataset x", "argument --model: the value is empty"),
        ("{run} --json=", "argument --json: the value is empty"),
        ("--model {py}:none --dataset x", "there is no 'none' in"),
        ("--model {py}:nothing --dataset x", "nothing returns NoneType, no network: is its return missing?"),
        ("--model {py}:function --weights {run}/model.pt --dataset x", "is method, which loads its weights itself"),
    ],
)
def test_errors_are_one_line(refused, run, net, tmp_path, flags, message):
    refused(eval_attacks, flags.format(run=run, py=tmp_path / "net.py"), message)


def test_a_closed_pipe_loses_no_json(run, tmp_path):
    command = [sys.executable, "eval_attacks.py", str(run), "--n=40", "--steps=1", "--restarts=1"]
    command.append(f"--json={tmp_path / 'r.json'}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read().count("\n") == 1 and process.wait() == 2
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 40


def test_ctrl_c_is_one_line(cli, run, tmp_path, monkeypatch):
    """It names --state if there is one."""
    # Python may handle the signal a moment after raise_signal has returned
    interrupted = lambda *_, **__: (signal.raise_signal(signal.SIGINT), time.sleep(10))  # noqa: E731
    monkeypatch.setitem(ATTACKS, "pgd", interrupted)
    assert cli(eval_attacks, f"{run} --n 40")[::2] == (130, "eval_attacks.py: error: interrupted\n")
    code, _, err = cli(eval_attacks, f"{run} --n 40 --state {tmp_path}/s.pt")
    assert code == 130 and err.endswith(f"interrupted: the same command goes on from {tmp_path}/s.pt\n")
