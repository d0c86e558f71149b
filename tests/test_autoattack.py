"""The attacks of AutoAttack against closed forms, slow reimplementations and torchattacks."""

import copy
import functools
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchattacks
from torchattacks.attacks.fab import projection_linf

import eval_attacks
from conftest import EPS, SHORT, Linear, SmoothNet, parsed
from eval_attacks import ATTACKS, AUTOATTACK, apgd, check_network, is_adversarial, pgd, predict, run

every_attack = pytest.mark.parametrize("name", ATTACKS)


@pytest.fixture
def loop_of(monkeypatch):
    """The generator of an attack, called with one batch, and that batch."""

    def get(attack, model, x, y, eps, best=None, **options):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(eval_attacks, "run", lambda *args, **_: calls.append(args))
            attack(model, x, y, eps, **options)
        (_, _, _, _, loop, steps, *_), low, high = calls[0], (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        noise = functools.partial(eval_attacks.noise, x, torch.arange(len(x)), 0, 0)
        b = SimpleNamespace(x=x, y=y, low=low, high=high, target=None, seed=0, noise=noise)
        return loop(b, best, steps), b

    return get


def images(n, seed=2, size=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 2) for name in ATTACKS), ("apgd-t", 3), ("apgd-t", 4), ("apgd-t", 12)]
)
def test_the_closed_form_of_a_linear_network_is_reached(name, classes, eps):
    """The box cuts the ball to an interval per pixel; the margin to a class is worst at one of its ends."""
    model, x = Linear(classes), images(50)
    y = predict(model, x)
    y[:10] = (y[:10] + 1) % classes  # some are wrong as they are
    expected = predict(model, x) == y
    for target in range(classes):
        direction = (model.w[target] - model.w[y]).detach().view_as(x)
        logits = model(torch.where(direction > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0)))
        expected &= (y == target) | (logits[:, target] <= logits.gather(1, y[:, None])[:, 0])
    options = {"targets": 11} if name == "apgd-t" else {}
    robust, x_adv = ATTACKS[name](model, x, y, eps, batch_size=50, **options)
    assert torch.equal(robust, expected)
    assert is_adversarial(model, x, x_adv, y, eps)[~robust].all()
    assert expected.double().mean() < 0.95


@every_attack
def test_a_verdict_depends_on_the_image_and_holds(trained, name):
    """Neither the batch size nor what else is attacked changes where an image starts and ends."""
    model, x, y = trained
    model, x, y, few = copy.deepcopy(model).double(), x[:32].double(), y[:32], torch.arange(32) % 3 == 0
    robust, x_adv = ATTACKS[name](model, x, y, EPS, **SHORT[name])
    assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
    assert ((x_adv - x).abs() <= EPS + 1e-9).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0 < robust.sum() < (predict(model, x) == y).sum()
    assert torch.equal(ATTACKS[name](model, x, y, EPS, batch_size=5, **SHORT[name])[0], robust)
    some, some_adv = ATTACKS[name](model, x, y, EPS, before=(few, x), **SHORT[name])
    assert torch.equal(some, robust & few)
    torch.testing.assert_close(some_adv[few], x_adv[few])


def test_square_goes_on_from_points_where_a_logit_overflows():
    """Their margin is infinite: one that is kept as the best stays the best."""
    model, x = Linear(4), images(40)
    x = x[x[:, 0, 0, 0] < 0.9]
    y = predict(model, x)

    def overflowing(x):
        logits, bright = model(x), x[:, 0, 0, 0] > 0.9
        other = F.one_hot((logits.argmax(1) + 1) % 4, 4).bool()
        return logits.masked_fill(bright[:, None] & other, torch.inf)

    robust = ATTACKS["square"](model, x, y, 0.1, queries=200)[0]
    assert 0 < robust.sum() < len(x)
    assert torch.equal(ATTACKS["square"](overflowing, x, y, 0.1, queries=200)[0], robust)


@every_attack
def test_one_image_images_that_are_wrong_and_eps_0(name):
    model, x = Linear(4), images(20)
    y = predict(model, x)
    robust, x_adv = ATTACKS[name](model, x[:1], y[:1], EPS, **SHORT[name])
    assert robust.shape == (1,) and x_adv.shape == (1, 3, 2, 2)
    robust, x_adv = ATTACKS[name](model, x, (y + 1) % 4, EPS, **SHORT[name])
    assert not robust.any() and torch.equal(x_adv, x)
    robust, x_adv = ATTACKS[name](model, x, y, 0.0, **SHORT[name])
    assert robust.all() and torch.equal(x_adv, x)


BUDGETS = {
    "pgd": {"steps": 50, "restarts": 10, "step_size": None, "random_start": True},
    "apgd-ce": {"loss": "ce", "steps": 100, "restarts": 1},
    "apgd-t": {"steps": 100, "targets": 9},
    "fab-t": {"steps": 100, "targets": 9, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
    "square": {"queries": 5000, "p": 0.8, "restarts": 1},
}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_budgets_are_the_standard_ones(name):
    """By default; that an image which holds out gets all of it is test_every_survivor_is_attacked_in_full."""
    parameters = inspect.signature(ATTACKS[name]).parameters
    assert {key: parameters[key].default for key in BUDGETS[name]} == BUDGETS[name]


def test_the_command_lines_budget_is_the_standard_one():
    args = parsed(eval_attacks, "nowhere")
    assert (args.steps, args.restarts, args.step_size, args.search_precision, args.seed) == (50, 10, 0.25, "fp32", 0)


def test_dlr_by_hand():
    logits = torch.tensor([[5.0, 1.0, 3.0, 0.0], [2.0, 6.0, 1.0, 4.0]])
    y = torch.tensor([0, 0])
    assert eval_attacks.dlr(logits, y).tolist() == pytest.approx([-2 / 4, 4 / 4])
    assert eval_attacks.dlr(logits, y, torch.tensor([1, 3])).tolist() == pytest.approx([-4 / 4.5, 2 / 4.5])
    assert eval_attacks.dlr(logits[:, :3], y).tolist() == pytest.approx([-2 / 4, 4 / 5])
    assert eval_attacks.dlr(3 * logits + 7, y).tolist() == pytest.approx(eval_attacks.dlr(logits, y).tolist())
    theirs = torchattacks.APGDT(nn.Identity()).dlr_loss_targeted(logits, y, torch.tensor([1, 3]))
    torch.testing.assert_close(eval_attacks.dlr(logits, y, torch.tensor([1, 3])), theirs)


CHECKPOINTS = [0, 22, 41, 57, 70, 80, 87, 93, 99]  # of 100 steps: 0.22, then 0.03 less each time, at least 0.06


def slow_apgd(model, x, y, eps, steps, start):
    """One image, step by step as in Algorithm 1 of Croce & Hein 2020, on the cross-entropy."""

    def f(z):
        z = z.clone().requires_grad_()
        loss = eval_attacks.cross_entropy(model(z), y).sum()
        return float(loss.detach()), torch.autograd.grad(loss, z)[0]

    def clip(z):
        return torch.max(torch.min(z, x + eps), x - eps).clamp(0, 1)

    size, points = 2 * eps, [start]
    best, best_loss, raised, tried = start, f(start)[0], 0, [start]
    last_best, last_size = best_loss, None
    for k in range(steps):
        here = points[-1]
        value, gradient = f(here)
        z = clip(here + size * gradient.sign())
        new = z if k == 0 else clip(here + 0.75 * (z - here) + 0.25 * (here - points[-2]))
        loss = f(new)[0]
        tried.append(new)
        raised += loss > value
        if loss > best_loss:
            best, best_loss = new, loss
        if k + 1 in CHECKPOINTS:
            one = raised < 0.75 * (k + 1 - CHECKPOINTS[CHECKPOINTS.index(k + 1) - 1])
            two = last_size == size and last_best == best_loss
            last_size, last_best, raised = size, best_loss, 0
            if one or two:
                size, new = size / 2, best
        points.append(new)
    return best, torch.cat(tried), size


class Teeth(nn.Module):
    """Its loss rises along its gradient and falls off again and again: APGD often has to go back."""

    def forward(self, x):
        score = torch.frac(10 * x.flatten(1)).mean(1)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize(("model", "shape"), [(SmoothNet(), (3, 3, 6, 6)), (Teeth(), (40, 1, 2, 2))])
def test_apgd_is_algorithm_1(loop_of, model, shape):
    torch.manual_seed(3)
    for p in model.double().eval().parameters():
        p.data = torch.randn_like(p)  # so curved that no point comes to rest in a corner of the ball
    x = torch.rand(shape).double()
    y, eps = predict(model, x), 0.2
    loop, b = loop_of(apgd, model, x, y, eps)
    points, _, bests = zip(*loop)
    assert len(points) == 101
    for i in range(len(x)):
        t = b.noise(*shape[1:])[i : i + 1]
        start = (x[i : i + 1] + eps * t / t.abs().max()).clamp(0, 1)
        best, tried, size = slow_apgd(model, x[i : i + 1], y[i : i + 1], eps, 100, start)
        torch.testing.assert_close(torch.stack(points)[:, i], tried)
        torch.testing.assert_close(bests[-1][i : i + 1], best)
        assert size < 2 * eps / 8
    again = bests[-1]
    first, second = (found[0] for found, _ in zip(loop_of(apgd, model, x, y, eps, again)[0], range(2)))
    assert torch.equal(first, again) and (second - first).abs().max() == pytest.approx(eps / 4)  # it goes on from there


def test_the_projection_is_that_of_torchattacks():
    generator = torch.Generator().manual_seed(0)
    point, w = (torch.rand(300, 50, generator=generator).double() for _ in range(2))
    w = (w - 0.5) * (torch.rand(w.shape, generator=generator) > 0.2)  # some coordinates do not matter
    point[:, :5], point[:, 5:10] = 0, 1  # some are at the edge of the box
    gap = (torch.rand(300, generator=generator).double() - 0.5) * 12  # some planes are out of reach
    gap[0], w[1] = 0, 0
    d = eval_attacks.project_to_plane(point, w, gap)
    theirs = projection_linf(point, w, gap + (w * point).sum(1))
    torch.testing.assert_close(d, theirs, atol=2e-6, rtol=0)
    assert (point + d).min() > -1e-12 and (point + d).max() < 1 + 1e-12
    met = ((w * d).sum(1) - gap).abs() < 1e-5
    assert met.any() and not met.all()


def test_fab_is_its_algorithm_with_torchattacks_projections(loop_of):
    torch.manual_seed(3)
    model, x = SmoothNet().double().eval(), torch.rand(6, 3, 6, 6).double()
    for p in model.parameters():
        p.data = torch.randn_like(p)
    model.fc.bias.data -= model(x).detach().mean(0)  # boundaries are near: some steps cross one, some do not
    y, seen = predict(model, x), set()
    loop, _ = loop_of(eval_attacks.fab, model, x, y, 0.1, alpha_max=0.5)
    point = x
    for _, (tried, _, following) in zip(range(20), loop):
        z = point.clone().requires_grad_()
        gap = eval_attacks.margin(model(z), y)
        here, clean, w = (v.flatten(1) for v in (point, x, torch.autograd.grad(gap.sum(), z)[0]))
        level = (w * here).sum(1) - gap.detach()  # <w, q> at the linearised boundary
        d, d_clean = (projection_linf(v, w, level) for v in (here, clean))
        size, size_clean = (v.abs().amax(1, keepdim=True) for v in (d, d_clean))
        alpha = (size / (size + size_clean)).clamp(max=0.5)
        mixed = (1 - alpha) * (here + 1.05 * d) + alpha * (clean + 1.05 * d_clean)
        torch.testing.assert_close(tried.flatten(1), mixed.clamp(0, 1), atol=1e-5, rtol=0)
        broken = (predict(model, tried) != y).view(-1, 1, 1, 1)
        point = torch.where(broken, x + 0.9 * (tried - x), tried)
        torch.testing.assert_close(following, point)
        seen |= {*zip(broken.flatten().tolist(), (alpha < 0.45).flatten().tolist())}
    assert len(seen) >= 3


def test_square_changes_one_square_a_query_and_keeps_what_raises_the_margin(tiny, trained, loop_of):
    model, (x, y) = trained[0], tiny.test(4)
    loop, b = loop_of(eval_attacks.square, model, x, y, EPS)
    ends = {10: 29, 50: 20, 200: 14, 500: 10}  # the last query with squares of that side, round(sqrt(p) 32)
    seen, before, highest, colours = set(), None, torch.full((4,), -torch.inf), []
    for query, (tried, logits, best) in zip(range(501), loop):
        value = eval_attacks.margin(logits, y)
        assert (((tried - x).abs() - EPS).abs() < 1e-6).logical_or((tried == 0) | (tried == 1)).all()
        bright = tried == b.high
        if not query:  # vertical stripes, whose colours are independent
            assert torch.equal(bright, bright[:, :, :1].expand_as(bright)) and (bright[:, 0] != bright[:, 1]).any()
        if query:
            side = next(side for end, side in ends.items() if query <= end)
            for mask in (tried != before).any(1):
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                if len(rows):
                    assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
                    seen |= {("side", query, len(rows)), ("row", int(rows[-1])), ("column", int(columns[-1]))}
                    square = bright[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(2)
                    if len(rows) == len(columns) == side:
                        assert torch.equal(square, square[:1, :, :1].expand_as(square))
                        colours.append(tuple(square[0, :, 0].tolist()))
            kept = (best == tried).flatten(1).all(1)
            assert torch.equal(kept | (best == before).flatten(1).all(1), torch.ones_like(kept))
            assert (value[kept] >= highest[kept]).all() and (value[~kept] <= highest[~kept]).all()
        before, highest = best, torch.maximum(value, highest)
    assert all(any(("side", q, side) in seen for q in range(end - 9, end + 1)) for end, side in ends.items())
    assert {("row", 31), ("column", 31)} <= seen  # the last ones too
    assert len(set(colours)) == 8 and 0.4 < torch.tensor(colours).double().mean() < 0.6
    best, sides = x, set()  # it goes on with the squares of query 5000
    for _, (tried, _, following) in zip(range(50), loop_of(eval_attacks.square, model, x, y, EPS, best)[0]):
        sides.add(int((tried != best).any(1).any(2).sum(1).max()))
        best = following
    assert max(sides) == 3


def test_rounding_fools_gradients_but_neither_square_nor_the_checks(trained):
    model, x, y = trained[0], *(v[:40] for v in trained[1:])

    def rounded(images):
        """Steps of 1/16 before the network: the gradient is zero nearly everywhere."""
        return model((images * 16).round() / 16)

    by_pgd = ATTACKS["pgd"](rounded, x, y, EPS, **SHORT["pgd"])[0]
    assert eval_attacks.square(rounded, x, y, EPS, queries=200)[0].sum() < by_pgd.sum() - 3
    assert any("cross_entropy is exactly zero" in line for line in check_network(rounded, x, y, EPS))


def test_the_checks_of_a_network(trained):
    model, x, y = trained
    assert check_network(model, x, y, EPS) == []
    (chance,) = check_network(model, x, (y + 1) % 10, EPS)
    assert chance.endswith("% of 60 images are right, as by chance: check weights and labels")
    assert "probabilities" in check_network(nn.Sequential(model, nn.Softmax(1)).eval(), x, y, EPS)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_share_that_is_done_reaches_one_at_the_end(trained, precision):
    """The last batch is a part of one, and in float32 the search in bfloat16 goes on."""
    model, x = trained[:2]
    shares = []
    y, report = predict(model, x), lambda share, robust: shares.append(share)
    pgd(model, x, y, 1e-6, steps=20, restarts=2, batch_size=50, precision=precision, report=report)
    assert max(shares) == shares[-1] == 1 and shares.count(1) == 1


@pytest.mark.parametrize(("precision", "lengths"), [("fp32", [30]), ("bf16", [30, 2])])
def test_every_survivor_is_attacked_in_full(trained, precision, lengths):
    """Every target class, the highest logit first, in batches of one size; with bf16 a twentieth more, in float32."""
    model, x, y = trained
    searches = []

    def loop(b, best, steps):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16" and best is None)
        searches.append((b.x[:, 0, 0, 0].tolist(), b.target.tolist(), b.seed, steps))
        for _ in range(steps):
            yield b.x, F.one_hot(b.y, 10).float(), b.x

    robust, x_adv = run(model, x, y, EPS, loop, 30, 9, True, 16, 5, precision, (y >= 0, x))
    left = robust.nonzero().flatten()
    assert torch.equal(x_adv, x) and len(left) > 16 and torch.equal(robust, predict(model, x) == y)
    ranking, expected = model(x).argsort(1, descending=True), []
    for trial in range(9):
        for part in left.split(16):
            row = x[part, 0, 0, 0].tolist(), ranking[part, trial + 1].tolist(), 5 + trial
            expected += [(*row, length) for length in lengths]
    assert searches == expected


def test_bf16_search_and_float32_search_agree(trained):
    model, x, y = trained[0], *(v[:8] for v in trained[1:])
    for name in AUTOATTACK:
        robust, x_adv = ATTACKS[name](model, x, y, EPS, precision="bf16", **SHORT[name])
        assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
        assert abs(int(robust.sum() - ATTACKS[name](model, x, y, EPS, **SHORT[name])[0].sum())) <= 1


@pytest.fixture
def short(monkeypatch):
    """The parts of autoattack with small budgets."""
    budgets = {"apgd": {"steps": 8, "targets": 3}, "fab": SHORT["fab-t"], "square": SHORT["square"]}
    for name, budget in budgets.items():
        monkeypatch.setattr(eval_attacks, name, functools.partial(getattr(eval_attacks, name), **budget))


def test_autoattack_is_its_four_attacks_in_turn(trained, short):
    """And it says nothing of a network that gives no cause."""
    model, x, y = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robust, x_adv = eval_attacks.autoattack(model, x, y, EPS)
    assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
    found = eval_attacks.apgd(model, x, y, EPS)
    found = eval_attacks.apgd(model, x, y, EPS, loss="dlr-targeted", before=found)
    found = eval_attacks.square(model, x, y, EPS, before=eval_attacks.fab(model, x, y, EPS, before=found))
    assert torch.equal(robust, found[0]) and torch.equal(x_adv, found[1])


def test_autoattack_warns_of_what_makes_its_number_doubtful(trained, short, monkeypatch):
    """Of every network that it meets, not of the first only."""
    model, x, y = trained
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for scale in (1, 2):
            eval_attacks.autoattack(lambda x, scale=scale: (scale * model(x)).softmax(1), x, y, EPS)
    assert sum("remove the softmax" in str(warning.message) for warning in found) == 2
    for name in ("apgd", "fab"):  # as if no gradient led anywhere
        monkeypatch.setattr(eval_attacks, name, lambda model, x, y, *_, **__: (predict(model, x) == y, x))
    with pytest.warns(UserWarning, match="Square, which uses no gradients, broke"):
        eval_attacks.autoattack(model, x, y, EPS)


def test_torchattacks_agrees(trained):
    """Same network, same budget: each component alone, and no survivor of ours falls to theirs but by luck."""
    model, x, y = trained[0], *(v[:24] for v in trained[1:])
    eps = 4 / 255
    theirs = {
        "apgd-ce": (torchattacks.APGD(model, eps=eps, steps=20), {"steps": 20}),
        "apgd-t": (torchattacks.APGDT(model, eps=eps, steps=10, n_classes=10), {"steps": 10}),
        "fab-t": (torchattacks.FAB(model, eps=eps, steps=10, multi_targeted=True, n_classes=10), {"steps": 10}),
        "square": (torchattacks.Square(model, eps=eps, n_queries=200, resc_schedule=False), {"queries": 200}),
    }
    x = x.contiguous()  # else their FAB fails
    for name, (attack, options) in theirs.items():
        robust = ATTACKS[name](model, x, y, eps, **options)[0]
        x_adv = attack(x, y).detach()
        expected = ~is_adversarial(model, x, x_adv, y, eps)
        assert abs(int(robust.sum() - expected.sum())) <= 1, name
        assert (robust != expected).sum() <= 2, name
