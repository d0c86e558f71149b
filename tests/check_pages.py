"""Code and tables of docs/ that stand for code of the project: executed, and compared with it."""

import ast
import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import eval_attacks
from conftest import EPS, SCRIPTS, SMALL, run_main
from paper.results import METHODS


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


ALSO = ("adapt", "nudge", "agreement")  # second functions
LISTED = [method for method in METHODS if method in SCRIPTS]  # not a fork's train_mine.py


def rows():
    """The table of docs/pasting.md: (method, call, loss, constants, those at eps 8, those at eps 16), code only."""
    table = r"^\| \[train_(\w+)\.py\]\(\.\./train_\1\.py\) \|(.*)\|(.*)\|(.*)\|(.*)\|(.*)\|$"
    for method, *cells in re.findall(table, Path("docs/pasting.md").read_text(), re.M):
        yield method, *("\n".join(re.findall("`(.*?)`", cell)) for cell in cells)


def test_every_method_can_be_pasted_by_the_table():
    """Functions and parameters are those of the scripts."""
    assert set(LISTED) <= {method for method, *_ in rows()} <= SCRIPTS.keys()
    for method, call, *_ in rows():
        function = ast.parse(call).body[0].value
        found = inspect.signature(getattr(SCRIPTS[method], function.func.id)).parameters
        empty = inspect.Parameter.empty
        given = [(argument.id, empty) for argument in function.args]
        given += [(keyword.arg, ast.literal_eval(keyword.value)) for keyword in function.keywords]
        assert given == [(name, p.default) for name, p in found.items()]
        assert function.func.id in (method, *ALSO)


@pytest.mark.parametrize("eps", [8, 16])
@pytest.mark.parametrize("method", LISTED)
def test_the_pages_step_is_the_scripts(monkeypatch, method, eps):
    """Call, loss and constants of the table, or a block of the page, give the losses of the script, bit for bit."""
    runs = []

    class Run:  # in place of bookkeeping's: what the script begins with, and its losses
        def __init__(self, args, model, optimizer, data, replays=1, extra=None):
            self.args, self.data, self.replays, self.extra, self.epoch, self.losses = args, data, replays, extra, 1, []
            self.model, self.random = copy.deepcopy(model), torch.get_rng_state()
            runs.append(self)

        def log(self, loss, logits, y):
            self.losses.append(loss.item())

        def end_epoch(self):
            pass

        finish = end_epoch

    monkeypatch.setattr(SCRIPTS[method], "Run", Run)
    lr = 0.02
    monkeypatch.setattr(common, "cyclic", lambda *_: (lr, 0.9))
    flags = f"{SMALL} --precision fp32 --epochs 2 --limit-train 80 --batch-size 8 --eps {eps}"
    assert run_main(SCRIPTS[method], flags) == 0
    (run,) = runs

    (call, loss, *constants), *others = [row for name, *row in rows() if name == method]
    step = f"{call}\nloss = {loss}\noptimizer.zero_grad()\nloss.backward()\noptimizer.step()\n"
    own = [block for block in blocks("docs/pasting.md") if re.search(rf"= {method}\(", block) and "import" not in block]
    before, _, step = own[0].rpartition("\n\n") if own else ("", "", step)
    assert loss in step
    names = {name: getattr(SCRIPTS[method], name) for name in (method, *ALSO) if hasattr(SCRIPTS[method], name)}
    names |= dict(torch=torch, F=F, model=run.model, eps=eps / 255, lr=lr, epoch=1, epochs=2)
    names["optimizer"] = torch.optim.SGD(run.model.parameters(), lr, 0.9, weight_decay=run.args.weight_decay)
    for at_any, at_8, at_16 in (constants, *(row[2:] for row in others)):
        exec(at_any + "\n" + (at_8 if eps == 8 else at_16), names)
    torch.set_rng_state(run.random)
    losses = []
    run.model.train()
    for names["i"], (names["x"], names["y"]) in enumerate(run.data.batches(1, 8, run.args.seed)):
        if not losses:
            exec(before, names)
        exec(step, names)
        losses.append(names["loss"].item())
    assert len(losses) == 10 and losses == run.losses[run.replays - 1 :: run.replays]
    assert method != "elle" or run.extra["lambda"] > 0
