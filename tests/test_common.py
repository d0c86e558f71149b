import re
import sys

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF

import bookkeeping
import common
import console
import train_fgsm
from conftest import EPS, TINY
from eval_attacks import percent, pgd, predict


def test_schedule_is_torchs_cyclic_lr():
    steps, lr_max = 50, 0.2
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr_max, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.0, lr_max, step_size_up=0.4 * steps, step_size_down=0.6 * steps
    )
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert common.cyclic(step / steps, lr_max) == pytest.approx((group["lr"], group["momentum"]), abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert common.cyclic(0.4, 0.2, momentum_cycle=False) == pytest.approx((0.2, 0.9))


def test_augmentation_is_torchvisions_on_the_same_offsets(tiny):
    n, random = 2000, np.random.Generator(np.random.PCG64([3, 1]))
    order, (top, left), flip = random.permutation(n), random.integers(0, 9, (2, n)), random.random(n) < 0.5
    crops = torch.cat([x for x, _ in tiny.batches(1, 100, 3)])
    images = tiny.train_x[order, 4:-4, 4:-4].permute(0, 3, 1, 2)
    assert {(0, 0), (0, 8), (8, 0), (8, 8)} <= set(zip(top[:500], left[:500]))  # the corners too
    for i in range(500):
        crop = TF.crop(TF.pad(images[i], 4), int(top[i]), int(left[i]), 32, 32)
        assert torch.equal(crops[i], TF.hflip(crop).div(255) if flip[i] else crop.div(255))


def test_images_are_torchvisions_to_tensor_and_statistics_those_of_their_pixels(tiny):
    x, _ = tiny.test(5)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(x[i], TF.to_tensor(tiny.test_x[i].numpy())) for i in range(5))
    x, _ = tiny.train()
    torch.testing.assert_close(torch.tensor(tiny.mean), x.mean((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(tiny.std), x.std((0, 2, 3)), rtol=1e-4, atol=0)
    limited = common.Data(TINY, "data", "cpu", limit_train=50)  # statistics are those of all images nevertheless
    assert (limited.mean, limited.std) == (tiny.mean, tiny.std) and len(limited.train_x) == len(limited.train_y) == 50


def test_an_epoch_shows_every_image_once_and_depends_on_seed_and_epoch_alone(tiny):
    def labels(epoch, seed):
        return torch.cat([y for _, y in tiny.batches(epoch, 100, seed)])

    first = labels(0, 0)
    assert torch.equal(first.bincount(), torch.full((10,), 200))
    torch.manual_seed(5)
    assert torch.equal(first, labels(0, 0))
    assert not torch.equal(first, labels(1, 0)) and not torch.equal(first, labels(0, 1))
    assert sum(len(y) for _, y in tiny.batches(0, 128, 0)) == 1920  # the last partial batch is dropped


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_data_sets_are_read_as_the_npz_is(tiny, monkeypatch, name):
    class Downloaded:
        classes = tiny.classes

        def __init__(self, root, train, download):
            assert root == "somewhere" and download
            images, labels = (tiny.train_x[:, 4:-4, 4:-4], tiny.train_y) if train else (tiny.test_x, tiny.test_y)
            self.data, self.targets = images.numpy(), labels.tolist()

    monkeypatch.setattr(torchvision.datasets, name.upper(), Downloaded)
    data = common.Data(name, "somewhere", "cpu")
    assert data.classes == tiny.classes and data.mean == tiny.mean
    assert torch.equal(data.train_x, tiny.train_x) and torch.equal(data.test_y, tiny.test_y)


def two(score):
    """The logits of two classes."""
    return torch.stack([score, -score], 1)


def test_monitor_counts_fgsm_plainly():
    """A network that reads the label off an FGSM step must show up as FGSM accuracy above clean accuracy."""
    x, y = torch.full((40, 3, 4, 4), 0.5), torch.arange(40) % 2

    def leaky(images):  # wrong on grey; where grey was brightened or darkened, right
        shift = (images - 0.5).mean((1, 2, 3))
        return two(torch.where(shift.abs() > 0.02, -shift * 100, shift))

    result = bookkeeping.monitor(leaky, x, y, 8 / 255, 25)
    assert result["fgsm"] == 100 and result["clean"] == 50


def test_monitor_is_fgsm_and_pgd_10(trained):
    model, x, y = trained
    x = torch.where(x < 0.5, 0, x)  # so many pixels in a corner that the box matters
    found = bookkeeping.monitor(model, x, y, 4 * EPS, 25)
    assert found["fgsm"] == percent(predict(model, train_fgsm.fgsm(model, x, y, 4 * EPS, 4 * EPS)) == y)
    found = bookkeeping.monitor(model, x, y, EPS, 25)
    assert found["pgd10"] == percent(pgd(model, x, y, EPS, 10, 1)[0])


def test_monitor_measures_alignment():
    """Of a linear network it is 1; of one whose gradient at x points along x - 0.3 it is known for every start."""
    x, y, eps = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(30).long(), 0.2
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = ((z - 0.3).flatten(1).double() for z in (x, x + eps * u))
    known = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean().item()
    assert known < 0.98
    for score, expected in ((lambda z: z, 1), (lambda z: (z - 0.3) ** 2, known)):
        found = bookkeeping.monitor(lambda z, score=score: two(score(z).sum((1, 2, 3)) / 50), x, y, eps, 12)
        assert found["alignment"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("clean", "fgsm", "pgd10", "expected"),
    [(50, 32, 30, None), (20, 17, 16, None), (30, 31, 29, None), (80, 9, 0, None), (85, 60, 1, "catastrophic"),
     (80, 40, 10, "catastrophic"), (16, 26, 5, "catastrophic.*label leaking"), (30, 40, 29, "^label leaking"),
     (12, 12, 0, None), (46, 19.6, 0.8, "catastrophic")],
)  # fmt: skip
def test_overfitting_is_recognised(clean, fgsm, pgd10, expected):
    warning = bookkeeping.overfitting({"test_clean": clean, "test_fgsm": fgsm, "test_pgd10": pgd10}, 10)
    assert warning is None if expected is None else re.search(expected, warning)


def test_a_note_clears_the_status_line_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = console.StatusLine()
    line.last -= 1
    line.show("half done")
    console.note("look")
    assert capsys.readouterr().err == "\r\033[K\033[?7lhalf done\033[?7h\r\033[Knote: look\n"
