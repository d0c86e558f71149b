"""The attacks of AutoAttack against closed forms, slow reimplementations and torchattacks."""

import math

import pytest
import torch
import torch.nn as nn
import torchattacks
from torchattacks.attacks.fab import projection_linf

import eval_attacks
from conftest import EPS, SHORT, Linear, SmoothNet
from eval_attacks import ATTACKS, AUTOATTACK, Apgd, Square, apgd, check_network, is_adversarial, pgd, predict, search

every_attack = pytest.mark.parametrize("name", ATTACKS)


def images(n, seed=2, size=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 2) for name in ATTACKS), ("apgd-t", 3), ("apgd-t", 4), ("apgd-t", 12)]
)
def test_the_closed_form_of_a_linear_network_is_reached(name, classes, eps):
    """The box cuts the ball to an interval per pixel; the margin to a class is worst at one of its ends."""
    model, x = Linear(classes), images(200)
    y = predict(model, x)
    y[:10] = (y[:10] + 1) % classes  # some are wrong as they are
    expected = predict(model, x) == y
    for target in range(classes):
        direction = (model.w[target] - model.w[y]).detach().view_as(x)
        logits = model(torch.where(direction > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0)))
        expected &= (y == target) | (logits[:, target] <= logits.gather(1, y[:, None])[:, 0])
    options = {"targets": 11} if name == "apgd-t" else {}
    robust, x_adv = ATTACKS[name](model, x, y, eps, batch_size=64, **options)
    assert torch.equal(robust, expected)
    assert is_adversarial(model, x, x_adv, y, eps)[~robust].all()
    assert expected.double().mean() < 0.95


@every_attack
def test_claims_hold_whatever_the_batch_size(trained, name):
    model, x, y = trained
    model, x, y = model.double(), x[:30].double(), y[:30]
    verdicts = []
    for batch_size in (1000, 7, 1):
        robust, x_adv = ATTACKS[name](model, x, y, EPS, batch_size=batch_size, **SHORT[name])
        assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
        assert ((x_adv - x).abs() <= EPS + 1e-9).all() and x_adv.min() >= 0 and x_adv.max() <= 1
        verdicts.append(robust)
    model.float()
    assert all(torch.equal(robust, verdicts[0]) for robust in verdicts)
    assert 0 < verdicts[0].sum() < (predict(model, x.float()) == y).sum()


@every_attack
def test_one_image_no_image_and_images_that_are_wrong(trained, name):
    model, x, y = trained
    right = (predict(model, x) == y).nonzero()[:1, 0]
    robust, x_adv = ATTACKS[name](model, x[right], y[right], EPS, **SHORT[name])
    assert robust.shape == (1,) and x_adv.shape == (1, 3, 32, 32)
    assert ATTACKS[name](model, x[:0], y[:0], EPS, **SHORT[name])[0].shape == (0,)
    wrong = (predict(model, x) + 1) % 10
    robust, x_adv = ATTACKS[name](model, x, wrong, EPS, **SHORT[name])
    assert not robust.any() and torch.equal(x_adv, x)
    robust, x_adv = ATTACKS[name](model, x, y, 0.0, **SHORT[name])
    assert torch.equal(robust, predict(model, x) == y) and torch.equal(x_adv, x)


def test_dlr_by_hand():
    logits = torch.tensor([[5.0, 1.0, 3.0, 0.0], [2.0, 6.0, 1.0, 4.0]])
    y = torch.tensor([0, 0])
    assert eval_attacks.dlr(logits, y).tolist() == pytest.approx([-2 / 4, 4 / 4])
    assert eval_attacks.dlr(logits, y, torch.tensor([1, 3])).tolist() == pytest.approx([-4 / 4.5, 2 / 4.5])
    assert eval_attacks.dlr(3 * logits + 7, y).tolist() == pytest.approx(eval_attacks.dlr(logits, y).tolist())
    theirs = torchattacks.APGDT(nn.Identity()).dlr_loss_targeted(logits, y, torch.tensor([1, 3]))
    torch.testing.assert_close(eval_attacks.dlr(logits, y, torch.tensor([1, 3])), theirs)


def test_apgd_checkpoints_by_hand():
    windows = eval_attacks.apgd_checkpoints(100)
    points = [iteration for iteration, window in enumerate(windows) if window]
    assert len(windows) == 101 and points == [22, 41, 57, 70, 80, 87, 93, 99]
    assert points[:5] == [math.ceil(100 * p) for p in (0.22, 0.41, 0.57, 0.70, 0.80)]
    assert [windows[now] for now in points] == [now - before for before, now in zip([0, *points], points)]


def slow_apgd(model, x, y, eps, steps, start):
    """One image, step by step as in Algorithm 1 of Croce & Hein 2020, on the cross-entropy."""

    def f(z):
        z = z.clone().requires_grad_()
        loss = eval_attacks.cross_entropy(model(z), y).sum()
        return float(loss.detach()), torch.autograd.grad(loss, z)[0]

    def clip(z):
        return torch.max(torch.min(z, x + eps), x - eps).clamp(0, 1)

    size, points, windows = 2 * eps, [start], eval_attacks.apgd_checkpoints(steps)
    losses, sizes = [f(start)[0]], [size]
    best, best_loss, raised = start, losses[0], 0
    best_losses, last_best, last_size = [best_loss], best_loss, None
    for k in range(steps):
        here = points[-1]
        value, gradient = f(here)
        z = clip(here + size * gradient.sign())
        new = z if k == 0 else clip(here + 0.75 * (z - here) + 0.25 * (here - points[-2]))
        loss = f(new)[0]
        raised += loss > value
        if loss > best_loss:
            best, best_loss = new, loss
        if windows[k + 1]:
            one = raised < 0.75 * windows[k + 1]
            two = last_size == size and last_best == best_loss
            last_size, last_best, raised = size, best_loss, 0
            if one or two:
                size, new = size / 2, best
        points.append(new)
        best_losses.append(best_loss)
        sizes.append(size)
    return best, best_losses, sizes


def test_apgd_is_algorithm_1():
    torch.manual_seed(3)
    model, x = SmoothNet().double(), images(3, size=6)
    y = predict(model, x)
    eps = 0.02
    attack = Apgd(eps, 100, "ce")
    history = []
    step = attack.step

    def watch(model, s):
        out = step(model, s)
        history.append({key: s[key].clone() for key in ("image", "best_loss", "step_size")})
        return out

    attack.step = watch
    robust, x_adv = search(model, x, y, eps, attack, 1)
    assert robust.all(), "the comparison needs full runs"
    assert len(history) == 101
    for i in range(3):
        t = eval_attacks.noise(x.shape[1:], 0, i, 0).double()
        start = (x[i : i + 1] + eps * t / t.abs().max()).clamp(0, 1)
        best, losses, sizes = slow_apgd(model, x[i : i + 1], y[i : i + 1], eps, 100, start)
        torch.testing.assert_close(x_adv[i : i + 1], best)
        torch.testing.assert_close(torch.stack([h["best_loss"][i] for h in history]), torch.tensor(losses).double())
        torch.testing.assert_close(torch.stack([h["step_size"][i] for h in history]), torch.tensor(sizes).double())
        assert losses == sorted(losses), "the best loss never falls"
        assert sizes[-1] < sizes[0] / 8


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


def test_fab_finds_the_nearest_point_of_a_linear_network():
    """By the closed form, an image at distance r breaks at eps = 1.01 r and not at 0.99 r."""
    model, x = Linear(2), images(50)
    y = predict(model, x)
    for i in range(50):
        w = (model.w[1 - y[i]] - model.w[y[i]]).detach()
        gap = -(w * x[i].flatten()).sum()
        r = float(eval_attacks.project_to_plane(x[i].view(1, -1), w[None], gap[None]).abs().max())
        if r < 0.2:
            assert not eval_attacks.fab(model, x[i : i + 1], y[i : i + 1], 1.01 * r + 1e-6)[0]
            assert eval_attacks.fab(model, x[i : i + 1], y[i : i + 1], 0.99 * r - 1e-6)[0]


def test_the_squares_shrink_as_the_schedule_says():
    side = Square(5000, 0.8, 1, (3, 32, 32), 0).side
    ends = {10: 29, 50: 20, 200: 14, 500: 10, 1000: 7, 2000: 5, 4000: 4, 5000: 3}  # round(sqrt(p) 32)
    assert [int(side[q]) for q in ends if q < 5000] == list(ends.values())[:-1]
    assert [int(side[q + 1]) for q in ends if q < 4000] == list(ends.values())[1:-1]
    assert int(side[4001]) == int(side[4999]) == 3


def test_square_changes_one_square_a_query_and_keeps_what_raises_the_margin(trained):
    model, x, y = trained
    seen = []

    class Watched(Square):
        def step(self, model, s):
            before, value = s["best"].clone(), s["margin"].clone()
            candidate, logits = super().step(model, s)
            assert (s["margin"] >= value).all()
            kept = (s["best"] == candidate).flatten(1).all(1)
            assert torch.equal(kept | (s["best"] == before).flatten(1).all(1), torch.ones_like(kept))
            changed = (candidate != before).any(1)
            for mask, age in zip(changed, s["age"]):
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                if len(rows):
                    side = int(self.side[age])
                    assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
                    seen.append((int(rows[-1]), int(columns[-1]), side))
            edge = ((candidate - s["x"]).abs() - EPS).abs() < 1e-6
            assert (edge | (candidate == 0) | (candidate == 1)).all()
            return candidate, logits

    calls = []

    def count(batch):
        calls.append(len(batch))
        return model(batch)

    x, y = x[:20], y[:20]
    attack = Watched(60, 0.8, 1, x.shape[1:], 0)
    robust, _ = search(count, x, y, EPS, attack, 1)
    assert 60 * robust.sum() < sum(calls[1:]) <= 60 * (predict(model, x) == y).sum() + 20
    assert any(row == 31 for row, _, _ in seen) and any(column == 31 for _, column, _ in seen)  # the last ones too


def test_rounding_fools_gradients_but_neither_square_nor_the_checks(trained):
    model, x, y = trained[0], *(v[:40] for v in trained[1:])

    def rounded(images):
        """Steps of 1/16 before the network: the gradient is zero nearly everywhere."""
        return model((images * 16).round() / 16)

    survivors = {name: ATTACKS[name](rounded, x, y, EPS, **SHORT[name])[0] for name in ("pgd", "fab-t")}
    survivors["square"] = eval_attacks.square(rounded, x, y, EPS, queries=200)[0]
    assert survivors["square"].sum() < survivors["pgd"].sum() - 3
    assert any("gradient is exactly zero" in line for line in check_network(rounded, x, y, EPS))
    (line,) = eval_attacks.check_survivors(survivors)
    more = int((survivors["pgd"] & survivors["fab-t"] & ~survivors["square"]).sum())
    assert f"broke {more} of 40 images that pgd, fab-t could not" in line
    assert (predict(rounded, x) == y).sum() > survivors["square"].sum()


def test_saturated_logits_fool_the_cross_entropy_but_not_dlr(trained):
    model, x, y = trained[0], *(v[:40] for v in trained[1:])
    plain = apgd(model, x, y, EPS, "dlr", steps=20)[0]

    def scaled(images):
        """Logits so large that the cross-entropy of a correct image rounds to zero."""
        return 1e4 * model(images)

    assert pgd(scaled, x, y, EPS, 20, 1, random_start=False)[0].sum() > plain.sum() + 3
    assert torch.equal(apgd(scaled, x, y, EPS, "dlr", steps=20)[0], plain)
    assert any("gradient is exactly zero" in line for line in check_network(scaled, x, y, EPS))


def test_the_checks_of_a_network(trained):
    model, x, y = trained
    assert check_network(model, x, y, EPS) == []
    assert "probabilities" in check_network(nn.Sequential(model, nn.Softmax(1)).eval(), x, y, EPS)[0]
    noisy = check_network(nn.Sequential(nn.Dropout(0.5), model), x, y, EPS)
    assert "train mode" in noisy[0] and "randomised" in noisy[1]
    model.eval()
    linear = Linear(4).eval()
    (few,) = check_network(linear, images(9), predict(linear, images(9)), EPS)
    assert few == "4 classes: the targeted attacks take 3 targets instead of 9"
    kept = torch.tensor([True, True, False])
    assert (
        eval_attacks.check_survivors({"square": kept})
        == eval_attacks.check_survivors({"pgd": kept, "square": kept})
        == []
    )
    thousand = torch.arange(1000)
    assert eval_attacks.check_survivors({"pgd": thousand >= 0, "square": thousand >= 2}) == []
    assert "broke 3 of 1000 images" in eval_attacks.check_survivors({"pgd": thousand >= 0, "square": thousand >= 3})[0]


@pytest.mark.parametrize(("precision", "length"), [("fp32", 9), ("bf16", 10)])
def test_every_survivor_was_attacked_in_full(trained, precision, length):
    """Iterations of survivors, counted, by target class; with bf16 a twentieth more, in float32."""
    model, x, y = trained
    attack, steps = Apgd(EPS, 8, "dlr-targeted"), []
    inner = attack.step

    def watch(model, s):
        late = s["age"] >= 9
        assert late.all() or not late.any()
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16" and not late.any())
        steps.extend(zip(s["image"].tolist(), s["target"].tolist()))
        return inner(model, s)

    attack.step = watch
    robust, _ = search(model, x, y, EPS, attack, 9, batch_size=16, precision=precision)
    assert robust.any()
    ranking = model(x).argsort(1, descending=True)
    for image in robust.nonzero().flatten().tolist():
        targets = [target for i, target in steps if i == image]
        assert all(targets.count(target) == length for target in range(10) if target != y[image])
        assert len(targets) == 9 * length
        # They begin in the order of the logits of the clean image.
        assert list(dict.fromkeys(targets)) == ranking[image, 1:].tolist()


def test_bf16_search_and_float32_search_agree(trained):
    model, x, y = trained
    for name in AUTOATTACK:
        robust, x_adv = ATTACKS[name](model, x, y, EPS, precision="bf16", **SHORT[name])
        assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
        assert abs(int(robust.sum() - ATTACKS[name](model, x, y, EPS, **SHORT[name])[0].sum())) <= 2


@every_attack
def test_resuming_from_any_saved_state_changes_nothing(trained, name, monkeypatch):
    model, x, y = trained
    saved = []

    def save(state):
        sets = [{key: value.clone() for key, value in s.items()} for s in state["sets"]]
        saved.append(state | {"robust": state["robust"].clone(), "x_adv": state["x_adv"].clone(), "sets": sets})

    monkeypatch.setattr(eval_attacks, "SAVE_EVERY", 0)
    options = {**SHORT[name], "batch_size": 13, "precision": "bf16"}
    robust, x_adv = ATTACKS[name](model, x, y, EPS, **options, save=save)
    assert saved
    for state in saved[:: max(len(saved) // 3, 1)]:
        again, again_adv = ATTACKS[name](model, x, y, EPS, **options, resume=state)
        assert torch.equal(again, robust) and torch.equal(again_adv, x_adv)


def test_autoattack_is_its_four_attacks_in_turn(trained, monkeypatch):
    model, x, y = trained
    for name in AUTOATTACK:
        plain = ATTACKS[name]
        monkeypatch.setitem(ATTACKS, name, lambda *a, plain=plain, name=name, **k: plain(*a, **SHORT[name], **k))
    robust, x_adv = eval_attacks.autoattack(model, x, y, EPS)
    assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
    left = torch.arange(len(y))
    for name in AUTOATTACK:
        left = left[ATTACKS[name](model, x[left], y[left], EPS)[0]]
    assert left.tolist() == robust.nonzero().flatten().tolist()


def test_torchattacks_agrees(trained):
    """Same network, same budget: each component alone, and no survivor of ours falls to theirs but by luck."""
    model, x, y = trained[0], *(v[:40] for v in trained[1:])
    eps = 4 / 255
    theirs = {
        "apgd-ce": (torchattacks.APGD(model, eps=eps, steps=30), {"steps": 30}),
        "apgd-t": (torchattacks.APGDT(model, eps=eps, steps=15, n_classes=10), {"steps": 15}),
        "fab-t": (torchattacks.FAB(model, eps=eps, steps=15, multi_targeted=True, n_classes=10), {"steps": 15}),
        "square": (torchattacks.Square(model, eps=eps, n_queries=300, resc_schedule=False), {"queries": 300}),
    }
    x = x.contiguous()  # else their FAB fails
    for name, (attack, options) in theirs.items():
        robust = ATTACKS[name](model, x, y, eps, **options)[0]
        x_adv = attack(x, y).detach()
        expected = ~is_adversarial(model, x, x_adv, y, eps)
        assert abs(int(robust.sum() - expected.sum())) <= 1, name
        assert (robust != expected).sum() <= 2, name
