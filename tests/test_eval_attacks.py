import functools
import json

import numpy as np
import pytest
import torch
import torchattacks

import common
import eval_attacks
from conftest import EPS, SHORT, TINY, train
from eval_attacks import is_adversarial, noise, pgd, plain_pgd, predict
from wrn import load_model


@pytest.mark.parametrize("restarts", [1, 3])
def test_pgd_finds_what_plain_pgd_finds(trained, restarts):
    """The same noise: the same verdicts, and survivors end at the same points, whatever the batch size."""
    model, x, y = trained
    model, x, y = model.double(), x[:30].double(), y[:30]
    robust, x_adv = plain_pgd(model, x, y, EPS, 5, restarts, seed=3)
    assert torch.equal(is_adversarial(model, x, x_adv, y, EPS), ~robust)
    assert 0 < robust.sum() < (predict(model, x) == y).sum()
    assert not torch.equal(noise(x.shape[1:], 3, 0, 0), noise(x.shape[1:], 3, 0, 1))  # restarts differ
    for batch_size in (1, 7, 1000):
        fast, fast_adv = pgd(model, x, y, EPS, 5, restarts, seed=3, batch_size=batch_size)
        assert torch.equal(fast, robust)
        torch.testing.assert_close(fast_adv[robust], x_adv[robust])
    model.float()


def test_survivors_end_where_torchattacks_pgd_ends(trained):
    """Without random start both attacks walk the same path; ours stops early only where it has won."""
    model, x, y = trained
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    robust, x_adv = pgd(model, x, y, EPS, steps=10, restarts=1, random_start=False)
    assert robust.any()
    same = (x_adv[robust] - theirs[robust]).abs() < 1e-6
    assert same.double().mean() > 0.999  # a gradient of about zero may round to either sign
    assert not robust[predict(model, theirs) != y].any()


def test_the_active_set_is_full_and_spends_no_more_than_it_must(trained, monkeypatch):
    """Images times steps, counted: a survivor costs restarts * (steps + 1), a broken one up to where it broke."""
    model, x, y = trained
    calls, bounds = [], []
    monkeypatch.setattr(eval_attacks, "REPORT_EVERY", 0)

    def counting(images):
        if torch.is_grad_enabled():
            calls.append(len(images))
        return model(images)

    robust, _ = pgd(counting, x, y, EPS, 5, 4, batch_size=10, report=lambda done, left, _: bounds.append((done, left)))
    survivors = int(robust.sum())
    first = int((predict(model, x) == y).sum())
    assert survivors * 4 * 6 <= sum(calls) < first * 4 * 6
    full = [n == 10 for n in calls]
    assert all(full[: full.index(False)]) and full.index(False) > 0.6 * len(full)
    assert [done for done, _ in bounds[:-1]] == [sum(calls[: i + 1]) for i in range(len(calls))]
    assert bounds[-1] == bounds[-2] == (sum(calls), 0)
    left = [left for _, left in bounds]
    assert left == sorted(left, reverse=True) and left[-1] == 0


def test_verdicts_are_float32_under_autocast(trained):
    """bfloat16 misjudges some clean images; what counts is the float32 network's word."""
    model, x, y = trained
    with torch.autocast("cpu", torch.bfloat16):
        robust, x_adv = pgd(model, x, y, EPS, steps=5, restarts=1)
    assert ((predict(model, x_adv) != y) == ~robust).all()


def test_a_claim_outside_the_ball_or_the_box_does_not_count():
    def never_right(images):
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    x, y = torch.full((4, 3, 2, 2), 0.5), torch.ones(4, dtype=torch.long)
    x_adv = x + torch.tensor([0.0, 0.1, 0.11, 0.6]).view(4, 1, 1, 1)
    assert is_adversarial(never_right, x, x_adv, y, 0.1).tolist() == [True, True, False, False]
    assert is_adversarial(never_right, x, x_adv, y, 1.0).tolist() == [True, True, True, False]
    assert not is_adversarial(never_right, x, x_adv, 0 * y, 1.0).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train("slat", 2, tmp_path_factory.mktemp("run") / "slat")


def test_command_line(cli, run, tmp_path):
    file, picture = tmp_path / "result.json", tmp_path / "examples.png"
    flags = f"--attack fgsm,pgd --steps 3 --restarts 2 --n 50 --eps 2 --json {file} --examples {picture}"
    code, out, _ = cli(eval_attacks, f"{run} {flags}")
    assert code == 0 and "pgd-3-2" in out
    result = json.loads(file.read_text())
    assert {"clean", "robust", "attacks", "n", "eps", "seconds", "torch", "device", "command"} <= set(result)
    assert result["n"] == 50 and result["eps"] == 2
    assert result["training"]["method"] == "slat" and result["training"]["last_epoch"]["epoch"] == 2
    assert result["robust"] == result["attacks"]["pgd-3-2"] <= result["attacks"]["fgsm"] <= result["clean"]

    model = load_model(run)
    arrays, classes = common.load_arrays(TINY, "data")
    x, y = common.Data("", classes, arrays, "cpu").test(50)
    assert result["clean"] == 100 * (predict(model, x) == y).double().mean().item()
    assert max(map(len, out.splitlines()[1:6])) <= 80
    assert result["robust"] < result["clean"] and picture.read_bytes().startswith(b"\x89PNG")

    for name in ("best.pt", "checkpoint.pt"):
        assert cli(eval_attacks, f"{run / name} --steps 1 --restarts 1 --n 5")[0] == 0


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with budgets for tests."""
    for name, options in SHORT.items():
        if name != "pgd":
            attack = functools.partial(eval_attacks.ATTACKS[name], **options)
            monkeypatch.setitem(eval_attacks.ATTACKS, name, attack)
    monkeypatch.setattr(eval_attacks, "SAVE_EVERY", 0)


def test_autoattack_on_the_command_line(cli, run, tmp_path, short):
    file = tmp_path / "result.json"
    code, out, err = cli(eval_attacks, f"{run} --attack autoattack,pgd --steps 2 --restarts 1 --n 40 --json {file}")
    assert code == 0 and not err
    result = json.loads(file.read_text())
    order = ["apgd-ce", "apgd-t", "fab-t", "square", "pgd-2-1", "autoattack"]
    assert list(result["attacks"]) == order and [line.split()[0] for line in out.splitlines()[5:11]] == order
    accuracies = [result["attacks"][name] for name in order[:-1]]
    assert [result["clean"], *accuracies] == sorted([result["clean"], *accuracies], reverse=True)
    assert result["attacks"]["autoattack"] == result["attacks"]["square"]
    assert result["robust"] == accuracies[-1]
    alone = tmp_path / "alone.json"
    cli(eval_attacks, f"{run} --attack autoattack --individual --n 40 --json {alone}")
    alone = json.loads(alone.read_text())
    assert alone["attacks"]["autoattack"] == alone["robust"] <= min(alone["attacks"].values())
    assert alone["attacks"]["apgd-ce"] == result["attacks"]["apgd-ce"]


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_result(cli, run, tmp_path, short, monkeypatch):
    """Killed at every second save."""
    flags = f"{run} --attack autoattack --n 40 --batch-size 9 --search-precision bf16"
    whole, state, file, adv = (tmp_path / name for name in ("whole.json", "state.pt", "file.json", "adv.npz"))
    cli(eval_attacks, f"{flags} --json {whole}  --save-adv {adv}")
    plain, saves, kills = common.write_torch, [], 0

    class Killed(BaseException):
        pass

    def write(path, content):
        plain(path, content)
        saves.append(path)
        if len(saves) == 2:
            raise Killed

    monkeypatch.setattr(common, "write_torch", write)
    again = tmp_path / "again.npz"
    while not file.exists():
        saves.clear()
        try:
            code, _, err = cli(eval_attacks, f"{flags} --state {state} --json {file} --save-adv {again}")
        except Killed:
            kills += 1
        else:
            assert code == 0, err
    assert kills > 5
    results = [json.loads(path.read_text()) for path in (whole, file)]
    assert results[0]["attacks"] == results[1]["attacks"]
    assert np.array_equal(np.load(adv)["x"], np.load(again)["x"])
    # Once it has ended, the state tells the result without any attack.
    monkeypatch.setattr(eval_attacks, "search", None)
    assert cli(eval_attacks, f"{flags} --state {state}")[0] == 0
    other = flags.replace(str(run), str(run / "best.pt"))
    for mismatch, reason in (
        (f"{flags} --eps 4", "--eps was 8"),
        (f"{other} --n 20", "the network or the images were"),
    ):
        code, _, err = cli(eval_attacks, f"{mismatch} --state {state}")
        assert code == 2 and f"another evaluation ({reason}" in err and err.count("\n") == 1
    content = torch.load(state, weights_only=True)
    torch.save({"identity": content["identity"]}, tmp_path / "empty.pt")
    (tmp_path / "short.pt").write_bytes(state.read_bytes()[:1000])
    for damaged in (tmp_path / "empty.pt", tmp_path / "short.pt", run / "model.pt"):
        code, _, err = cli(eval_attacks, f"{flags} --state {damaged}")
        assert code == 2 and "damaged, or not the state of an evaluation" in err and err.count("\n") == 1


@pytest.mark.parametrize(("kind", "dtype"), [("float32", np.float32), ("uint8", np.uint8)])
def test_adversarial_images_are_saved_as_what_they_are(cli, run, tiny, tmp_path, kind, dtype):
    file, result = tmp_path / "adv.npz", tmp_path / "result.json"
    flags = f"--attack pgd --steps 5 --restarts 1 --eps 8.5 --n 50 --save-adv {file} --save-adv-as {kind}"
    assert cli(eval_attacks, f"{run} {flags} --json {result}")[0] == 0
    with np.load(file, allow_pickle=False) as content:
        images, y, adversarial = content["x"], content["y"], content["adversarial"]
    assert images.dtype == dtype and images.shape == (50, 32, 32, 3)
    clean, label = tiny.test(50)
    x_adv = torch.from_numpy(images).permute(0, 3, 1, 2).float() / (255 if kind == "uint8" else 1)
    assert y.tolist() == label.tolist()
    assert (x_adv - clean).abs().max() <= 8.5 / 255 + 1e-6
    assert ((predict(load_model(run), x_adv) != label) == torch.from_numpy(adversarial)).all()
    robust = json.loads(result.read_text())["robust"]
    assert adversarial.sum() == 50 - robust / 2 if kind == "float32" else 40 < adversarial.sum() <= 50 - robust / 2


NETWORK = """
import torch
def make_model():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
def no_network():
    return 3
def broken():
    raise RuntimeError("no luck")
"""


def test_any_network(cli, tmp_path):
    file, weights = tmp_path / "net.py", tmp_path / "w.pt"
    file.write_text(NETWORK)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    tail = f"--dataset {TINY} --n 30 --steps 3 --restarts 1 --json {tmp_path}/r.json"
    arrays, classes = common.load_arrays(TINY, "data")
    x, y = common.Data("", classes, arrays, "cpu").test(30)
    for content in (network.state_dict(), {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}):
        torch.save(content, weights)
        code, out, err = cli(eval_attacks, f"--model {file}:make_model --weights {weights} {tail}")
        assert code == 0 and not err
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["clean"] == pytest.approx(100 * (predict(network, x) == y).double().mean().item())
        assert result["training"] is None
    torch.save({"1.weight": torch.zeros(10, 5)}, weights)
    for flags, message in (
        (f"--model {file}:make_model --weights {weights} {tail}", "does not fit"),
        (f"--model {file}:nothing {tail}", "KeyError: 'nothing'"),
        (f"--model {file}:no_network {tail}", "returned int, not an nn.Module"),
        (f"--model {file}:broken {tail}", "RuntimeError: no luck"),
        (f"--model {tmp_path}/none.py:make_model {tail}", "FileNotFoundError"),
        (f"--model make_model {tail}", "argument --model FILE:FUNCTION: make_model"),
        (f"--model {file}:make_model", "needs --dataset"),
        (f"runs/x --model {file}:make_model", "give either a run or --model"),
        (f"runs/x --weights {weights}", "needs --model"),
    ):
        code, _, err = cli(eval_attacks, flags)
        assert code == 2 and message in err and err.count("\n") == 1, flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "no file nowhere"),
        ("{run} --attack cw", "'cw' is not one of apgd-ce, apgd-t, fab-t, square"),
        ("{run} --eps 300", "--eps"),
        ("{run} --eps nan", "--eps"),
        ("{run} --n 0", "--n"),
        ("{run} --device tpu", "no device 'tpu'"),
        ("{run} --dataset nothing.npz", "nothing.npz"),
        ("{run} --json no/such/folder.json", "no/such"),
        ("{run}/config.json", "config.json is damaged"),
        ("", "run"),
    ],
)
def test_errors_are_one_line(cli, run, flags, message):
    code, _, err = cli(eval_attacks, flags.format(run=run))
    assert code == 2 and err.count("\n") == 1 and message in err
