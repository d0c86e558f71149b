import pytest
import torch
import torch.nn.functional as F

import common
from eval_attacks import load_model
from wrn import LAYERS, WideResNet, dropout


def test_wrn_28_10_has_the_papers_size_and_depth_is_6n_plus_4():
    with torch.device("meta"):
        model = WideResNet(28, 10)
    assert sum(p.numel() for p in model.parameters()) == 36_479_194  # 36.5 M, Zagoruyko & Komodakis, table 4
    for depth in (4, 12, 27):
        with pytest.raises(ValueError, match="6n"):
            WideResNet(depth)


def test_the_forward_pass_written_out():
    torch.manual_seed(0)
    model, x = WideResNet(16, 2).eval(), torch.rand(2, 3, 8, 8)
    h = model.conv1((x - 0.5) / 0.25)
    for block in (*model.conv2, *model.conv3, *model.conv4):
        activated = F.relu(block.bn1(h))  # which the shortcut reads too
        out = block.conv2(F.relu(block.bn2(block.conv1(activated))))
        h = out + (h if block.shortcut is None else block.shortcut(activated))
    torch.testing.assert_close(model(x), model.fc(F.relu(model.bn(h)).mean((2, 3))))


def test_initialisation():
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            k, out = module.kernel_size[0], module.out_channels
            assert abs(module.weight.std() / (2 / (k * k * out)) ** 0.5 - 1) < 0.03
    assert model.fc.bias.abs().max() == 0


def test_delta_moves_the_layer_it_names_and_those_behind_it():
    torch.manual_seed(0)
    model = WideResNet(10, 1).eval()
    x = torch.rand(2, 3, 16, 16)
    plain, h = model(x, return_features=True)
    assert list(h) == list(LAYERS) and h["0"] is x
    sizes = [(3, 16, 16), (16, 16, 16), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert [tuple(h[k].shape[1:]) for k in LAYERS] == sizes
    for i, name in enumerate(LAYERS):
        d = 0.1 * torch.randn_like(h[name])
        logits, moved = model(x, delta={name: d}, return_features=True)
        torch.testing.assert_close(moved[name], h[name] + d)
        assert all(torch.equal(moved[k], h[k]) for k in LAYERS[:i])
        assert all(not torch.equal(moved[k], h[k]) for k in LAYERS[i:])
        assert not torch.equal(logits, plain)
    with pytest.raises(ValueError, match="conv9"):
        model(x, delta={"conv9": 0})


def test_the_network_normalises_and_its_logits_are_float32():
    torch.manual_seed(0)
    x, mean, std = torch.rand(2, 3, 8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = WideResNet(10, 1, mean=mean, std=std).eval()
    plain = WideResNet(10, 1, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        model(x), plain((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_torchs_dropout_in_distribution(dtype):
    torch.manual_seed(0)
    x = torch.ones(64, 8, 33, 31, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    for mine in (lambda: dropout(x, 0.3), lambda: F.dropout(x, 0.3)):
        out = mine()
        assert out.dtype == dtype and out.shape == x.shape
        n = x.numel()
        kept = out != 0
        assert abs(kept.double().mean() - 0.7) < 5 * (0.3 * 0.7 / n) ** 0.5
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7), rtol=1e-5, atol=0)
        # Neither neighbours in space nor in the batch share their fate.
        for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])):
            together = (a & b).double().mean()
            assert abs(together - 0.49) < 5 * (0.49 * 0.51 / n) ** 0.5 * 1.5
        (gradient,) = torch.autograd.grad(out.float().sum(), x)
        assert torch.equal(gradient, out)
    assert dropout(x, 0.3).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dropout(x, 0.0), x)
    assert (dropout(x, 0.999999) == 0).double().mean() > 0.99


def test_dropout_is_off_in_eval_mode_and_independent_between_passes():
    torch.manual_seed(0)
    model, x = WideResNet(10, 1, dropout=0.3), torch.rand(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_load_model_gives_back_the_network(tmp_path):
    model = WideResNet(10, 2, num_classes=7, dropout=0.1, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    torch.save({"arguments": model.arguments, "state_dict": model.state_dict()}, tmp_path / "model.pt")
    x = torch.rand(2, 3, 8, 8)
    for path in (tmp_path, tmp_path / "model.pt"):
        torch.testing.assert_close(load_model(path)(x), model(x))


def test_mps_has_no_channels_last(monkeypatch):
    assert (
        common.layout("mps") == torch.contiguous_format
        and common.layout("cuda:1") == common.layout("cpu") == torch.channels_last
    )
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    monkeypatch.setattr(common, "layout", lambda _: torch.contiguous_format)
    assert common.to_float(images).is_contiguous()
