import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_n_aaer
import train_n_fgsm
from conftest import SMALL, assert_same
from wrn import load_file


def slow_penalty(model, x, y, alpha, noise, lambdas, loss_gradient, seed):
    """The penalty as the paper writes it, an image at a time; (penalty, number of abnormal images)."""
    torch.manual_seed(seed)
    start = (x + torch.empty_like(x).uniform_(-noise, noise)).clamp(0, 1)
    torch.manual_seed(seed)
    x_adv = train_n_fgsm.n_fgsm(model, x, y, alpha, noise)
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
    mean = [sum(values) / len(values) for values in (drops, v_abnormal, v_normal)]
    change = mean[1] - mean[2]
    terms = lambdas[1] * mean[0] + lambdas[2] * (change if change > 0 else 0 * change)
    return lambdas[0] * len(drops) / len(x) * terms, len(drops)


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
@pytest.mark.parametrize("lambdas", [(1.0, 8.5, 1.5), (0.5, 0.0, 2.0), (2.0, 3.0, 0.0)])
def test_the_penalty_and_its_gradient(abnormal, lambdas, loss_gradient):
    model, x, y = abnormal
    alpha, noise = 0.5, 0.2
    torch.manual_seed(4)
    loss, logits = train_n_aaer.n_aaer(model, x, y, alpha, noise, *lambdas, loss_gradient)
    penalty, count = slow_penalty(model, x, y, alpha, noise, lambdas, loss_gradient, seed=4)
    assert 0 < count < 8 and penalty > 0
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + penalty)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss - F.cross_entropy(logits, y), parameters)
    if lambdas[2] == 0 and not loss_gradient:  # the lambda_2 term of the authors' code is a constant
        assert all(g.abs().max() < 1e-12 for g in found)
    else:
        torch.testing.assert_close(found, torch.autograd.grad(penalty, parameters))


def test_no_penalty_without_abnormal_or_without_normal_images(abnormal):
    model, x, y = abnormal
    for alpha, expected in ((0.0, 0), (1e-4, 0), (-1e-4, 8)):  # a step backwards lowers every loss
        torch.manual_seed(4)
        loss, logits = train_n_aaer.n_aaer(model, x, y, alpha, 0.1, 1.0, 8.5, 1.5, True)
        assert slow_penalty(model, x, y, alpha, 0.1, (1.0, 8.5, 1.5), True, seed=4)[1] == expected
        assert loss == F.cross_entropy(logits, y)


def test_without_lambdas_it_is_n_fgsm_bit_for_bit(cli, tmp_path):
    flags = f"{SMALL} --epochs 1 --eps 16 --out {tmp_path}"
    assert cli(train_n_fgsm, f"{flags}/n_fgsm")[0] == 0
    assert cli(train_n_aaer, f"{flags}/n_aaer --lambda-2 0 --lambda-3 0")[0] == 0
    assert_same(load_file(tmp_path / "n_fgsm/model.pt"), load_file(tmp_path / "n_aaer/model.pt"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("8", (1.5, 0.15)), ("12", (5, 0.55)), ("16", (8.5, 1.5)), ("32", (2.75, 0.75)), ("13 --lambda-2 0", (0, 0.55)),
     ("8 --dataset cifar100", (1.5, 0.15)), ("16 --dataset cifar100", (6, 0.5))],
)  # fmt: skip
def test_lambdas_follow_eps_and_data_set(monkeypatch, capsys, flags, expected):
    monkeypatch.setattr("sys.argv", ["train_n_aaer.py", "--eps", *flags.split()])
    args = train_n_aaer.parse_args()
    assert (args.lambda_2, args.lambda_3) == expected and args.lambda_1 == 1
    note = "note: the authors name no lambdas for eps 13: taking those for eps 12\n"
    assert capsys.readouterr().err == (note if flags.startswith("13") else "")
