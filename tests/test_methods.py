"""The mathematics of the methods, each against something computed another way."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchattacks
import torchvision

import paper.slat_hidden
import train_fgsm
import train_slat
from conftest import SCRIPTS, SMALL, rows
from console import load_file
from paper.fgsm_rs_latent import fgsm_rs_latent
from paper.slat_hidden import HIDDEN, slat_hidden
from wrn import LAYERS, WideResNet

ALL = ("0", "conv1", "conv2")


def loss_of(model, x, y, delta=None):
    return F.cross_entropy(model(x, delta=delta), y)


@pytest.mark.parametrize("name", ALL)
def test_slat_follows_the_sign_of_finite_differences(smooth, name):
    model, x, y = smooth
    eta = 0.01
    x_adv, delta = train_slat.slat(model, x, y, 0.05, ALL, eta, eta, latent_clamp=False)
    delta["0"] = x_adv - x
    with torch.no_grad():
        shape, step = model(x, return_features=True)[1][name].shape, 1e-5
        difference = torch.zeros(shape, dtype=torch.float64)
        for i in range(difference.numel()):
            bump = torch.zeros(shape, dtype=torch.float64)
            bump.view(-1)[i] = step
            plus, minus = loss_of(model, x, y, {name: bump}), loss_of(model, x, y, {name: -bump})
            difference.view(-1)[i] = (plus - minus) / (2 * step)
    clear = difference.abs() > 1e-9  # central differences are good to about 1e-10 here
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(delta[name][clear], eta * difference.sign()[clear])


def falls_fourfold(remainder, scale):
    """Is the remainder of second order: a quarter, where the scale is halved?"""
    values = [remainder(scale / 2**i) for i in range(3)]
    return all(3.6 < a / b < 4.4 for a, b in zip(values, values[1:]))


def test_equation_5_the_loss_rises_by_the_l1_norms_of_the_gradients(smooth):
    model, x, y = smooth
    logits, h = model(x.requires_grad_(), return_features=True)
    clean = F.cross_entropy(logits, y)
    norms = dict(zip(ALL, (g.abs().sum() for g in torch.autograd.grad(clean, [h[k] for k in ALL]))))
    x = x.detach()

    def remainder(eta):
        step = 0.9 * eta
        x_adv, delta = train_slat.slat(model, x, y, eta, ALL, eta, step, latent_clamp=False)
        penalty = step * norms["0"] + eta * (norms["conv1"] + norms["conv2"])
        return (loss_of(model, x_adv, y, delta) - clean - penalty).abs().item()

    assert falls_fourfold(remainder, 0.004)


def test_latent_clamp_keeps_h_plus_delta_in_the_range_of_h(smooth):
    model, x, y = smooth
    free = train_slat.slat(model, x, y, 0.5, ALL, 0.02, 0.5, latent_clamp=False)[1]
    held = train_slat.slat(model, x, y, 0.5, ALL, 0.02, 0.5)[1]
    _, h = model(x, return_features=True)
    for name in ("conv1", "conv2"):
        low, high = h[name].amin((2, 3), keepdim=True), h[name].amax((2, 3), keepdim=True)
        moved, far = h[name] + held[name], h[name] + free[name]
        assert (moved >= low - 1e-12).all() and (moved <= high + 1e-12).all()
        inside = (far >= low) & (far <= high)
        assert 0 < inside.sum() < inside.numel()
        torch.testing.assert_close(held[name][inside], free[name][inside])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_move_by_eta_in_every_precision(trained, tiny, precision):
    """bfloat16 steps by 2 eta between 8 and 16: h + delta must be float32, and so must what goes on."""
    model, (x, y) = copy.deepcopy(trained[0]).train(), tiny.train(8)  # it has no dropout: all passes are equal
    x = x[..., ::2, ::2]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        h = model(x, return_features=True)[1]
        for eps, latent_clamp in ((4 / 255, True), (8 / 255, True), (4 / 255, False), (8 / 255, False)):
            with torch.enable_grad():
                _, delta = train_slat.slat(model, x, y, eps, LAYERS, eps, eps, latent_clamp)
            for name, d in delta.items():
                assert d.dtype == torch.float32 and d.abs().max() <= eps
                moved = model(x, delta={name: d}, return_features=True)[1][name] - h[name].float()
                assert moved.abs().max() <= eps * (1 + 1e-3), name
                if not latent_clamp:
                    assert moved.abs().mean() == pytest.approx(eps, rel=0.01)


def test_slat_and_fgsm_stay_in_the_ball_and_in_the_box_and_see_the_network_as_it_is():
    torch.manual_seed(1)
    x, y, eps = torch.rand(8, 3, 8, 8).round(decimals=1), torch.arange(8), 16 / 255  # with pixels at 0 and 1
    for input_step in (0.9 * eps, 1.5 * eps):
        for attack in (
            lambda model: train_slat.slat(model, x, y, eps, ALL, eps, input_step)[0],  # noqa: B023
            lambda model: train_fgsm.fgsm(model, x, y, eps, input_step),  # noqa: B023
        ):
            model = WideResNet(10, 1)
            x_adv = attack(model)
            assert (x_adv - x).abs().max() <= eps + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
            assert not x_adv.requires_grad and (x_adv != x).double().mean() > 0.8
            assert model.bn.running_mean.any()  # in train mode BatchNorm's statistics follow the attack's passes too


def test_fgsm_rs_with_latent_takes_hidden_gradients_at_x_and_the_inputs_at_a_random_start(smooth):
    model, x, y = smooth
    torch.manual_seed(3)
    x_adv, delta = fgsm_rs_latent(model, x, y, 0.05, ALL, 0.04, 0.0625, False)
    torch.manual_seed(3)
    start = (x + torch.empty_like(x).uniform_(-0.05, 0.05)).clamp(0, 1).requires_grad_()
    step = 0.0625 * torch.autograd.grad(loss_of(model, start, y), start)[0].sign()
    torch.testing.assert_close(x_adv, (start + step).clamp(x - 0.05, x + 0.05).detach())
    known = train_slat.slat(model, x, y, 0.05, ALL, 0.04, 0.01, False)[1]
    assert delta.keys() == known.keys() == {"conv1", "conv2"}
    assert all(torch.equal(delta[name], known[name]) for name in known)


def test_slat_with_other_hidden_steps_differs_from_slat_in_what_is_said_only(smooth):
    model, x, y = smooth
    of_slat = (0.05, ALL, 0.04, 0.03)
    found = {hidden: slat_hidden(model, x, y, *of_slat, True, hidden) for hidden in HIDDEN}
    x_adv, delta = train_slat.slat(model, x, y, *of_slat)
    for hidden in ("label", "none", "random", "predicted"):
        assert torch.equal(found[hidden][0], x_adv), hidden
    assert all(torch.equal(found["label"][1][name], delta[name]) for name in delta) and not found["none"][1]

    free = slat_hidden(model, x, y, *of_slat, False, "random")[1]
    assert all(torch.equal(steps.abs(), torch.full_like(steps, 0.04)) for steps in free.values())
    assert all(abs(steps.sign().mean()) < 0.2 for steps in free.values())

    said = model(x).argmax(1)
    assert not torch.equal(said, y)
    against_said = train_slat.slat(model, x, said, *of_slat)
    for hidden in ("predicted", "everywhere"):
        assert all(torch.equal(found[hidden][1][name], against_said[1][name]) for name in delta), hidden
    assert torch.equal(found["everywhere"][0], against_said[0])

    torch.manual_seed(4)
    x_adv, delta = slat_hidden(model, x, y, *of_slat, True, "noise")
    torch.manual_seed(4)
    start = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1)
    assert all(torch.equal(delta[name], steps) for name, steps in train_slat.slat(model, start, y, *of_slat)[1].items())
    torch.manual_seed(4)
    torch.testing.assert_close(x_adv, SCRIPTS["n_fgsm"].n_fgsm(model, x, y, 0.05, 0.1))


def test_dropout_in_some_epochs_only(cli, tmp_path):
    """The first epoch is that of a run with dropout, to the last bit; a second without it differs."""
    flags = f"{SMALL} --limit-train 64 --monitor 1 --epochs 2 --dropout 0.3 --eps 16"
    runs = {"always": "--dropout-epochs 1-2", "first": "--dropout-epochs 1-1", "second": "--dropout-epochs 2-9"}
    for name, more in (runs | {"never": "--dropout 0"}).items():
        assert cli(paper.slat_hidden, f"{flags} {more} --out {tmp_path / name}")[0] == 0
    assert cli(train_slat, f"{flags} --out {tmp_path / 'slat'}")[0] == 0
    of = {name: rows(tmp_path / name) for name in (*runs, "never", "slat")}
    assert of["always"] == of["slat"] and of["first"][0] == of["slat"][0]
    assert of["second"][0] == of["never"][0] != of["slat"][0]
    assert len({run[1]["loss"] for run in of.values()}) == 4
    for epochs in ("2", "2-1"):
        code, _, err = cli(paper.slat_hidden, f"{flags} --dropout-epochs {epochs} --out {tmp_path / 'x'}")
        assert code == 2 and f"'{epochs}' is not FIRST-LAST, as 1-2" in err
    code, _, err = cli(paper.slat_hidden, f"{flags} --layers 0 --out {tmp_path / 'x'}")
    assert code == 2 and "argument --layers: 0 is not 0, the input, and then hidden layers" in err


def test_fgsm_is_torchattacks_fgsm(smooth):
    model, x, y = smooth
    attack = torchattacks.FGSM(model.eval(), eps=0.03)
    torch.testing.assert_close(train_fgsm.fgsm(model, x, y, 0.03, 0.03), attack(x, y))


def test_slat_with_the_input_alone_is_fgsm(cli, tmp_path):
    """Same images, same masks, same step: the same weights, to the last bit."""
    flags = f"{SMALL} --epochs 1 --eps 8 --out {tmp_path}"
    assert cli(train_fgsm, f"{flags}/fgsm")[0] == 0
    assert cli(train_slat, f"{flags}/slat --layers 0 --input-step 1")[0] == 0
    assert cli(train_slat, f"{flags}/latent --input-step 1")[0] == 0
    fgsm, slat, latent = (load_file(tmp_path / run / "model.pt")["state_dict"] for run in ("fgsm", "slat", "latent"))
    assert all(torch.equal(fgsm[key], slat[key]) for key in fgsm)
    assert not all(torch.equal(fgsm[key], latent[key]) for key in fgsm)


class Residual(torch.nn.Module):
    """b = a + something, so that autograd hands out one tensor as the gradient of both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)

    def forward(self, x, delta=None, return_features=False):
        delta = {"a": 0, "b": 0} | (delta or {})
        a = self.a(x) + delta["a"]
        b = a + self.b(x) + delta["b"]
        logits = self.fc(b.tanh()).mean((2, 3))
        return (logits, {"0": x, "a": a, "b": b}) if return_features else logits


def test_slat_writes_into_no_gradient():
    torch.manual_seed(0)
    model, x, y = Residual(), torch.rand(4, 3, 8, 8), torch.arange(4)
    _, both = train_slat.slat(model, x, y, 0.1, ("a", "b"), 0.3, 0.1)
    for name in both:
        _, one = train_slat.slat(model, x, y, 0.1, (name,), 0.3, 0.1)
        assert torch.equal(both[name], one[name])
    assert not torch.equal(both["a"], both["b"])  # their signs are the same, their ranges are not


def test_features_without_height_and_width_want_no_latent_clamp():
    def tokens(x, return_features):
        h = x.flatten(2)
        return h.tanh().sum(2), {"tokens": h}

    x, y = torch.rand(2, 3, 2, 2, requires_grad=True), torch.tensor([0, 1])
    assert train_slat.slat(tokens, x, y, 0.1, ("tokens",), 0.1, 0.1, False)[1]["tokens"].shape == (2, 3, 4)


def pasting_code(marker):
    """The python block of docs/pasting.md that contains marker."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/pasting.md").read_text(), re.S)
    (block,) = [block for block in blocks if marker in block]
    return block


def test_docs_torchvision_resnet_can_be_trained_with_slat(tiny):
    names = dict(zip("xy", tiny.train(8)))
    exec(pasting_code("class Hooked"), names)
    exec(pasting_code("from train_slat import slat"), names)
    assert names["delta"].keys() == names["layers"].keys()
    with pytest.raises(ValueError, match="unknown layer .'layer9'.: choose from 0, conv1, layer1"):
        names["model"](names["x"], delta={"layer9": 0})
    names["loss"].backward()
    assert all(p.grad.any() for p in names["model"].parameters())


@pytest.mark.parametrize(("network", "layers"), [("resnet18", ["bn1", "layer1.0.bn1"]), ("vgg11", ["features.0"])])
def test_docs_hooks_do_not_mind_a_relu_that_works_in_place(tiny, network, layers):
    names = {}
    exec(pasting_code("class Hooked"), names)
    torch.manual_seed(0)
    model, (x, y), found = getattr(torchvision.models, network)(num_classes=10).eval(), tiny.test(4), []
    for inplace in (True, False):
        for module in model.modules():
            if isinstance(module, (torch.nn.ReLU, torch.nn.ReLU6)):
                assert module.inplace
                module.inplace = inplace
        hooked = names["Hooked"](model, {name: model.get_submodule(name) for name in layers})
        found.append(train_slat.slat(hooked, x, y, 0.03, ["0", *layers], 0.03, 0.03))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == set(layers)
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in layers)
