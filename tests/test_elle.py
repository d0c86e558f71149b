import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_elle
import train_fgsm


def test_elle_is_fgsm_and_the_formula(smooth):
    model, x, y = smooth
    for p in model.parameters():
        p.data *= 3  # curved enough
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])  # the box matters too
    torch.manual_seed(4)
    x_adv, error = train_elle.elle(model, x, y, 0.4)
    torch.testing.assert_close(x_adv, train_fgsm.fgsm(model, x, y, 0.4, 0.4))
    torch.manual_seed(4)
    a = (x + torch.empty_like(x).uniform_(-0.4, 0.4)).clamp(0, 1)
    b = (x + torch.empty_like(x).uniform_(-0.4, 0.4)).clamp(0, 1)
    t, total = torch.rand(2, dtype=x.dtype), 0
    for i in range(2):  # an image at a time
        points = (a[i], b[i], (1 - t[i]) * a[i] + t[i] * b[i])
        l_a, l_b, l_c = (-F.log_softmax(model(z[None])[0], 0)[y[i]] for z in points)
        total += (l_c - (1 - t[i]) * l_a - t[i] * l_b) ** 2 / 2
    torch.testing.assert_close(error, total)
    assert error > 1e-8
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(error, parameters), torch.autograd.grad(total, parameters))


class Straight(nn.Module):
    """Its cross-entropy is linear in the image: the logits are log-probabilities, and that of class 0 is linear."""

    def forward(self, x):
        p = -x.flatten(1).mean(1) - 0.1
        return torch.stack([p, torch.log1p(-p.exp())], 1)


def test_no_error_where_the_loss_is_linear():
    x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert train_elle.elle(Straight(), x, torch.zeros(6, dtype=torch.long), 0.2)[1] < 1e-24
    assert train_elle.elle(Straight(), x, torch.ones(6, dtype=torch.long), 0.2)[1] > 1e-12


def test_lambda_jumps_and_decays_as_by_hand():
    """Errors of 1, 2, 3: no jump, there are too few; 3: within two deviations of 2; 5: above 2.25 + 2 sqrt(0.6875)."""
    errors = [1.0, 2.0, 3.0, 3.0, 5.0, 5.0, 0.1, 20.0, 1.0]
    expected, value = [], 0.0
    for i, error in enumerate(errors):
        before = errors[:i]
        jump = i >= 3 and error > np.mean(before) + 2 * np.std(before)
        value = 4000.0 if jump else 0.99 * value
        expected.append(value)
    assert expected == pytest.approx([0, 0, 0, 0, 4000, 3960, 3920.4, 4000, 3960])
    state = {key: torch.zeros(()) for key in ("lambda", "count", "mean", "squares")}
    found = []
    for error in errors:
        state = train_elle.adapt(state, torch.tensor(error), 4000.0, 0.99)
        found.append(state["lambda"].item())
    assert found == pytest.approx(expected)
    assert state["mean"].item() == pytest.approx(np.mean(errors)) and state["count"] == 9
    assert (state["squares"] / 9).sqrt().item() == pytest.approx(np.std(errors), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", 4000), ("--constant", 1000), ("--constant --eps 10", 5000), ("--constant --eps 20", 5000),
     ("--constant --eps 24", 10000), ("--constant --elle-lambda 7", 7), ("--eps 16", 4000)],
)  # fmt: skip
def test_lambda_follows_eps(monkeypatch, flags, expected):
    monkeypatch.setattr("sys.argv", ["train_elle.py", *flags.split()])
    assert train_elle.parse_args().elle_lambda == expected
