"""SLAT's rivals, each against a slow and obvious version of itself."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchattacks

import common
import train_fgsm_ckpt
import train_fgsm_ga
import train_fgsm_rs
import train_free
import train_n_fgsm
import train_pgd
import train_yopo
from conftest import SMALL
from wrn import WideResNet, load_file

EPS = 0.05


def gradient_of(model, x, y):
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    return x.grad


def clip(x_adv, x, eps=EPS):
    """B(x), a number at a time."""
    flat = [min(max(a, b - eps, 0), b + eps, 1) for a, b in zip(x_adv.flatten().tolist(), x.flatten().tolist())]
    return torch.tensor(flat, dtype=x.dtype).view_as(x)


def start_noise(x, radius, seed):
    torch.manual_seed(seed)
    return (x + torch.empty_like(x).uniform_(-radius, radius)).clamp(0, 1)


def slow_fgsm_rs(model, x, y, alpha, seed):
    start = start_noise(x, EPS, seed)
    step = torch.stack([alpha * gradient_of(model, start[[i]], y[[i]])[0].sign() for i in range(len(x))])
    return clip(start + step, x)


@pytest.mark.parametrize("alpha", [0.02, 1.25 * EPS])
def test_fgsm_rs(smooth, alpha):
    model, x, y = smooth
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])  # the box matters too
    expected = slow_fgsm_rs(model, x, y, alpha, seed=4)
    torch.manual_seed(4)
    torch.testing.assert_close(train_fgsm_rs.fgsm_rs(model, x, y, EPS, alpha), expected)


def test_n_fgsm_leaves_the_ball_and_not_the_box(smooth):
    model, x, y = smooth
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])
    start = start_noise(x, 2 * EPS, seed=4)
    expected = (start + EPS * gradient_of(model, start, y).sign()).clamp(0, 1)
    torch.manual_seed(4)
    x_adv = train_n_fgsm.n_fgsm(model, x, y, EPS, 2 * EPS)
    torch.testing.assert_close(x_adv, expected)
    distance = (x_adv - x).abs()
    assert (distance > EPS).double().mean() > 0.3 and distance.max() <= 3 * EPS + 1e-9
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("init", ["zero", "uniform"])
def test_pgd(smooth, init):
    model, x, y = smooth
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])
    torch.manual_seed(4)
    x_adv = train_pgd.pgd(model, x, y, EPS, EPS / 4, 7, init)
    expected = x if init == "zero" else start_noise(x, EPS, seed=4)
    for _ in range(7):
        expected = clip(expected + EPS / 4 * gradient_of(model, expected, y).sign(), x)
    torch.testing.assert_close(x_adv, expected)
    if init == "zero":
        attack = torchattacks.PGD(model.eval(), eps=EPS, alpha=EPS / 4, steps=7, random_start=False)
        torch.testing.assert_close(x_adv, attack(x, y))


class Counting(nn.Module):
    """Passes everything on to a network and notes the mode and the batch of every call."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, *args, **kwargs):
        self.calls.append((self.training, len(args[0])))
        return self.network(*args, **kwargs)


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
    torch.manual_seed(4)
    end = train_fgsm_rs.fgsm_rs(network, x, y, radius, 1.25 * radius)
    assert network.training
    expected, chosen = end.clone(), []
    for i in range(40):
        for k in range(4):
            point = x[i] + k / 3 * (end[i] - x[i])
            if network(point[None]).argmax(1) != y[i]:
                break
        chosen.append(k)
        expected[i] = point
    assert set(chosen) == {0, 1, 2, 3}  # every case occurs
    assert chosen.count(0) == 10
    model = Counting(network)
    torch.manual_seed(4)
    x_adv = train_fgsm_ckpt.fgsm_ckpt(model, x, y, radius, 1.25 * radius, 3)
    torch.testing.assert_close(x_adv, expected)
    assert torch.equal(x_adv[0], x[0])  # wrong as it is: left clean, to the bit
    assert model.training
    # One pass for the direction; then each candidate for those that are still undecided. All in eval mode.
    undecided = [sum(k >= j for k in chosen) for j in range(3)]
    assert model.calls == [(False, n) for n in (40, *undecided)]


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
    ends = []  # the direction is that of the network in eval mode
    for attack in (lambda: train_fgsm_ckpt.fgsm_ckpt(model.train(), x, y, EPS, EPS, 1),
                   lambda: train_fgsm_rs.fgsm_rs(model.eval(), x, y, EPS, EPS)):  # fmt: skip
        torch.manual_seed(1)
        ends.append(attack())
    assert torch.equal(*ends)


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

    def misalignment(differentiable):
        torch.manual_seed(4)
        noisy = (x + torch.empty_like(x).uniform_(-EPS, EPS)).requires_grad_()
        (other,) = torch.autograd.grad(F.cross_entropy(model(noisy), y), noisy)
        cosines = [F.cosine_similarity(constant[i].flatten(), other[i].flatten(), dim=0) for i in (0, 1, 3)]
        return 1 - sum(cosines) / 3

    model.zero_grad()
    torch.manual_seed(4)
    x_adv, penalty = train_fgsm_ga.fgsm_ga(model, x, y, EPS, EPS)
    torch.testing.assert_close(penalty, misalignment(False))
    torch.testing.assert_close(x_adv, clip(x + EPS * constant.sign(), x))
    assert penalty > 0
    penalty.backward()
    # Finite differences hold `constant` fixed: the first gradient is not differentiated through.
    weight = model.fc.weight
    for index in [(0, 0), (1, 5), (2, 11), (0, 7)]:
        values = []
        for sign in (1, -1):
            weight.data[index] += sign * 1e-6
            values.append(misalignment(False).item())
            weight.data[index] -= sign * 1e-6
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-9)


def test_fgsm_ga_without_any_gradient_is_no_penalty():
    model, x, y = HalfDead(), torch.zeros(2, 3, 2, 2).double(), torch.tensor([0, 1])
    _, penalty = train_fgsm_ga.fgsm_ga(model, x, y, EPS, EPS)
    penalty.backward()
    assert penalty == 1 and model.fc.weight.grad.abs().max() == 0


def test_free_steps_stay_in_ball_and_box(smooth):
    _, x, _ = smooth
    gradient = torch.randn_like(x)
    delta = (torch.rand_like(x) * 2 - 1) * EPS
    x_adv = (x + delta).clamp(0, 1)
    new = train_free.free(x, x_adv, gradient, EPS)
    torch.testing.assert_close(x + new, clip(x_adv + EPS * gradient.sign(), x))


def test_free_training_is_the_obvious_loop(cli, tmp_path, tiny):
    """Three batches, three replays, float32 and no dropout, written out the slow way."""
    flags = f"{SMALL} --limit-train 96 --epochs 1 --replays 3 --precision fp32 --dropout 0 --out {tmp_path / 'run'}"
    assert cli(train_free, flags)[0] == 0
    state = load_file(tmp_path / "run/checkpoint.pt")
    assert state["rows"][0]["step"] == 9

    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, 0.0, tiny.mean, tiny.std).train()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    eps, delta, step = 8 / 255, torch.zeros(32, 3, 32, 32), 0
    small = type(tiny).__new__(type(tiny))
    small.__dict__ = {**tiny.__dict__, "train_x": tiny.train_x[:96], "train_y": tiny.train_y[:96]}
    for x, y in small.batches(0, 32, 0):
        for _ in range(3):
            height = (step / 9) / 0.4 if step / 9 < 0.4 else (1 - step / 9) / 0.6
            x_adv = (x + delta).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(model(x_adv), y)
            *grads, slope = torch.autograd.grad(loss, [*model.parameters(), x_adv])
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, grads):
                    v.copy_((0.9 - 0.1 * height) * v + g + 5e-4 * p if step else g + 5e-4 * p)
                    p -= 0.2 * height * v
            delta = clip(x_adv + eps * slope.sign(), x, eps).detach() - x
            step += 1
    # A gradient of about zero may round to either sign, so not bit for bit.
    assert ((state["extra"]["delta"] - delta).abs() < 1e-5).double().mean() > 0.99
    for name, p in model.named_parameters():
        assert (state["state_dict"][name] - p).norm() < 0.02 * p.norm() + 1e-3, name
    assert state["extra"]["delta"].abs().max() <= eps + 1e-6


def test_yopo_gradients_are_autograds(tmp_path):
    torch.manual_seed(0)
    x, y, alpha = torch.rand(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3]), EPS / 4
    model = WideResNet(10, 1, 4, dropout=0.0).double()
    torch.manual_seed(4)
    loss, _ = train_yopo.yopo(model, x, y, EPS, alpha, 1, 1)
    torch.manual_seed(4)
    d = torch.empty_like(x).uniform_(-EPS, EPS)
    x0 = (x + d).clamp(0, 1)
    logits, h = model(x0, return_features=True)
    parameters = dict(model.named_parameters())
    full = torch.autograd.grad(F.cross_entropy(logits, y), [h["conv1"], *parameters.values()])
    p, full = full[0], dict(zip(parameters, full[1:]))
    # <p, f_0(x)> is linear in x: its slope is the transposed convolution of p.
    slope = F.conv_transpose2d(p, model.conv1.weight, padding=1) / model.std
    x1 = clip(x0 + alpha * slope.sign(), x)
    seen = torch.nn.grad.conv2d_weight((x1 - model.mean) / model.std, model.conv1.weight.shape, p, padding=1)
    for name, parameter in parameters.items():
        expected = full[name] + seen.detach() if name == "conv1.weight" else full[name]
        torch.testing.assert_close(parameter.grad, expected, msg=name)
    # The same p at the same point gives the full network's own weight gradient.
    same = torch.nn.grad.conv2d_weight((x0 - model.mean) / model.std, model.conv1.weight.shape, p, padding=1)
    torch.testing.assert_close(same.detach(), full["conv1.weight"])


def test_yopo_runs_the_network_m_times_and_its_first_layer_n_times_more():
    model = WideResNet(10, 1)
    count = {"conv1": 0, "conv2": 0}
    for name in count:
        getattr(model, name).register_forward_hook(lambda *_, name=name: count.__setitem__(name, count[name] + 1))
    train_yopo.yopo(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), EPS, EPS / 4, outer=5, inner=3)
    assert count == {"conv2": 5, "conv1": 5 * (1 + 3 + 1)}


def test_yopo_takes_one_step_on_the_sum_with_lr_over_m(cli, tmp_path, monkeypatch):
    seen, summed, yopo, original = [], [], train_yopo.yopo, torch.optim.SGD.step

    def step(self, *args, **kwargs):
        group = self.param_groups[0]
        seen.append((group["lr"], group["params"][-1].grad.clone()))
        return original(self, *args, **kwargs)

    def noted(model, *args):
        result = yopo(model, *args)
        summed.append(list(model.parameters())[-1].grad.clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(train_yopo, "yopo", noted)
    assert cli(train_yopo, f"{SMALL} --epochs 1 --outer 4 --out {tmp_path / 'run'}")[0] == 0
    assert len(seen) == len(summed) == 4
    for i, ((lr, gradient), expected) in enumerate(zip(seen, summed)):
        assert lr == pytest.approx(common.cyclic(i / 4, 0.2)[0] / 4) and torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("flags", "expected"), [("4", 0.0632), ("8", 0.2), ("12", 0.632), ("16", 2.0), ("16 --ga-lambda 1", 1)]
)
def test_gradaligns_lambda_follows_eps(monkeypatch, flags, expected):
    monkeypatch.setattr("sys.argv", ["train_fgsm_ga.py", "--eps", *flags.split()])
    args = train_fgsm_ga.parse_args()
    assert args.ga_lambda == pytest.approx(expected, rel=1e-3) and ("ga_lambda" in args.not_default) == ("--" in flags)
