import json

import pytest
import torch
import torch.nn.functional as F
import torchattacks

import eval_attacks
import train_fgsm
from conftest import SMALL
from eval_attacks import is_adversarial, pgd, predict
from wrn import load_model

EPS = 8 / 255


@pytest.fixture(scope="module")
def trained(tiny):
    """A network that knows something and is partly robust, and 60 test images."""
    torch.manual_seed(0)
    from wrn import WideResNet

    model = WideResNet(10, 1, 10, 0.0, tiny.mean, tiny.std)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for epoch in range(3):
        for x, y in tiny.batches(epoch, 50, 0):
            loss = F.cross_entropy(model(train_fgsm.fgsm(model, x, y, 2 / 255, 2 / 255)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), *tiny.test(60)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(torch.randn(2, 12, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.w.T


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.05, 0.5])
def test_pgd_reaches_the_closed_form_of_a_linear_network(eps):
    """The box cuts the ball to an interval per pixel, and a linear margin is worst at one of its ends."""
    model = Linear()
    x = torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    y = predict(model, x)
    y[:10] = 1 - y[:10]  # some are wrong as they are
    direction = (model.w[1 - y] - model.w[y]).detach().view_as(x)
    worst = torch.where(direction > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0))
    expected = predict(model, worst) == y
    robust, x_adv = pgd(model, x, y, eps, steps=20, restarts=2, batch_size=64)
    assert torch.equal(robust, expected)
    assert is_adversarial(model, x, x_adv, y, eps)[~robust].all()
    assert eps == 0 or expected.double().mean() < 0.94


def test_what_pgd_claims_holds(trained):
    model, x, y = trained
    robust, x_adv = pgd(model, x, y, EPS, steps=10, restarts=2)
    assert 0 < robust.sum() < (predict(model, x) == y).sum()
    assert ((x_adv - x).abs().amax((1, 2, 3)) <= EPS + 1e-6).all() and 0 <= x_adv.min() and x_adv.max() <= 1
    assert ((predict(model, x_adv) != y) == ~robust).all()


def test_pgd_does_at_least_what_fgsm_does(trained):
    model, x, y = trained
    fgsm, x_fgsm = pgd(model, x, y, EPS, steps=1, restarts=1, step_size=EPS, random_start=False)
    robust, x_pgd = pgd(model, x, y, EPS, steps=20, restarts=1, random_start=False)
    assert robust.sum() <= fgsm.sum()
    both = robust & fgsm  # a broken image's attack has ended, so compare the losses of the others
    assert both.sum() > 5
    assert F.cross_entropy(model(x_pgd), y, reduction="none")[both].mean() > (
        F.cross_entropy(model(x_fgsm), y, reduction="none")[both].mean()
    )


def test_survivors_end_where_torchattacks_pgd_ends(trained):
    """Without random start both attacks walk the same path; ours stops early only where it has won."""
    model, x, y = trained
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    robust, x_adv = pgd(model, x, y, EPS, steps=10, restarts=1, random_start=False)
    assert robust.any()
    same = (x_adv[robust] - theirs[robust]).abs() < 1e-6
    assert same.double().mean() > 0.999  # a gradient of about zero may round to either sign
    assert not robust[predict(model, theirs) != y].any()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_change_the_result(trained, batch_size):
    model, x, y = trained
    model = model.double()
    x = x[:20].double()
    robust, x_adv = pgd(model, x, y[:20], EPS, steps=5, restarts=3, batch_size=20)
    other, other_adv = pgd(model, x, y[:20], EPS, steps=5, restarts=3, batch_size=batch_size)
    model.float()
    assert torch.equal(robust, other)
    torch.testing.assert_close(x_adv, other_adv)


def test_the_active_set_is_full_and_spends_no_more_than_it_must(trained):
    """Images times steps, counted: a survivor costs restarts * (steps + 1), a broken one up to where it broke."""
    model, x, y = trained
    calls, bounds = [], []

    def counting(images):
        if torch.is_grad_enabled():
            calls.append(len(images))
        return model(images)

    robust, _ = pgd(counting, x, y, EPS, 5, 4, batch_size=10, report=lambda done, left, _: bounds.append((done, left)))
    survivors = int(robust.sum())
    first = int((predict(model, x) == y).sum())
    assert survivors * 4 * 6 <= sum(calls) < first * 4 * 6
    full = [n == 10 for n in calls]
    assert all(full[: full.index(False)]) and full.index(False) > 0.6 * len(full)
    assert [done for done, _ in bounds] == [sum(calls[: i + 1]) for i in range(len(calls))]
    left = [left for _, left in bounds]
    assert left == sorted(left, reverse=True) and left[-1] == 0


def test_restarts_find_more_and_an_easy_net_is_broken_at_once(trained):
    model, x, y = trained
    accuracy = [int(pgd(model, x, y, EPS, 3, restarts)[0].sum()) for restarts in (1, 5)]
    assert accuracy[1] <= accuracy[0]
    assert int(pgd(model, x, y, 1.0, 5, 1)[0].sum()) == 0


def test_verdicts_are_float32_under_autocast(trained):
    """bfloat16 misjudges some clean images; what counts is the float32 network's word."""
    model, x, y = trained
    with torch.autocast("cpu", torch.bfloat16):
        robust, x_adv = pgd(model, x, y, EPS, steps=5, restarts=1)
    assert ((predict(model, x_adv) != y) == ~robust).all()


def test_a_claim_outside_the_ball_or_the_box_does_not_count():
    def never_right(images):
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    x, y = torch.full((4, 3, 2, 2), 0.5), torch.ones(4, dtype=torch.long)
    x_adv = x + torch.tensor([0.0, 0.1, 0.11, 0.6]).view(4, 1, 1, 1)
    assert is_adversarial(never_right, x, x_adv, y, 0.1).tolist() == [True, True, False, False]
    assert is_adversarial(never_right, x, x_adv, y, 1.0).tolist() == [True, True, True, False]
    assert not is_adversarial(never_right, x, x_adv, 0 * y, 1.0).any()


def test_nothing_to_attack(trained):
    model, x, y = trained
    wrong = (predict(model, x) + 1) % 10
    robust, x_adv = pgd(model, x, wrong, EPS, 2, 1)
    assert not robust.any() and torch.equal(x_adv, x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("run") / "slat"
    command = [sys.executable, "train_slat.py", *SMALL.split(), "--epochs", "2", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def test_command_line(cli, run, tmp_path):
    file, picture = tmp_path / "result.json", tmp_path / "examples.png"
    flags = f"--attack fgsm,pgd --steps 3 --restarts 2 --n 50 --eps 2 --json {file} --examples {picture}"
    code, out, _ = cli(eval_attacks, f"{run} {flags}")
    assert code == 0 and "pgd-3-2" in out
    result = json.loads(file.read_text())
    assert {"clean", "robust", "attacks", "n", "eps", "seconds", "torch", "device", "command"} <= set(result)
    assert result["n"] == 50 and result["eps"] == 2
    assert result["training"]["method"] == "slat" and result["training"]["last_epoch"]["epoch"] == 2
    assert result["robust"] == result["attacks"]["pgd-3-2"] <= result["attacks"]["fgsm"] <= result["clean"]

    model = load_model(run)
    import common

    arrays, classes = common.load_arrays("data/cifar10_tiny.npz", "data")
    x, y = common.Data("", classes, arrays, "cpu").test(50)
    assert result["clean"] == 100 * (predict(model, x) == y).double().mean().item()
    assert max(map(len, out.splitlines()[1:6])) <= 80
    if result["robust"] < result["clean"]:
        assert picture.read_bytes().startswith(b"\x89PNG")

    for name in ("best.pt", "checkpoint.pt"):
        assert cli(eval_attacks, f"{run / name} --steps 1 --restarts 1 --n 5")[0] == 0
    code, out, _ = cli(eval_attacks, f"{run} --individual --attack fgsm,pgd --steps 1 --restarts 1 --n 50")
    assert code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "no file nowhere"),
        ("{run} --attack cw", "'cw' is none of fgsm, pgd"),
        ("{run} --eps 300", "--eps"),
        ("{run} --eps nan", "--eps"),
        ("{run} --n 0", "--n"),
        ("{run} --device tpu", "no device 'tpu'"),
        ("{run} --dataset nothing.npz", "nothing.npz"),
        ("{run} --json no/such/folder.json", "no/such"),
        ("{run}/config.json", "config.json is damaged"),
        ("", "run"),
    ],
)
def test_errors_are_one_line(cli, run, flags, message):
    code, _, err = cli(eval_attacks, flags.format(run=run))
    assert code == 2 and err.count("\n") == 1 and message in err
