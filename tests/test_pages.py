"""Code and tables of docs/ that stand for code of the project: executed, and compared with it."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import eval_attacks
from conftest import EPS


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", Path(page).read_text(), re.S)


def textbook():
    (code,) = [code for code in blocks("docs/evaluation.md") if "def pgd_50_10" in code]
    exec(code, names := {})
    return names["pgd_50_10"]


def test_the_textbooks_pgd_is_that_of_the_evaluator(trained, monkeypatch):
    """With its noise, the same images are broken; where none is, so that no batch shrinks, the points are the same."""
    model, x, y = trained
    x, y = F.avg_pool2d(x[:8], 2), y[:8]
    tried, restarts = [], []

    def network(point):
        tried.append(point.detach().clone())
        return model(point)

    def noise(like):  # in [0, 1]
        restarts.append(1)
        return (eval_attacks.noise(like, torch.arange(len(like)), 0, len(restarts) - 1, *like.shape[1:]) + 1) / 2

    monkeypatch.setattr(torch, "rand_like", noise)
    robust = eval_attacks.pgd(model, x, y, EPS)[0]
    assert torch.equal(textbook()(model, x, y, EPS), robust) and len(restarts) == 10
    assert 0 < robust.sum() < (model(x).argmax(1) == y).sum() <= 8
    x, y = x[robust], y[robust]
    restarts.clear()
    textbook()(network, x, y, EPS)
    points = tried[1:]  # after the clean images
    tried.clear()
    eval_attacks.pgd(network, x, y, EPS)
    assert len(points) == 510 and torch.equal(tried.pop(), x)  # judged once more at the end
    assert all(torch.equal(a, b) for a, b in zip(points, tried[-510:]))


def test_the_textbooks_pgd_counts_every_point_that_is_misclassified():
    """Image i is misclassified in pass i alone: all are broken but the one whose pass does not come."""
    passes = iter(range(1000))

    def network(point):
        wrong = F.one_hot(torch.tensor(next(passes)), 512)
        return torch.stack([0.5 + 0 * point.sum((1, 2, 3)), wrong], 1)

    robust = textbook()(network, torch.rand(512, 1, 1, 1), torch.zeros(512, dtype=torch.long), EPS)
    assert robust.tolist() == [False] * 511 + [True]
