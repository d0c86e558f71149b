"""paper/: figures, results, sweep, bench, toy_2d: their numbers, their files, and that what they print can be run."""

import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import console
import eval_attacks
from conftest import ROOT, SCRIPTS, SMALL, TINY, parsed, run_main
from eval_attacks import load_model
from paper import bench, demo, fgsm_rs_latent, figures, results, slat_hidden, sweep, toy_2d
from wrn import LAYERS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a SLAT and an FGSM run."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("slat", "fgsm"):
        assert run_main(SCRIPTS[method], f"{SMALL} --epochs 2 --monitor 4 --overwrite --out {folder / method}") == 0
    return f"{folder}/slat {folder}/fgsm"


def written(name):
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in name.with_suffix(".svg").read_bytes()
    return json.loads(name.with_suffix(".json").read_text())


def test_the_grid_finds_the_worst_case_of_a_linear_boundary():
    model, w = toy_2d.Net(2), torch.tensor([1.0, 3.0])  # relu(s) - relu(-s) = s, with s = w x
    weights = {"first.weight": torch.stack([w, -w]), "second.weight": torch.tensor([[1.0, -1.0]])}
    model.load_state_dict(weights | {"first.bias": torch.zeros(2), "second.bias": torch.zeros(1)})
    x, y = toy_2d.sample(500, 0)
    for eps in (0.0, 0.05, 0.1):
        right = (2 * y - 1) * (x @ w) > eps * w.abs().sum()
        assert toy_2d.accuracy(model, x, y, eps) == pytest.approx(100 * right.double().mean().item())
    assert toy_2d.lean(model, x) == pytest.approx(75)


def test_toy(cli, tmp_path):
    assert cli(toy_2d, f"--seeds 1 --hidden 50 --steps 400 --lr 0.25 --out {tmp_path / 'toy'}")[0] == 0
    results = written(tmp_path / "toy")["results"]
    lean = {name: row["lean"][0] for name, row in results.items()}
    assert lean["FGSM"] > 80 > lean["standard"] > 60 > 52 > lean["SLAT, eta 0.1"] > lean["SLAT, eta 0.3"]
    assert results["SLAT, eta 0.1"]["within 0.15"][0] > results["FGSM"]["within 0.15"][0] + 10


def test_figures_of_metrics(cli, runs, tmp_path):
    rows = results.read_json(f"{runs.split()[0]}/metrics.jsonl")
    for command, key in (("curves", "test_pgd10"), ("alignment", "alignment")):
        assert cli(figures, f"{command} {runs} --out {tmp_path / command}")[::2] == (0, "")
        numbers = written(tmp_path / command)
        assert numbers["SLAT"][key] == [row[key] for row in rows] and list(numbers) == ["SLAT", "FGSM"]
        assert numbers["SLAT"]["epoch"] == [1, 2] and numbers["SLAT"]["n"] == 4
        assert "test_clean" in numbers["SLAT"] or command == "alignment"


def test_figures_of_networks(cli, runs, tmp_path):
    steps = "--points 3 --eps 2"
    asked = {"grad-norm": "", "linearity": steps, "landscape": steps, "step": "--points 3 --eps 80"}
    for command, flags in asked.items():
        flags += f" --n 12 --device cpu --out {tmp_path / command}"
        assert cli(figures, f"{command} {runs} {flags}")[::2] == (0, "")
    model, (x, y) = load_model(runs.split()[0]), common.load_data(parsed(SCRIPTS["slat"], SMALL)).test(12)
    sums, errors = torch.zeros(3, 5), torch.zeros(2)
    for image, label in zip(x, y):  # one image at a time
        logits, h = model(image[None].requires_grad_(), return_features=True)
        loss = F.cross_entropy(logits, label[None])
        found = torch.autograd.grad(loss, [h[name] for name in LAYERS])
        norm = torch.tensor([g.abs().sum() for g in found])
        size = torch.tensor([h[name].abs().mean().item() for name in LAYERS])
        sums += torch.stack([norm, size, norm * size]) / 12
        for i, step in enumerate((2 / 255, size[1] / 20)):  # 5 % of the mean
            d = step * found[1].sign()
            after = F.cross_entropy(model(image[None], delta={"conv1": d}), label[None])
            errors[i] += (after - loss - (found[1] * d).sum()).abs().item() / 12
    numbers = written(tmp_path / "grad-norm")
    for key, expected in zip(("l1", "mean_abs_h", "l1_times_mean_abs_h"), sums.tolist()):
        assert numbers[key]["SLAT"] == pytest.approx(dict(zip(LAYERS, expected)), rel=1e-3)
    numbers = written(tmp_path / "linearity")
    assert numbers["eps"] == [1, 2] and numbers["share"] == [2.5, 5]
    for key, expected in zip(("error", "error_of_share"), errors.tolist()):
        assert numbers[key]["SLAT"]["conv1"][-1] == pytest.approx(expected, rel=0.05)

    gradient = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x)[0]
    numbers = written(tmp_path / "step")
    assert numbers["t"] == [0, 0.5, 1] and numbers["images"]["n"] == 12
    for t, accuracy in zip(numbers["t"], numbers["accuracy"]["SLAT"]):
        x_adv = (x + t * 80 / 255 * gradient.sign()).clamp(0, 1)
        assert accuracy == pytest.approx(100 * (model(x_adv).argmax(1) == y).double().mean().item())

    surface = torch.tensor(written(tmp_path / "landscape")["loss"]["SLAT"])
    assert surface[1, 1].item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)
    assert (surface[2] > surface[0]).all(), "the loss rises along the sign of its gradient"


def test_what_the_steps_tell(cli, runs, tmp_path):
    """The probe on signs that tell the class and that do not; counts against one image at a time."""
    labels, generator = torch.arange(400) % 10, torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (400, 6, 8), generator=generator) * 2.0 - 1
    assert figures.read_by_probe(noise, labels) < 20
    noise[:, 1] = noise[labels, 1]
    assert figures.read_by_probe(noise, labels) > 95
    slat, fgsm = runs.split()
    bare = tmp_path / "bare"
    shutil.copytree(fgsm, bare, ignore=shutil.ignore_patterns("*.pt"))
    flags = f"--eps 16 --n 12 --seed 3 --device cpu --out {tmp_path / 'told'}"
    assert cli(figures, f"told {slat} {bare} {flags}")[::2] == (0, "")
    numbers = written(tmp_path / "told")
    assert numbers["runs"][str(bare)].keys() == {"label", "seed", "test_pgd10"} and numbers["images"]["n"] == 12
    code, _, err = cli(figures, f"told {bare} {flags}")
    assert code == 2 and err == "paper.figures.py: error: none of these runs has its network, model.pt\n"
    found, last = numbers["runs"][slat], results.read_json(f"{slat}/metrics.jsonl")[-1]
    assert (found["label"], found["test_pgd10"]) == ("SLAT", last["test_pgd10"])
    model, (x, y) = load_model(slat), common.load_data(parsed(SCRIPTS["slat"], SMALL)).test(12)
    wrong = (y + torch.randint(1, 10, y.shape, generator=torch.Generator().manual_seed(3))) % 10
    for key, target in (("its label", y), ("a wrong class", wrong), ("another image's label", y)):
        said, asked = torch.zeros(4, dtype=torch.float64), 0
        for i in range(12):
            j = i - 1 if key == "another image's label" else i  # whose steps image i gets
            if i != j and y[i] == y[j]:
                continue
            steps = SCRIPTS["slat"].slat(model, x[j, None], target[j, None], 16 / 255, LAYERS[:3], 16 / 255, 14.4 / 255)
            x_adv, delta = (x[i] + steps[0] - x[j]).clamp(0, 1), steps[1]
            seen = (model(x[i, None]), model(x_adv), model(x[i, None], delta=delta), model(x_adv, delta=delta))
            said += torch.tensor([logits.argmax(1).item() == target[j].item() for logits in seen])
            asked += 1
        values = [found[key][name] for name in ("no step", "input", "hidden", "both")]
        assert values == (100 * said / asked).tolist() and 0 < asked <= 12, key


def result(method, seed, clean, pgd, autoattack=None, usual=(), best=False, **flags):
    """What eval_attacks.py --json writes of a run; usual: those of its flags that are the defaults."""
    config = {"method": method, "depth": 10, "width": 2, "epochs": 8, "eps": 8.0, "dropout": 0.3, "seed": seed}
    config["monitor"] = 100
    config |= {"hardware": "a CPU", "seconds": 60.0 * (seed + 1), "dataset": "cifar10.npz", **flags}
    config["not_default"] = ["depth", "width", *(flag for flag in flags if flag not in usual)]
    attacks = {"pgd-50-10": pgd} | ({"autoattack": autoattack} if autoattack is not None else {})
    command = "python eval_attacks.py runs/x" + "/best.pt" * best
    facts = {"n": 100, "eps": config["eps"], "command": command, "training": config}
    return {"clean": clean, "attacks": attacks} | facts


def write_results(folder, found):
    """Paths of JSON files with these results."""
    files = [folder / f"{i}.json" for i in range(len(found))]
    for file, content in zip(files, found):
        file.write_text(json.dumps(content))
    return [*map(str, files)]


def check_legend(figure):
    """The only legend lies within the figure and hides nothing of the axes, which stay large."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole, axis = legend.get_window_extent(), figure.bbox, figure.axes[0]
    assert 0 <= box.x0 and box.x1 <= whole.x1 and 0 <= box.y0 and box.y1 <= whole.y1
    assert box.y1 < axis.get_tightbbox().y0 or box.x0 > axis.get_tightbbox().x1
    assert all(a.get_window_extent().height > 2 * figure.dpi for a in figure.axes)
    assert all(a.get_window_extent().width > 2 * figure.dpi for a in figure.axes)
    return legend


def test_legends_tell_runs_apart():
    def config(method="slat", seed=0, **flags):
        return {"method": method, "seed": seed, "eps": 8.0, **flags, "not_default": ["eps", *flags]}

    for other, *expected in (
        (config(batch_size=64), "a", "b"),  # the folders
        (config(batch_size=64, seed=1), "SLAT, seed 0", "SLAT, seed 1"),
        (config(batch_size=64, eta=0.5, layers=["0", "conv1"]), "SLAT", "SLAT, eta 0.5, layers 0,conv1"),
        (config(), "SLAT, batch size 64", "SLAT"),
        (config("fgsm", batch_size=64, alpha=0.9), "SLAT", "FGSM, alpha 0.9"),
        (config("new_one", batch_size=64), "SLAT", "NEW-ONE"),  # a method that results.py does not know
    ):
        labels, styles = zip(*figures.legends(["runs/a", "runs/b"], [config(batch_size=64), other]))
        assert list(labels) == expected
        hollow = [", " in label.split(", seed")[0] for label in labels]
        assert [style["markerfacecolor"] == "white" for style in styles] == hollow
        assert ([style["marker"] for style in styles] == ["$0$", "$1$"]) == (other["seed"] == 1)


def test_a_legend_below_hides_nothing():
    for label in ("SLAT {}", "slat_wrn10-2_epochs8_eps8_layers-0-conv1_seed{}"):
        figure, axis = figures.pyplot().subplots(figsize=(7, 4), layout="constrained")
        axis.plot([0, 1], torch.rand(2, 9), label=[label.format(i) for i in range(9)])
        figures.legend_below(figure, axis)
        check_legend(figure)


def test_table_and_figures_of_results(cli, refused, tmp_path):
    slat = {"eta": 1.0, "input_step": 0.9}
    found = [
        result("slat", 0, 50.0, 31.0, 28.0, usual=slat, **slat),
        result("slat", 0, 52.0, 32.0, 29.0, usual=["input_step"], eta=0.6, input_step=0.9),
        result("slat", 0, 53.0, 33.0, eta=0.6, input_step=0.6),
        result("slat", 0, 20.0, 1.0, layers=["0", "conv3"], latent_clamp=False),
        result("fgsm", 1, 62.0, 34.0, 0.5),
        result("fgsm", 0, 60.0, 30.0),
        result("fgsm", 0, 61.0, 20.0, alpha=0.9),
        result("fgsm", 0, 61.0, 20.0, alpha=0.9, dropout=0),
        result("fgsm", 0, 55.0, 29.0, 0.0, best=True),
        result("fgsm", 0, 30.0, 20.0, eps=16.0) | {"eps": 8.0},
        result("slat", 0, 40.0, 20.0, dataset="cifar100"),
    ]
    expected = [  # the paper's numbers stand next to its own set-ups only
        *[("SLAT", "", "50.0 (85.9)"), ("SLAT", "eta 0.6", "52.0"), ("SLAT", "eta 0.6, input step 0.6", "53.0")],
        *[("SLAT", "no latent clamp, layers 0,conv3", "20.0"), ("FGSM", "", "61.0 ± 1.4 (87.4)")],
        *[("FGSM", "alpha 0.9", "61.0 (90.9)"), ("FGSM", "alpha 0.9, dropout 0", "61.0")],
        *[("FGSM", "best epoch", "55.0"), ("FGSM", "trained with eps 16", "30.0"), ("SLAT", "", "40.0 (59.6)")],
    ]
    files = write_results(tmp_path, found)
    code, out, err = cli(figures, f"table {' '.join(reversed(files))} --out {tmp_path / 'table'}")
    assert code == 0 and not err and (tmp_path / "table.md").read_text() == out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[-len(expected) :]]
    assert [(*row[:2], row[7]) for row in rows] == expected
    assert rows[4][2:7] == ["cifar10", "WRN-10-2", "8", "8", "100"] and rows[7][9] == "0.0"
    assert rows[4][8:] == ["32.0 ± 2.8 (0.0)", "0.5 [1 of 2] (0.0)", "1.5 ± 0.7", "a CPU", "[0](5.json), [1](4.json)"]
    (tmp_path / "table.notes.md").write_text("## Findings\n\nNone.\n")
    assert cli(figures, f"table {' '.join(files)} --out {tmp_path / 'table'}")[0] == 0
    assert (tmp_path / "table.md").read_text() == out + "\n## Findings\n\nNone.\n"
    files.pop()  # of another data set
    assert cli(figures, f"eta {' '.join(files)} --out {tmp_path / 'eta'}")[0] == 0
    first = {"eta": [0.6, 1], "clean": [[52], [50]], "pgd-50-10": [[32], [31]], "autoattack": [[29], [28]]}
    other = {"eta": [0.6], "clean": [[53]], "pgd-50-10": [[33]], "autoattack": [[]]}
    assert written(tmp_path / "eta") == {"SLAT, input step 0.9": first, "SLAT, input step = eta": other}
    assert cli(figures, f"eps {' '.join(files)} --out {tmp_path / 'eps'}")[0] == 0
    robust = {name: found["pgd-50-10"] for name, found in written(tmp_path / "eps").items()}
    assert robust == {"SLAT": [[31]], "FGSM": [[34, 30]], "FGSM, best epoch": [[29]]}
    others = [result("fgsm", 0, 80.0, 40.0, **flags) for flags in ({"width": 10}, {"epochs": 30}, {"eps": 16.0})]
    wide, long, strong = write_results(tmp_path, others)
    for flags, message in (
        (f"eta {files[4]}", "--eta"),
        (f"eps {files[4]} {wide}", "WRN-10-10 on 100 images of cifar10, WRN-10-2 on 100"),
        (f"eps {files[4]} {long}", "FGSM after 30 epochs, FGSM after 8"),
        (f"dropout {files[4]} {strong}", "of cifar10 at eps 16, WRN-10-2 on 100"),
    ):
        refused(figures, f"{flags} --out {tmp_path / 'figure'}", message)


def drawn(monkeypatch, command):
    """The figure of this command."""
    figure = []
    with monkeypatch.context() as patch:
        patch.setattr(figures, "write", lambda name, found, numbers: figure.append(found))
        assert run_main(figures, command) == 0
    return figure[0]


def test_what_is_drawn_over_eps(monkeypatch, tmp_path):
    """Points of every run, none on another one, lines through the lowest, a legend that fits many methods."""
    methods = [*results.METHODS, *(f"new_{i}" for i in range(8))]
    found = [result(method, 0, 60.0, 42.0, 35.0, eps=eps) for method in methods for eps in (4.0, 8.0)]
    found += [result("fgsm", 1, 60.0, 0.0, None, eps=8.0)]
    found[-2]["attacks"].pop("autoattack"), found[-3]["attacks"].pop("autoattack")  # of the last method
    figure = drawn(monkeypatch, f"eps {' '.join(write_results(tmp_path, found))} --out {tmp_path / 'eps'}")
    assert [axis.get_title() for axis in figure.axes] == ["clean", "PGD-50-10", "AutoAttack"]
    points = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "s"]
    assert [[*line.get_ydata()] for line in points] == [[60] * 3, [42, 42, 0], [35, 35]]
    for axis in figure.axes:
        places = [place for line in axis.lines if line.get_marker() != "None" for place in line.get_xdata()]
        places = [place for place in places if place == place]
        assert len(set(places)) == len(places) >= 2 * len(methods) - 2
        assert all(min(abs(place - 4), abs(place - 8)) < 2 for place in places)
    lowest = [[*line.get_ydata()] for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    assert len(lowest) == len(methods) and [42, 0] in lowest
    colours = [handle.get_color() for handle in check_legend(figure).legend_handles]
    assert len(colours) == len(methods) and len(set(colours[: len(results.METHODS)])) == len(results.METHODS)


def test_what_was_measured_at_one_value_has_no_panel(monkeypatch, tmp_path):
    found = [result("slat", 0, 60.0, 40.0, 35.0), result("slat", 0, 60.0, 40.0, dropout=0.0)]
    for files, titles in ((found, ["clean", "PGD-50-10"]), (found[:1], ["clean", "PGD-50-10", "AutoAttack"])):
        figure = drawn(monkeypatch, f"dropout {' '.join(write_results(tmp_path, files))} --out {tmp_path / 'x'}")
        assert [axis.get_title() for axis in figure.axes] == titles


def test_what_is_drawn_of_a_run_that_collapses(monkeypatch, tmp_path):
    """FGSM's accuracy of it alone, from the epoch before; a ring at its best epoch; bands of one standard error."""
    keys = ("epoch", "test_clean", "test_pgd10", "test_fgsm", "train_pgd10", "alignment", "warning")
    rows = {"slat": [(1, 50, 20, 30, 20, 0.9, None), (2, 60, 25, 35, 25, 0.9, None), (3, 70, 30, 40, 30, 0.9, None)]}
    rows["fgsm"] = [(1, 50, 20, 30, 20, 0.9, None), (2, 60, 25, 35, 19, 0.5, None), (3, 70, 0, 90, 0, -0.1, "collapse")]
    for method, lines in rows.items():
        (tmp_path / method).mkdir()
        config = result(method, 0, 1.0, 1.0)["training"] | {"epochs": 3}
        (tmp_path / method / "config.json").write_text(json.dumps(config))
        text = "".join(json.dumps(dict(zip(keys, line))) + "\n" for line in lines)
        (tmp_path / method / "metrics.jsonl").write_text(text)
    figure = drawn(monkeypatch, f"curves {tmp_path}/slat {tmp_path}/fgsm --out {tmp_path}/x")
    clean, attacked = figure.axes
    assert [[*line.get_ydata()] for line in attacked.lines if line.get_linestyle() == ":"] == [[35, 90]]
    rings = [line for line in clean.lines if line.get_markersize() == 14 and len(line.get_xdata())]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in rings] == [(1, 50)]
    low, high = clean.collections[0].get_paths()[0].get_extents().intervaly
    assert low == pytest.approx(45) and high == pytest.approx(70 + 21**0.5)  # of n = 100
    assert [text.get_text() for text in attacked.texts] == ["collapses"]
    check_legend(figure)
    (axis,) = drawn(monkeypatch, f"alignment {tmp_path}/slat {tmp_path}/fgsm --out {tmp_path}/x").axes
    assert [*axis.lines[1].get_ydata()] == pytest.approx([0.1, 0.5, 1.1]) and axis.get_ylim()[0] > axis.get_ylim()[1]


def test_captions_say_what_was_trained():
    configs = [result(method, seed, 1.0, 1.0)["training"] for method, seed in (("slat", 0), ("slat", 1), ("free", 0))]
    text = "WRN-10-2 · cifar10 · 8 epochs{} · eps 8/255 · n = {} images · seed{}"
    assert results.heading(configs[:1], [100]) == text.format("", 100, " 0")
    configs[2] |= {"epochs": 2}
    assert results.heading(configs, [1000, 256, 256]) == text.format(" (Free-AT 2)", "256, 1000", "s 0, 1")
    figure = figures.pyplot().figure(figsize=(7, 4))
    figures.caption(figure, configs * 2, [1000], "$ " * 60)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.x1


@pytest.mark.parametrize("content", ["", "[1]", '{"training": {}}'])
def test_damaged_results_are_one_line(refused, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    for command in ("table", "eps", "dropout"):
        refused(figures, f"{command} {tmp_path / 'a.json'} --out {tmp_path / 'x'}", "a.json")
    (tmp_path / "slat_wrn10-2_epochs8_eps8_seed0.json").write_text(content)
    refused(sweep, f"table1 --only slat --small --runs {tmp_path} --results {tmp_path}", "eps8_seed0.json")
    good = json.dumps(result("slat", 0, 1.0, 1.0)["training"])
    for config, metrics in ((content, ""), (good, ""), (good, content), (good, '{"epoch": 1}')):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "metrics.jsonl").write_text(metrics)
        file = "config.json" if config == content else "metrics.jsonl"
        refused(figures, f"curves {tmp_path} --out {tmp_path / 'x'}", file)


def test_an_error_in_the_code_keeps_its_traceback(cli, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "legends", lambda *_: {}["a typo"])
    with pytest.raises(KeyError, match="a typo"):
        cli(figures, f"curves {runs} --out {tmp_path / 'x'}")


def test_errors_are_one_line(refused, runs, monkeypatch):
    run = runs.split()[0]
    refused(figures, "curves nowhere", "nowhere/config.json is missing")
    for module, flags in ((figures, f"curves {run} --out"), (toy_2d, "--out"), (bench, "--json")):
        refused(module, f"{flags} no/such/name", "cannot write no/such/name", "No such file")
        refused(module, f"{flags} {run}", f"cannot write {run}: it is a folder")
    refused(figures, f"landscape {run} --eps 999", "--eps")
    refused(figures, f"table {run}/config.json", "does not say how the network was trained")
    refused(figures, f"draw {run}", "draw")
    refused(sweep, "table2 --only pgd", "table2 has no runs of pgd")
    refused(sweep, "table2 --attack pdg", "'pdg' is not one of apgd-ce, apgd-t, fab-t, square")
    refused(bench, "--only sgd", "'sgd' is not one of")
    refused(bench, "--depth 11", "choose from 10, 16")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(figures, f"curves {run}", "pip install matplotlib")


def parsed_command(command):
    """The flags that a printed command gives its script."""
    _, script, *flags = shlex.split(command.replace("-m paper.", "paper."))
    scripts = {f"train_{name}.py": module for name, module in SCRIPTS.items()} | {"eval_attacks.py": eval_attacks}
    scripts |= {"paper.fgsm_rs_latent": fgsm_rs_latent, "paper.slat_hidden": slat_hidden}
    return parsed(scripts[script], shlex.join(flags))


# Names by which runs are known that were made elsewhere.
ROWS = {"eta": "eta-0.6_input-step-0.6", "literal": "input-step-1_no-latent-clamp_dropout-0"}
ROWS |= {"table3": "layers-0-conv3-conv4_eta-2.7", "table2": "alpha-0.9", "eps": "eps12", "eps16": "eps16"}
ROWS |= {"hidden": "hidden-noise_dropout-0"}


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_every_printed_command_is_understood_by_its_script(cli, tmp_path, name):
    flags = f"--seeds 0,1 --small --best --device cpu --monitor 7 --dataset {TINY} --results {tmp_path}"
    flags += f" --runs {tmp_path}"
    lines = cli(sweep, f"{name} {flags}")[1].splitlines()
    assert len(lines) == len(set(lines)) == 2 * len(sweep.SWEEPS[name])
    assert any(f"_{ROWS.get(name, 'eps8')}_seed1.json" in line for line in lines)
    for line in lines:
        train, *evaluations = line.split(" && ")
        args = parsed_command(train)
        assert (args.depth, args.width, args.device, args.dataset, args.monitor) == (10, 2, "cpu", TINY, 7)
        assert args.epochs == (2 if "free" in line or "yopo" in line else 8)
        run = Path(args.out)
        run.mkdir()  # as the run would
        (run / "config.json").write_text(json.dumps({"dataset": TINY, "eps": 8}))
        last, best = map(parsed_command, evaluations)
        assert (last.run, best.run) == (str(run), str(run / "best.pt")) and last.state != best.state
        assert [last.json, best.json] == [str(tmp_path / f"{run.name}{end}.json") for end in ("", "_best")]


def test_a_sweep_skips_what_is_done_and_resumes_what_is_broken(cli, tmp_path):
    flags = f"latent-eta --small --runs {tmp_path}/runs --results {tmp_path}/results"

    def left(more=""):
        return cli(sweep, f"{flags} {more}")[1].splitlines()

    lines = left()
    assert len(lines) == 6 and all(" --resume && " in line for line in lines)
    names = [Path(shlex.split(line)[-1]).stem for line in lines]

    def finish(name, **other):
        found = {"n": 1000, "search_precision": "bf16", "attacks": {"pgd-50-10": 1, "autoattack": 1}} | other
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(found))

    finish(names[0])
    for name, file in ((names[1], "model.pt"), (names[2], "config.json")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text("{}")
    first, *rest = left()
    assert first.startswith("python eval_attacks.py") and "train" not in first and rest == lines[2:]
    for name in names:
        finish(name)
    code, out, err = cli(sweep, flags)
    assert code == 0 and not out and "nothing left" in err
    # A quick look, other attacks or another precision do not count; nor does the last epoch for the best one.
    for other in ({"n": 20}, {"attacks": {"pgd-50-10": 1}}, {"search_precision": "fp32"}):
        finish(names[3], **other)
        assert left() == [lines[3]]
    finish(names[3])
    assert not left("--attack pgd") and "".join(left("--best")).count("best.pt") == 6
    flags = flags.replace("--small", "--depth 10 --width 2 --epochs 8")  # without --n: all images
    finish(names[0], n=10_000)
    assert len(left()) == 5


BENCH = "--depth 10 --width 1 --rounds 1 --device cpu --precision fp32"


def test_every_contestant_makes_more_steps_than_its_epochs_have(cli, tmp_path):
    """On images of any size; passes are counted."""
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    np.savez(tmp_path / "small.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    flags = f"{BENCH} --steps 2 --batch-size 4 --no-memory --dataset {tmp_path / 'small.npz'}"
    assert cli(bench, f"{flags} --json {tmp_path / 'bench.json'}")[::2] == (0, "")
    rows = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]
    assert rows.keys() == {"standard", *SCRIPTS} and rows["standard"]["measured"] == 1
    assert all(row["images_per_second"] > 0 and row["peak_bytes"] is None for row in rows.values())
    # A forward pass is 1, a backward pass 1 for activations and 1 for weights, less the gradient at the input.
    expected = {"standard": 3, "fgsm": 5, "slat": 5, "n_aaer": 5, "pgd": 17, "elle": 14, "free": 3}
    for name, passes in (expected | {"lap": 6, "nuat": 9, "sora": 5}).items():
        assert passes - 0.2 < rows[name]["passes"] <= passes, name
    assert rows["free"]["passes"] == 3 and 15 < rows["yopo"]["passes"] < 16.5 and 11 < rows["fgsm_ga"]["passes"] < 11.5


def test_peak_memory(cli, tmp_path):
    flags = f"{BENCH} --steps 1 --batch-size 64"
    assert cli(bench, f"{flags} --only standard,slat --json {tmp_path / 'bench.json'}")[0] == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["result"]["steps"]
    assert 3e7 < rows["standard"]["peak_bytes"] < rows["slat"]["peak_bytes"] < 1.5e8


def test_a_new_script_is_found(tmp_path, monkeypatch):
    """By the sweep and the bench, without an entry anywhere; conftest finds it for the tests in the same way."""
    source = (ROOT / "train_fgsm.py").read_text()
    (tmp_path / "train_zzz.py").write_text(source.replace("def fgsm(", "def zzz(").replace(" fgsm(model", " zzz(model"))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        names = runpy.run_path(str(ROOT / "paper/sweep.py"))
        assert names["METHODS"] == [method for method, _ in names["SWEEPS"]["eps16"]] == ["zzz"]
        assert names["epochs_for"]("zzz", 8) == 8
    assert bench.CONTESTANTS == ("standard", *sweep.METHODS) and set(sweep.METHODS) == SCRIPTS.keys()


def test_pictures_are_whole_or_as_they_were(cli, refused, tmp_path, monkeypatch):
    """A full disk leaves the old file, and one bad file costs no other one."""
    command = f"eps {write_results(tmp_path, [result('slat', 0, 50.0, 30.0)])[0]} --out {tmp_path / 'x'}"
    assert cli(figures, command)[::2] == (0, "")
    before = (tmp_path / "x.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    (tmp_path / "x.svg").unlink()
    with monkeypatch.context() as patch:

        def full(path, content):
            if str(path).endswith(".png"):
                raise OSError(28, "No space left on device", str(path))
            write(path, content)

        write, _ = console.write_file, patch.setattr(console, "write_file", full)
        (tmp_path / "x.json").unlink()
        refused(figures, command, "No space left", "x.png")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes() and (tmp_path / "x.json").exists()
    assert (tmp_path / "x.png").read_bytes() == before

    def torn(self, file, **_):
        Path(file).write_bytes(b"half") if isinstance(file, str) else file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", torn)
    refused(figures, command, "No space left")
    assert (tmp_path / "x.png").read_bytes() == before


def test_outputs_never_replace_inputs(refused, runs, tmp_path):
    """Nor is anything computed before that is known."""
    run, found = runs.split()[0], write_results(tmp_path, [result("slat", 0, 50.0, 30.0)])[0]
    adv = tmp_path / "adv.json"
    shutil.copy(TINY, adv)
    (tmp_path / "table.md").symlink_to(tmp_path / "table.notes.md")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "examples.png").symlink_to(tmp_path / "drawn" / "adv.npz")
    inputs = [Path(found), adv, Path(run, "config.json")]
    before = [path.read_bytes() for path in inputs]
    for module, flags in (
        (figures, f"eps {found} --out {found.removesuffix('.json')}"),
        (figures, f"table {found} --out {tmp_path / 'table'}"),
        (figures, f"curves {runs} --out {run}/config"),
        (figures, f"grad-norm {run} --dataset {adv} --out {tmp_path / 'adv'}"),
        (bench, f"--dataset {adv} --json {adv}"),
        (demo, f"{tmp_path / 'drawn'}"),
    ):
        refused(module, flags, "is the input")
    assert [path.read_bytes() for path in inputs] == before


@pytest.mark.parametrize("content", [None, b"PK"])
def test_the_demo_draws_into_memory(cli, refused, tmp_path, content):
    run = ROOT / "results/cpu/runs/slat_wrn10-2_epochs8_eps16_seed0"
    (tmp_path / "model.pt").symlink_to(run / "model.pt")
    if content:
        (tmp_path / "adv.npz").write_bytes(content)
        return refused(demo, str(tmp_path), "adv.npz")
    x, y = (v.numpy() for v in common.Data(TINY, None, "cpu", ("test",)).test(4))
    np.savez(tmp_path / "adv.npz", x=x.transpose(0, 2, 3, 1), y=y, adversarial=np.ones(4, bool))
    (tmp_path / "examples.png").symlink_to(tmp_path / "kept.png")
    assert cli(demo, str(tmp_path))[0] == 0
    assert (tmp_path / "examples.png").is_symlink() and (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_empty_texts_are_refused(runs, capsys):
    run = runs.split()[0]
    for module, words in (
        *[(figures, ["landscape", run, flag, ""]) for flag in ("--dataset", "--data-dir", "--device", "--out")],
        *[(sweep, ["eps", f, " "]) for f in ("--dataset", "--data-dir", "--device", "--runs", "--results")],
        *[(bench, [flag, ""]) for flag in ("--dataset", "--device", "--json")],
        *[(figures, ["table", ""]), (toy_2d, ["--out", ""]), (demo, [""])],
    ):
        capsys.readouterr()
        with mock.patch.object(sys, "argv", [module.__name__, *words]), pytest.raises(SystemExit):
            console.launch(module.main)
        assert capsys.readouterr().err.count("the value is empty\n") == 1, words


FACTS = {"train": 50000, "test": 10000, "mean": [0.49140, 0.48216, 0.44653], "std": [0.24703, 0.24349, 0.26159]}
CIFAR100 = {"mean": [0.50708, 0.48655, 0.44092], "std": [0.26733, 0.25644, 0.27615]}


def rows_of(cli, folder, found, err=""):
    """The cells of `figures table` of these results."""
    for file in folder.glob("*.json"):
        file.unlink()
    code, out, notes = cli(figures, f"table {' '.join(write_results(folder, found))}")
    assert code == 0 and err in notes and notes.count("\n") == bool(err)
    lines = out.partition("## All runs")[2].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "WRN-10-2" in line]


def test_a_row_is_one_kind_of_evaluation(cli, tmp_path):
    """Its data, budget and seed. The same seed again, or a copy, is no other seed."""
    one, other = result("slat", 0, 50.0, 30.0, 20.0), result("slat", 1, 52.0, 34.0, 22.0)
    for change, texts in (
        ({"dataset": "data/other.npz"}, ["trained on cifar10", "data/other.npz"]),
        ({"dataset": "cifar100"}, ["trained on cifar10", "cifar100"]),
        ({"step_size": 0.1}, ["step size 0.1", "cifar10"]),
        ({"attacks": {"pgd-20-1": 34.0}}, ["PGD-20-1", "cifar10"]),
        ({"seed": 7}, ["attack seed 7", "cifar10"]),
    ):
        found = rows_of(cli, tmp_path, [one, other | change])
        assert sorted(row[7].split(" ")[0] for row in found) == ["50.0", "52.0"]
        (row,) = [row for row in found if row[7].startswith("52.0")]
        assert row[1:3] == texts and ("34.0" in row[8]) == ("step" not in texts[0] and "PGD" not in texts[0])
    same = {"step_size": 0.25, "steps": 50, "restarts": 10, "seed": 0, "dataset": "cifar10.npz"}
    ((*_, clean, pgd, aa, _, _, links),) = rows_of(cli, tmp_path, [one, other | same])
    assert [clean, pgd, aa] == ["51.0 ± 1.4 (85.9)", "32.0 ± 2.8 (47.1)", "21.0 ± 1.4 (44.6)"]
    # Attacked twice, or trained twice: one seed. And PGD and AutoAttack may have come one after the other.
    again = one | {"clean": 54.0, "attacks": {"pgd-50-10": 32.0}}
    ((*_, clean, pgd, aa, _, _, links),) = rows_of(cli, tmp_path, [one, again])
    assert [clean, pgd, aa] == ["52.0 (85.9)", "31.0 (47.1)", "20.0 (44.6)"]
    assert links.count("[0](") == 2
    ((*_, clean, pgd, _, _, _, links),) = rows_of(cli, tmp_path, [one, again, other])
    assert [clean, pgd] == ["52.0 ± 0.0 (85.9)", "32.5 ± 2.1 (47.1)"] and links.count("](") == 3
    ((*_, clean, _, _, _, _, links),) = rows_of(cli, tmp_path, [one, one, other])
    assert clean == "51.0 ± 1.4 (85.9)" and links.count("](") == 3
    files = write_results(tmp_path, [one])
    _, out, err = cli(figures, f"table {files[0]} {tmp_path}/./0.json")
    assert "| 50.0 (85.9) |" in out and err == "note: what is named twice counts once\n"


def test_data_are_known_by_their_content(cli, tmp_path):
    for name, data, shown, paper in (
        ("cifar10.npz", None, "cifar10", True),  # of the oldest runs
        ("cifar10", FACTS | {"train": 7}, "cifar10", True),  # torchvision's
        ("a/cifar10.npz", FACTS, "cifar10", True),
        ("a/renamed.npz", FACTS | CIFAR100, "cifar100", True),
        ("a/cifar10.npz", FACTS | {"mean": [0.5, 0.48216, 0.44653]}, "a/cifar10.npz", False),
        ("a/cifar10.npz", FACTS | {"train": 49000}, "a/cifar10.npz", False),
        ("a/cifar10.npz", FACTS | {"test": 500}, "a/cifar10.npz", False),
        ("a/cifar10.npz", FACTS | {"crc32": results.CRC32}, "cifar10", True),
        ("cifar10.npz", FACTS | {"crc32": 1}, "cifar10.npz", False),  # with labels of its own
    ):
        found = result("slat", 0, 50.0, 30.0, dataset=name, usual=["dataset", "data"], data=data) | {"dataset": name}
        (row,) = rows_of(cli, tmp_path, [found])
        assert row[2] == shown and ("(" in row[7]) == paper, (name, data)
    own = [FACTS | {"train": n} for n in (5, 6)]
    own = [result("slat", i, 50.0, 30.0, dataset="x.npz", usual=["data"], data=data) for i, data in enumerate(own)]
    assert len(rows_of(cli, tmp_path, own)) == 2  # of one name
    moved = result("slat", 2, 50.0, 30.0, dataset="b/x.npz", usual=["data"], data=own[0]["training"]["data"])
    assert [row[2] for row in rows_of(cli, tmp_path, [own[0], moved])] == ["b/x.npz, x.npz"]
    for flag in ("eps", "eta"):
        files = write_results(tmp_path, [r | {"training": r["training"] | {"eta": 1, "input_step": 0.9}} for r in own])
        assert cli(figures, f"{flag} {' '.join(files)} --out {tmp_path / 'x'}")[0] == 2


def test_a_run_without_metrics_has_no_minutes(cli, tmp_path):
    damaged = result("slat", 0, 50.0, 30.0, usual=["last_epoch"], last_epoch=None)
    damaged["training"]["seconds"] = None
    (row,) = rows_of(cli, tmp_path, [damaged])
    assert row[4] == "8" and row[10] == "-"
    (row,) = rows_of(cli, tmp_path, [damaged, result("slat", 1, 52.0, 32.0)])
    assert row[10] == "2.0 [1 of 2]"


def test_runs_of_one_name_are_both_drawn(cli, runs, tmp_path):
    """Folders a/slat and b/slat of the same flags and seed; a folder that is named twice is drawn once."""
    slat, fgsm = runs.split()
    for folder in "ab":
        for run in (slat, fgsm):
            shutil.copytree(run, tmp_path / folder / Path(run).name)
    paths = [f"{tmp_path}/{name}" for name in ("a/slat", "b/slat", "a/fgsm", "b/fgsm")]
    assert cli(figures, f"curves {' '.join(paths)} --out {tmp_path / 'x'}")[0] == 0
    assert sorted(written(tmp_path / "x")) == sorted(paths)
    code, _, err = cli(figures, f"curves {slat} {slat}/ {fgsm} --out {tmp_path / 'x'}")
    assert code == 0 and err == "note: what is named twice counts once\n"
    assert list(written(tmp_path / "x")) == ["SLAT", "FGSM"]
    configs = [json.loads(Path(slat, "config.json").read_text())] * 4
    # a is the name of two pairs
    labels = [label for label, _ in figures.legends(["slat/a", "fgsm/a", "$x$", "_y"], configs)]
    assert labels == ["slat/a", "fgsm/a", r"\$x\$", "./_y"]


def test_figures_say_which_images_they_used(cli, runs, tmp_path):
    slat, _ = runs.split()
    own, small = SMALL.split()[1], str(tmp_path / "small.npz")
    np.savez(small, **{key: value[:8] for key, value in np.load(own).items()})
    for command in ("grad-norm", "linearity --points 3", "landscape --points 3 --seed 5"):
        for flags, used in (("--n 5", {"dataset": own, "n": 5}), (f"--dataset {small}", {"dataset": small, "n": 8})):
            assert cli(figures, f"{command} {slat} {flags} --device cpu --out {tmp_path / 'x'}")[0] == 0
            numbers = written(tmp_path / "x")
            assert numbers["images"] == used and numbers.get("seed", 5) == 5
    for folder, dataset in (("a", small), ("b", own)):
        shutil.copytree(slat, tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {"dataset": dataset}))
    command = f"grad-norm {tmp_path}/a {tmp_path}/b --n 30 --device cpu --out {tmp_path / 'x'}"
    assert cli(figures, command)[0] == 0
    assert written(tmp_path / "x")["images"]["a"] == {"dataset": small, "n": 8}
    assert written(tmp_path / "x")["images"]["b"]["n"] == 30


def test_collapses_are_counted_over_seeds(cli, tmp_path):
    """Below 5 %, or below a third of the best epoch; a seed that ran twice counts once; other flags have no row."""
    found = [result("fgsm", seed, 50.0, pgd) for seed, pgd in enumerate((30.0, 9.0, 4.9, 32.0, 11.0))]
    found += [result("fgsm", 3, 52.0, 3.0), result("fgsm", 6, 50.0, 1.0, alpha=0.9)]
    files = write_results(tmp_path, found)
    for i, epochs in enumerate(([10, 31], [28, 8, 12, 9, 9], [], [1, 20], [30, 9, 12])):
        folder = tmp_path / "runs" / Path(files[i]).stem
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(f'{{"test_pgd10": {pgd10}}}\n' for pgd10 in epochs))
    out = cli(figures, f"table {' '.join(files)}")[1]
    (row,) = [line for line in out.partition("## All runs")[0].splitlines() if line.startswith("| FGSM")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[5:] == ["5", "3", "4, ?", "50.0 (50.0 to 50.0)", "20.5 (11.0 to 30.0)"]
    for last, log in (({"test_pgd10": 31}, [10, 31]), ({"test_pgd10": 12}, [])):  # the folder may hold another run now
        evaluated = found[0] | {"path": files[0], "training": found[0]["training"] | {"last_epoch": last}}
        assert results.per_epoch(evaluated, "test_pgd10") == log


def test_markdown_survives_what_is_in_names(cli, tmp_path):
    folder = tmp_path / "a (copy) [1]"
    folder.mkdir()
    found = result("slat", 0, 50.0, 30.0, hardware="CPU | GPU")
    (path,) = write_results(folder, [found])
    (tmp_path / "t.notes.md").write_bytes(b"caf\xe9\n")
    with mock.patch.object(sys, "argv", ["figures", "table", path, "--out", str(tmp_path / "t")]):
        console.launch(figures.main)
    text = (tmp_path / "t.md").read_bytes()
    assert b"| CPU / GPU | [0](a%20%28copy%29%20%5B1%5D/0.json) |" in text and text.endswith(b"\ncaf\xe9\n")


def test_a_sweep_knows_data_by_their_content(cli, refused, tmp_path, monkeypatch):
    arrays = dict(np.load(TINY))
    flags = f"latent-eta --small --runs {tmp_path}/runs --results {tmp_path}"

    def names(dataset):
        lines = cli(sweep, f"{flags} --dataset {dataset}")[1].splitlines()
        return [Path(shlex.split(line)[-1]).stem for line in lines]

    for folder, change in (("a", {}), ("b", {"train_y": arrays["train_y"][::-1]}), ("c", {})):
        (tmp_path / folder).mkdir()
        labels = {"test_y": arrays["test_y"].astype(np.int64)} if folder == "c" else {}
        np.savez(tmp_path / folder / "cifar10.npz", **arrays | change | labels)
    a, b, c, plain = map(names, (*(f"{tmp_path}/{folder}/cifar10.npz" for folder in "abc"), "cifar10"))
    assert a == c and len({*a, *b, *plain}) == 18 and plain[0] == "slat_wrn10-2_epochs8_eps8_eta-0.6_seed0"
    assert names("cifar100")[0] == "slat_cifar100_wrn10-2_epochs8_eps8_eta-0.6_seed0"
    monkeypatch.setattr(sweep, "CRC32", int(a[0].split("_")[1].split("-")[1], 16))
    assert names(f"{tmp_path}/a/cifar10.npz") == plain
    refused(sweep, f"{flags} --dataset {tmp_path}/none.npz", "none.npz")
    # A result in the place of another one.
    found = {"n": 1000, "search_precision": "bf16", "attacks": {"pgd-50-10": 1, "autoattack": 1}}
    training = {"dataset": "cifar10.npz", "data": FACTS}
    for change, left in (
        ({"training": training}, 5),
        ({"training": training | {"data": FACTS | {"train": 9}}}, 6),
        ({"training": training, "dataset": "other.npz"}, 6),
        ({"training": training, "seed": 3}, 6),
        ({"training": training, "step_size": 0.1}, 6),
    ):
        (tmp_path / f"{plain[0]}.json").write_text(json.dumps(found | change))
        assert len(names("cifar10")) == left, change


def test_more_images_than_there_are_count_as_all(cli, tmp_path):
    flags = f"latent-eta --depth 10 --width 2 --epochs 8 --dataset {TINY} --runs {tmp_path}/runs --results {tmp_path}"
    line, *_ = cli(sweep, flags)[1].splitlines()
    found = {"n": 500, "search_precision": "bf16", "attacks": {"pgd-50-10": 1, "autoattack": 1}}
    Path(shlex.split(line)[-1]).write_text(json.dumps(found))
    for asked, left in (("", 5), ("--n 100000", 5), ("--n 499", 6)):
        assert len(cli(sweep, f"{flags} {asked}")[1].splitlines()) == left


def test_lines_of_a_sweep_can_be_run_again_and_again(cli, refused, tmp_path):
    """They resume what is there, whatever was there when they were printed, and no two evaluations share a state."""
    places = f"--runs {tmp_path}/runs --results {tmp_path}/results --small"
    states = set()
    for asked in ("", "--n 7", "--attack pgd", "--search-precision fp32", "--best", "--eps 4"):
        lines = cli(sweep, f"literal {places} {asked}")[1].splitlines()
        for train, *evaluations in (line.split(" && ") for line in lines):
            assert train.endswith(" --resume")
            found = {words[words.index("--state") + 1] for words in map(shlex.split, evaluations)}
            assert len(found) == len(evaluations) and len(found & states) == (asked == "--best")
            states |= found
            assert all(("eps4_" in state.rpartition("/")[2]) == (asked == "--eps 4") for state in found)
    assert len(cli(sweep, f"literal {places} --seeds 1,0,1")[1].splitlines()) == 2
    for flags, message in (("--seeds=-1", "--seeds"), ("--seeds 9999999999", "--seeds"), ("--depth 11", "--depth")):
        refused(sweep, f"literal {places} {flags}", message)
    (line,) = cli(sweep, f"literal {places} --eps 7.99999999")[1].splitlines()
    assert line.count("--eps 7.99999999 ") == 2 and "_eps7.99999999_" in line
