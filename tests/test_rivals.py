"""SLAT's rivals, each against a slow and obvious version of itself."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchattacks

import common
import train_elle
import train_fgsm
import train_fgsm_ckpt
import train_fgsm_ga
import train_fgsm_rs
import train_free
import train_lap
import train_n_aaer
import train_n_fgsm
import train_nuat
import train_pgd
import train_sora
import train_yopo
import train_zero_grad
from conftest import SCRIPTS, SMALL, parsed, rows, run_main
from console import load_file
from wrn import WideResNet

EPS = 0.05


@pytest.fixture
def boxed(smooth):
    """smooth, with pixels for which the box matters too."""
    model, x, y = smooth
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])
    return model, x, y


def gradient_of(model, x, y):
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    return x.grad


def clip(x_adv, x, eps=EPS):
    """B(x), a number at a time."""
    flat = [min(max(a, b - eps, 0), b + eps, 1) for a, b in zip(x_adv.flatten().tolist(), x.flatten().tolist())]
    return torch.tensor(flat, dtype=x.dtype).view_as(x)


def seeded(function, *args):
    torch.manual_seed(4)
    return function(*args)


def start_noise(x, radius):
    return seeded(lambda: (x + torch.empty_like(x).uniform_(-radius, radius)).clamp(0, 1))


@pytest.fixture
def ffgsm(boxed, monkeypatch):
    """torchattacks' FGSM-RS from the start that ours has from the same seed."""
    model, x, y = boxed
    monkeypatch.setattr(torch, "randn_like", torch.empty_like)  # of which it keeps the shape alone
    return lambda eps, alpha: seeded(torchattacks.FFGSM(model.eval(), eps=eps, alpha=alpha), x, y)


@pytest.mark.parametrize("alpha", [0.02, 1.25 * EPS])
def test_fgsm_rs_is_torchattacks_ffgsm(boxed, ffgsm, alpha):
    torch.testing.assert_close(seeded(train_fgsm_rs.fgsm_rs, *boxed, EPS, alpha), ffgsm(EPS, alpha))


def test_n_fgsm_is_ffgsm_of_twice_eps_without_the_projection(boxed, ffgsm):
    model, x, y = boxed
    x_adv = seeded(train_n_fgsm.n_fgsm, model, x, y, EPS, 2 * EPS)
    torch.testing.assert_close(x_adv.clamp(x - 2 * EPS, x + 2 * EPS), ffgsm(2 * EPS, EPS))
    assert ((x_adv - x).abs() > 2 * EPS).double().mean() > 0.1 and ((x_adv == 0) | (x_adv == 1)).any()
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize(("init", "steps"), [("zero", 7), ("uniform", 7), ("uniform", 1)])
def test_pgd(boxed, init, steps):
    model, x, y = boxed
    x_adv = seeded(train_pgd.pgd, model, x, y, EPS, EPS / 4, steps, init)
    expected = x if init == "zero" else start_noise(x, EPS)
    for _ in range(steps):
        expected = clip(expected + EPS / 4 * gradient_of(model, expected, y).sign(), x)
    torch.testing.assert_close(x_adv, expected)
    if init == "zero":
        attack = torchattacks.PGD(model.eval(), eps=EPS, alpha=EPS / 4, steps=7, random_start=False)
        torch.testing.assert_close(x_adv, attack(x, y))


@pytest.mark.parametrize("q", [0.0, 0.35, 0.45, 1.0])
def test_zero_grad_leaves_out_the_components_below_the_quantile_of_each_image(boxed, q):
    model, x, y = boxed
    start, x_adv = start_noise(x, EPS), []
    for image, gradient in zip(start, gradient_of(model, start, y).numpy()):
        sign = np.where(np.abs(gradient) < np.quantile(np.abs(gradient), q), 0, np.sign(gradient))
        x_adv.append(image + 2 * EPS * torch.from_numpy(sign))
    found = seeded(train_zero_grad.zero_grad, model, x, y, EPS, 2 * EPS, q)
    torch.testing.assert_close(found, clip(torch.stack(x_adv), x))


def test_fgsm_ckpt_trains_on_the_first_point_that_fools(smooth):
    network, *_ = smooth
    torch.manual_seed(1)
    x = torch.rand(40, 3, 6, 6).double()
    for p in network.fc.parameters():
        p.data *= 10
    network.fc.bias.data -= network(x).mean(0).detach()
    clean = network(x).argmax(1)
    y = torch.where(torch.arange(40) % 4 == 0, (clean + 1) % 3, clean)  # every fourth is wrong as it is
    radius = 0.06
    end = seeded(train_fgsm_rs.fgsm_rs, network, x, y, radius, 1.25 * radius)
    expected, chosen = end.clone(), []
    for i in range(40):
        for k in range(4):
            point = x[i] + k / 3 * (end[i] - x[i])
            if network(point[None]).argmax(1) != y[i]:
                break
        chosen.append(k)
        expected[i] = point
    assert set(chosen) == {0, 1, 2, 3} and chosen.count(0) == 10  # every case occurs
    calls = []
    network.register_forward_pre_hook(lambda module, images: calls.append((module.training, len(images[0]))))
    x_adv = seeded(train_fgsm_ckpt.fgsm_ckpt, network, x, y, radius, 1.25 * radius, 3)
    torch.testing.assert_close(x_adv, expected)
    assert torch.equal(x_adv[0], x[0])  # wrong as it is: left clean, to the bit
    # One pass for the direction; then each candidate for those that are still undecided. All in eval mode.
    assert calls == [(False, n) for n in (40, *(sum(k >= j for k in chosen) for j in range(3)))] and network.training


def test_fgsm_ckpt_leaves_statistics_and_modes_as_they_were():
    torch.manual_seed(0)
    x, model = torch.rand(8, 3, 16, 16), WideResNet(10, 1)
    y = model.eval()(x).argmax(1)  # what is right as it is goes to the end of the direction
    model.train()
    model.conv2.eval()  # somebody's frozen BatchNorm
    modes = [module.training for module in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    end = train_fgsm_ckpt.fgsm_ckpt(model, x, y, EPS, EPS, 1)
    assert (end != x).any()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert modes == [module.training for module in model.modules()]
    # The direction is that of the network in eval mode.
    end = seeded(train_fgsm_ckpt.fgsm_ckpt, model.train(), x, y, EPS, EPS, 1)
    assert torch.equal(end, seeded(train_fgsm_rs.fgsm_rs, model.eval(), x, y, EPS, EPS))


class HalfDead(nn.Module):
    """Smooth, and constant in images whose mean is below a half: their gradient is zero."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 3).double()

    def forward(self, x):
        alive = (x.mean((1, 2, 3), keepdim=True) > 0.5).to(x)
        return self.fc(torch.tanh(alive * x).flatten(1) ** 2)


def test_fgsm_ga_is_the_cosine_and_its_gradient():
    torch.manual_seed(0)
    model = HalfDead()
    x = torch.rand(4, 3, 2, 2).double() * 0.2 + 0.7
    x[2] = 0.1
    y = torch.tensor([0, 1, 2, 0])
    constant = gradient_of(model, x, y)
    noisy = seeded(lambda: x + torch.empty_like(x).uniform_(-EPS, EPS))

    def misalignment():
        other = gradient_of(model, noisy, y)
        cosines = [F.cosine_similarity(constant[i].flatten(), other[i].flatten(), dim=0) for i in (0, 1, 3)]
        return 1 - sum(cosines).item() / 3

    x_adv, penalty = seeded(train_fgsm_ga.fgsm_ga, model, x, y, EPS, EPS)
    assert penalty.item() == pytest.approx(misalignment()) and penalty > 0
    torch.testing.assert_close(x_adv, clip(x + EPS * constant.sign(), x))
    weight = model.fc.weight
    (gradient,) = torch.autograd.grad(penalty, weight)
    # Finite differences hold `constant` fixed: the first gradient is not differentiated through.
    for index in [(0, 0), (1, 5), (2, 11), (0, 7)]:
        values = []
        for sign in (1, -1):
            weight.data[index] += sign * 1e-6
            values.append(misalignment())
            weight.data[index] -= sign * 1e-6
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-9)


def test_fgsm_ga_without_any_gradient_is_no_penalty():
    model, x, y = HalfDead(), torch.zeros(2, 3, 2, 2).double(), torch.tensor([0, 1])
    _, penalty = train_fgsm_ga.fgsm_ga(model, x, y, EPS, EPS)
    penalty.backward()
    assert penalty == 1 and model.fc.weight.grad.abs().max() == 0


def test_free_training_is_the_obvious_loop(cli, tmp_path):
    """Three batches, three replays, float32 and no dropout, written out the slow way."""
    flags = f"{SMALL} --limit-train 96 --epochs 1 --replays 3 --lr-max 0.05 --precision fp32 --dropout 0"
    assert cli(train_free, f"{flags} --out {tmp_path}")[0] == 0
    state, data = load_file(tmp_path / "checkpoint.pt"), common.load_data(parsed(train_free, flags))
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, 0.0, data.mean, data.std).to(memory_format=torch.channels_last)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    eps, delta, step, total, right = 8 / 255, 0, 0, 0, 0
    for x, y in data.batches(0, 32, 0):
        for _ in range(3):
            height = (step / 9) / 0.4 if step / 9 < 0.4 else (1 - step / 9) / 0.6
            x_adv = (x + delta).clamp(0, 1).requires_grad_()
            logits = model(x_adv)
            loss = F.cross_entropy(logits, y)
            total, right = total + loss.item() / 9, right + int((logits.argmax(1) == y).sum())
            *grads, slope = torch.autograd.grad(loss, [*model.parameters(), x_adv])
            with torch.no_grad():  # in the order of torch's SGD: what rounds otherwise may flip a ReLU, and then all
                for p, v, g in zip(model.parameters(), velocity, grads):
                    v.mul_(0.9 - 0.1 * height).add_(g.add(p, alpha=5e-4))
                    p.add_(v, alpha=-0.05 * height)
            moved = (x_adv + eps * slope.sign()).detach().maximum(x - eps).minimum(x + eps)
            delta = moved.clamp(0, 1) - x
            step += 1
    # A gradient of about zero may round to either sign, so not bit for bit.
    assert ((state["extra"]["delta"] - delta).abs() < 1e-5).double().mean() > 0.99
    for name, p in model.named_parameters():
        assert (state["state_dict"][name] - p).norm() < 1e-3 * p.norm() + 1e-5, name
    assert state["extra"]["delta"].abs().max() <= eps + 1e-6 and state["rows"][0]["step"] == step == 9
    assert state["rows"][0]["loss"] == pytest.approx(total, rel=1e-3)
    assert state["rows"][0]["train_acc"] == pytest.approx(100 * right / (9 * 32), abs=0.8)  # two images


def test_yopo_gradients_are_autograds():
    """m = n = 2; <p, f_0(x)> is linear in x: its slope is the transposed convolution of p."""
    torch.manual_seed(0)
    x, y, alpha = torch.rand(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3]), EPS / 4
    model = WideResNet(10, 1, 4, dropout=0.0).double()
    seeded(train_yopo.yopo, model, x, y, EPS, alpha, 2, 2)
    x_adv, weight = start_noise(x, EPS), model.conv1.weight
    parameters = dict(model.named_parameters())
    expected = dict.fromkeys(parameters, 0)
    for _ in range(2):
        logits, h = model(x_adv, return_features=True)
        p, *full = torch.autograd.grad(F.cross_entropy(logits, y), [h["conv1"], *parameters.values()])
        for _ in range(2):
            slope = F.conv_transpose2d(p, weight, padding=1) / model.std
            x_adv = clip(x_adv + alpha * slope.sign(), x)
        for name, gradient in zip(parameters, full):
            expected[name] = expected[name] + gradient
        expected["conv1.weight"] += torch.nn.grad.conv2d_weight(
            (x_adv - model.mean) / model.std, weight.shape, p, padding=1
        )
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_yopo_takes_one_step_a_batch_with_lr_over_m(cli, tmp_path, monkeypatch):
    seen, original = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.extend(self.param_groups[0][key] for key in ("lr", "momentum"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert cli(train_yopo, f"{SMALL} --epochs 1 --outer 4 --out {tmp_path / 'run'}")[0] == 0
    rate, momentum = zip(*(common.cyclic(i / 4, 0.2) for i in range(4)))
    assert seen[::2] == pytest.approx([r / 4 for r in rate]) and seen[1::2] == pytest.approx(momentum)


def slow_penalty(model, x, y, alpha, noise, lambdas, loss_gradient):
    """N-AAER's penalty as the paper writes it, an image at a time; (penalty, number of abnormal images)."""
    start, x_adv = start_noise(x, noise), seeded(train_n_fgsm.n_fgsm, model, x, y, alpha, noise)
    drops, v_abnormal, v_normal = [], [], []
    for i in range(len(x)):
        z0, z1 = model(start[[i]])[0].detach(), model(x_adv[[i]])[0]
        l0, l1 = (-F.log_softmax(z, 0)[y[i]] for z in (z0, z1))
        v = ((z0 - z1) ** 2).sum()
        if l0 > l1:
            drops.append(l0 - (l1 if loss_gradient else l1.detach()))
            v_abnormal.append(v)
        else:
            v_normal.append(v.detach())
    if not drops or not v_normal:
        return torch.zeros(()).double(), len(drops)
    drop, abnormal, normal = (sum(values) / len(values) for values in (drops, v_abnormal, v_normal))
    change = abnormal - normal if abnormal > normal else 0 * abnormal
    return lambdas[0] * len(drops) / len(x) * (lambdas[1] * drop + lambdas[2] * change), len(drops)


class Wavy(nn.Module):
    """So curved that a step along the gradient lowers the loss of about every second image."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x):
        return torch.sin(30 * x.flatten(1)) @ self.w.T


@pytest.fixture
def abnormal():
    """(network, x, y)"""
    x = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    return Wavy(), x, torch.arange(8) % 3


@pytest.mark.parametrize("loss_gradient", [False, True])
@pytest.mark.parametrize(
    ("noise", "lambdas"),  # with noise 0.3, the logits of normal images change more
    [(0.2, (1.0, 8.5, 1.5)), (0.3, (1.0, 8.5, 1.5)), (0.2, (0.5, 0.0, 2.0)), (0.2, (2.0, 3.0, 0.0))],
)
def test_n_aaers_penalty_and_its_gradient(abnormal, noise, lambdas, loss_gradient):
    model, x, y = abnormal
    loss, logits = seeded(train_n_aaer.n_aaer, model, x, y, 0.5, noise, *lambdas, loss_gradient)
    penalty, count = slow_penalty(model, x, y, 0.5, noise, lambdas, loss_gradient)
    assert 0 < count < 8 and penalty > 0
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + penalty)
    (found,) = torch.autograd.grad(loss - F.cross_entropy(logits, y), model.w)
    if (lambdas[2] == 0 or noise == 0.3) and not loss_gradient:  # the lambda_2 term of the authors' code is a constant
        assert found.abs().max() < 1e-12
    else:
        torch.testing.assert_close(found, *torch.autograd.grad(penalty, model.w))


def test_n_aaer_has_no_penalty_without_abnormal_or_without_normal_images(abnormal):
    model, x, y = abnormal
    for alpha, expected in ((1e-4, 0), (-1e-4, 8)):  # a step backwards lowers every loss
        loss, logits = seeded(train_n_aaer.n_aaer, model, x, y, alpha, 0.1, 1.0, 8.5, 1.5, True)
        assert slow_penalty(model, x, y, alpha, 0.1, (1.0, 8.5, 1.5), True)[1] == expected
        assert loss == F.cross_entropy(logits, y)


def test_elle_is_fgsm_and_the_formula(boxed):
    model, x, y = boxed
    for p in model.parameters():
        p.data *= 3  # curved enough
    x_adv, error = seeded(train_elle.elle, model, x, y, 0.4)
    torch.testing.assert_close(x_adv, train_fgsm.fgsm(model, x, y, 0.4, 0.4))
    torch.manual_seed(4)
    a, b = ((x + torch.empty_like(x).uniform_(-0.4, 0.4)).clamp(0, 1) for _ in range(2))
    t, total = torch.rand(2, dtype=x.dtype), 0
    for i in range(2):  # an image at a time
        points = (a[i], b[i], (1 - t[i]) * a[i] + t[i] * b[i])
        l_a, l_b, l_c = (-F.log_softmax(model(z[None])[0], 0)[y[i]] for z in points)
        total += (l_c - (1 - t[i]) * l_a - t[i] * l_b) ** 2 / 2
    torch.testing.assert_close(error, total)
    assert error > 1e-8
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(error, parameters), torch.autograd.grad(total, parameters))


def test_elles_lambda_jumps_and_decays_as_by_hand():
    """Errors of 1, 2, 3: no jump, there are too few; 4: above 2 + 2 sqrt(2 / 3), if not by three deviations."""
    errors, found = [1.0, 2.0, 3.0, 4.0, 3.0, 0.1, 20.0, 1.0], []
    state = {key: torch.zeros(()) for key in ("lambda", "count", "mean", "squares")}
    for error in errors:
        state = train_elle.adapt(state, torch.tensor(error), 4000.0, 0.99)
        found.append(state["lambda"].item())
    assert found == pytest.approx([0, 0, 0, 4000, 3960, 3920.4, 4000, 3960])
    assert state["mean"].item() == pytest.approx(np.mean(errors)) and state["count"] == 8
    assert (state["squares"] / 8).sqrt().item() == pytest.approx(np.std(errors), rel=1e-5)


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [("fgsm_ga", "--eps 4", {"ga_lambda": 0.02 * 10**0.5}), ("fgsm_ga", "--eps 8", {"ga_lambda": 0.2}),
     ("fgsm_ga", "--eps 16", {"ga_lambda": 2}), ("fgsm_ga", "--eps 16 --ga-lambda 1", {"ga_lambda": 1}),
     ("zero_grad", "", {"q": 0.35, "alpha": 2}), ("zero_grad", "--dataset cifar100", {"q": 0.45}),
     ("zero_grad", "--dataset data/cifar100.npz", {"q": 0.45}),
     ("zero_grad", "--dataset cifar100/cifar10.npz", {"q": 0.35}),
     ("zero_grad", "--dataset cifar100 --q 0.7", {"q": 0.7}),
     ("n_aaer", "--eps 8", {"lambda_1": 1, "lambda_2": 1.5, "lambda_3": 0.15}),
     ("n_aaer", "--eps 12", {"lambda_2": 5, "lambda_3": 0.55}),
     ("n_aaer", "--eps 16", {"lambda_2": 8.5, "lambda_3": 1.5}),
     ("n_aaer", "--eps 32", {"lambda_2": 2.75, "lambda_3": 0.75}),
     ("n_aaer", "--eps 13 --lambda-2 0", {"lambda_2": 0, "lambda_3": 0.55}),
     ("n_aaer", "--eps 8 --dataset cifar100", {"lambda_2": 1.5, "lambda_3": 0.15}),
     ("n_aaer", "--eps 16 --dataset cifar100", {"lambda_2": 6, "lambda_3": 0.5}),
     ("fgsm", "", {"epochs": 30, "batch_size": 128, "lr_max": 0.2}),
     ("lap", "--eps 8", {"beta": 0.001}), ("lap", "--eps 12", {"beta": 0.002}), ("lap", "--eps 16", {"beta": 0.005}),
     ("lap", "--eps 25", {"beta": 0.75}), ("lap", "--eps 9 --noise 0 --beta 0.1", {"beta": 0.1}),
     ("lap", "--eps 8 --noise 0", {"beta": 0.001}),
     ("elle", "", {"elle_lambda": 4000}), ("elle", "--eps 16", {"elle_lambda": 4000}),
     ("elle", "--constant", {"elle_lambda": 1000}), ("elle", "--constant --eps 10", {"elle_lambda": 5000}),
     ("elle", "--constant --eps 20", {"elle_lambda": 5000}), ("elle", "--constant --eps 24", {"elle_lambda": 10000}),
     ("elle", "--constant --elle-lambda 7", {"elle_lambda": 7})],
)  # fmt: skip
def test_defaults_follow_eps_and_data_set(capsys, script, flags, expected):
    args = vars(parsed(SCRIPTS[script], flags))
    assert {key: args[key] for key in expected} == pytest.approx(expected)
    assert all((key in args["not_default"]) == (key.replace("_", "-") in flags) for key in expected)
    note = "note: taking the authors' beta for eps {} and --noise 2: they name none, or another, for these\n"
    notes = {"--eps 13 --lambda-2 0": "note: the authors name no lambdas for eps 13: taking those for eps 12\n"}
    notes |= {"--eps 25": note.format(32), "--eps 8 --noise 0": note.format(8)}
    assert capsys.readouterr().err == notes.get(flags, "")


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_laps_weights_move_as_by_a_step_of_a_copy(boxed, steps_before, sign):
    """A copy of network and optimiser takes the step; the difference, scaled, is what LAP adds."""
    model, x, y = boxed
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.8, weight_decay=0.01)
    for _ in range(steps_before):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    _, gradients = seeded(train_lap.lap, model, x, y, 0.1, 0.1, 0.2)
    copied = copy.deepcopy(model)
    other = torch.optim.SGD(copied.parameters(), 0.1, 0.8, weight_decay=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    F.cross_entropy(copied(start_noise(x, 0.2)), y).backward()
    other.step()
    state = copy.deepcopy(optimizer.state_dict())
    train_lap.nudge(model, gradients, optimizer, sign * 0.05)
    assert str(optimizer.state_dict()) == str(state) and all(w.grad is None for w in model.parameters())
    k = 0
    for name, old in before.items():
        expected = old
        if name.endswith("weight"):
            k += 1
            step = copied.state_dict()[name] - old
            expected = old + sign * 0.05 * (1 - (math.log(k) / math.log(3)) ** 0.3) * old.norm() / step.norm() * step
        torch.testing.assert_close(model.state_dict()[name], expected)
    assert k == 3


@pytest.mark.parametrize("project", [False, True])
def test_laps_images_are_n_fgsms_or_are_projected(boxed, project):
    model, x, y = boxed
    x_adv, gradients = seeded(train_lap.lap, model, x, y, 0.05, 0.1, 0.08, project)
    expected = seeded(train_n_fgsm.n_fgsm, model, x, y, 0.1, 0.08)
    assert torch.equal(x_adv, torch.clamp(expected, x - 0.05, x + 0.05) if project else expected)
    assert list(gradients) == [name for name, w in model.named_parameters() if w.dim() > 1]


def test_laps_second_pass_sees_the_moved_weights_under_autocast_too(tmp_path, monkeypatch):
    """Autocast keeps its bfloat16 copies of weights until it ends."""

    def to_zero(model, *_):
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.zero_()

    monkeypatch.setattr(train_lap, "nudge", to_zero)
    flags = f"{SMALL} --precision bf16 --epochs 1 --limit-train 32 --lr-max 0.01 --out {tmp_path / 'run'}"
    assert run_main(train_lap, flags) == 0
    (row,) = rows(tmp_path / "run")
    assert row["loss"] == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize(
    ("v", "absolute", "alpha"), [(0.99, False, 0.2), (0.9, False, 0.04), (0.5, True, 0.04), (1.0, False, 0.2)]
)
def test_soras_step_shrinks_with_v(boxed, v, absolute, alpha):
    """eps 0.1: at most 2 eps; else 2 eps times 0.02 / (1 - v), or 0.02 / (1 - v) itself."""
    model, x, y = boxed
    x_adv, gradient = seeded(train_sora.sora, model, x, y, 0.1, torch.tensor(v).double(), 0.02, absolute)
    start = start_noise(x, 0.1)
    torch.testing.assert_close(gradient, gradient_of(model, start, y))
    torch.manual_seed(4)
    torch.empty_like(x).uniform_()
    length = alpha * torch.rand_like(x)
    torch.testing.assert_close(x_adv, (start + length * gradient.sign()).clamp(0, 1))


def test_soras_v_is_a_running_mean_of_the_share_that_keeps_its_sign():
    before = torch.tensor([[1.0, -2.0, 1.0], [3.0, 0.0, 1.0]]).view(2, 3, 1, 1)
    after = torch.tensor([[1.0, -1.0, -1.0], [2.0, 9.0, 2.0]]).view(2, 3, 1, 1)  # 1/4 and 4/4
    v = train_sora.agreement(torch.tensor(0.99), before, after)
    assert v == pytest.approx(0.95 * 0.99 + 0.05 * (0.25 + 1) / 2)
    assert train_sora.agreement(v, before, -9 * before) == pytest.approx(0.95 * v - 0.05)


@pytest.mark.parametrize(("weight", "nuclear"), [(4.5, True), (4.5, False), (0, True)])
def test_nuat_is_clean_training_with_the_norm_of_what_its_attack_changes(boxed, weight, nuclear):
    """The norm by numpy's singular values, its gradient by differences; only the attack is in eval mode."""
    model, x, y = boxed
    model = nn.Sequential(nn.BatchNorm2d(3).double(), model)
    with torch.no_grad():
        model(x)  # statistics of its own
    loss, logits = seeded(train_nuat.nuat, copy.deepcopy(model).train(), x, y, EPS, weight, nuclear)

    def norm(a, b):
        return np.linalg.svd((a - b).detach().numpy(), compute_uv=False).sum()

    start = (x + EPS / 2 * (seeded(torch.rand_like, x) - 0.5).sign()).clamp(0, 1)
    clean = model.train()(x)
    attacked = copy.deepcopy(model).eval()  # with the statistics of the clean pass, too

    def objective(point):
        penalty = norm(clean, attacked(point)) if nuclear else 0
        return F.cross_entropy(attacked(point), y).item() + weight * penalty / len(x)

    gradient, h = torch.zeros_like(x), 1e-6
    for i in range(x.numel()):
        step = torch.zeros_like(x).flatten()
        step[i] = h
        step = step.view_as(x)
        gradient.view(-1)[i] = (objective(start + step) - objective(start - step)) / (2 * h)
    x_adv = clip(start + EPS * gradient.sign(), x)
    expected = F.cross_entropy(clean, y) + weight * norm(clean, model(x_adv)) / len(x)
    torch.testing.assert_close(logits, clean)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
