import pytest
import torch

import train_zero_grad
from test_rivals import EPS, clip, gradient_of, start_noise


def slow_zero_grad(model, x, y, alpha, q, seed):
    """An image and a component at a time, with the quantile from a sorted list."""
    start, x_adv = start_noise(x, EPS, seed), []
    for i in range(len(x)):
        gradient = gradient_of(model, start[[i]], y[[i]])[0].flatten()
        sizes = sorted(gradient.abs().tolist())
        at = q * (len(sizes) - 1)
        low, high = sizes[int(at)], sizes[min(int(at) + 1, len(sizes) - 1)]
        threshold = low + (at - int(at)) * (high - low)
        signs = [0 if abs(g) < threshold else (g > 0) - (g < 0) for g in gradient.tolist()]
        x_adv.append(start[i] + alpha * torch.tensor(signs, dtype=x.dtype).view_as(x[i]))
    return clip(torch.stack(x_adv), x)


@pytest.mark.parametrize("q", [0.0, 0.35, 0.45, 1.0])
def test_zero_grad(smooth, q):
    model, x, y = smooth
    x[0, 0, 0] = torch.tensor([0, 1, 0.01, 0.99, 0.02, 0.5])  # the box matters too
    torch.manual_seed(4)
    x_adv = train_zero_grad.zero_grad(model, x, y, EPS, 2 * EPS, q)
    torch.testing.assert_close(x_adv, slow_zero_grad(model, x, y, 2 * EPS, q, seed=4))


def test_the_share_that_does_not_move_is_q(trained):
    """In every image alone: a step so small that nothing is clipped moves all components but a share q."""
    model, (x, y) = trained[0], (trained[1].clamp(0.1, 0.9), trained[2])
    for q in (0.2, 0.35, 0.7):
        torch.manual_seed(4)
        start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        torch.manual_seed(4)
        stayed = train_zero_grad.zero_grad(model, x, y, EPS, 1e-5, q) == start.clamp(x - EPS, x + EPS)
        share = stayed.flatten(1).double().mean(1)
        assert share.min() > q - 0.01 and share.max() < q + 0.01


def test_q_follows_the_data_set(monkeypatch):
    for flags, expected in (("", 0.35), ("--dataset cifar100", 0.45), ("--dataset cifar100 --q 0.7", 0.7)):
        monkeypatch.setattr("sys.argv", ["train_zero_grad.py", *flags.split()])
        args = train_zero_grad.parse_args()
        assert args.q == expected and args.alpha == 2
