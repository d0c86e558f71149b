"""paper/: figures, sweep and toy_2d: their numbers, their files, and that what they print can be run."""

import argparse
import glob
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, train
from paper import figures, sweep, toy_2d
from wrn import LAYERS, load_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a SLAT and an FGSM run."""
    folder = tmp_path_factory.mktemp("runs")
    return " ".join(str(train(method, 3, folder / method)) for method in ("slat", "fgsm"))


def written(name):
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in name.with_suffix(".svg").read_bytes()
    return json.loads(name.with_suffix(".json").read_text())


# ---------------------------------------------------------------- toy_2d.py


def test_the_grid_finds_the_worst_case_of_a_linear_boundary():
    model = toy_2d.Net(2)
    with torch.no_grad():  # relu(s) - relu(-s) = s, with s = w x
        w = torch.tensor([1.0, 3.0])
        model.first.weight.copy_(torch.stack([w, -w]))
        model.first.bias.zero_()
        model.second.weight.copy_(torch.tensor([[1.0, -1.0]]))
        model.second.bias.zero_()
    x, y = toy_2d.sample(500, 0)
    for eps in (0.0, 0.05, 0.1):
        right = (2 * y - 1) * (x @ w) > eps * w.abs().sum()
        assert toy_2d.accuracy(model, x, y, eps) == pytest.approx(100 * right.double().mean().item())
    assert toy_2d.lean(model, x) == pytest.approx(75)


def test_toy(cli, tmp_path):
    assert cli(toy_2d, f"--seeds 1 --out {tmp_path / 'toy'}")[0] == 0
    results = written(tmp_path / "toy")["results"]
    lean = {name: row["lean"][0] for name, row in results.items()}
    assert lean["FGSM"] > 80 > lean["standard"] > 60 > 52 > lean["SLAT, eta 0.1"] > lean["SLAT, eta 0.3"]
    assert results["SLAT, eta 0.1"]["within 0.15"][0] > results["FGSM"]["within 0.15"][0] + 10
    assert all(row["clean"][0] > 95 for row in results.values())


# ---------------------------------------------------------------- figures.py


def test_figures_of_metrics(cli, runs, tmp_path):
    for command, key in (("curves", "test_pgd10"), ("alignment", "alignment")):
        code, out, err = cli(figures, f"{command} {runs} --out {tmp_path / command}")
        assert code == 0 and not err
        numbers = written(tmp_path / command)
        rows = [json.loads(line) for line in Path(f"{runs.split()[0]}/metrics.jsonl").read_text().splitlines()]
        assert numbers["SLAT"][key] == [row[key] for row in rows] and list(numbers) == ["SLAT", "FGSM"]
        assert numbers["SLAT"]["share"] == pytest.approx([1 / 3, 2 / 3, 1])


def test_figures_of_networks(cli, runs, tmp_path, tiny):
    for command, flags in (("grad-norm", ""), ("linearity", "--points 3 --eps 2"), ("landscape", "--points 3 --eps 2")):
        code, out, err = cli(figures, f"{command} {runs} --n 12 {flags} --device cpu --out {tmp_path / command}")
        assert code == 0 and not err, err
    model = load_model(runs.split()[0])
    x, y = tiny.test(12)

    norms = torch.zeros(5)
    error = 0.0
    for image, label in zip(x, y):  # one image at a time
        logits, h = model(image[None].requires_grad_(), return_features=True)
        loss = F.cross_entropy(logits, label[None])
        found = torch.autograd.grad(loss, [h[name] for name in LAYERS])
        norms += torch.tensor([g.abs().sum() for g in found]) / 12
        d = 2 / 255 * found[1].sign()
        after = F.cross_entropy(model(image[None], delta={"conv1": d}), label[None])
        error += (after - loss - (found[1] * d).sum()).abs().item() / 12
    numbers = written(tmp_path / "grad-norm")["l1"]["SLAT"]
    assert list(numbers) == list(LAYERS) and list(numbers.values()) == pytest.approx(norms.tolist(), rel=1e-3)
    assert written(tmp_path / "linearity")["error"]["SLAT"]["conv1"][-1] == pytest.approx(error, rel=0.05)

    surface = torch.tensor(written(tmp_path / "landscape")["loss"]["SLAT"])
    assert surface[1, 1].item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)
    assert (surface[2] > surface[0]).all(), "the loss rises along the sign of its gradient"


def result(method, seed, clean, pgd, autoattack=None, usual=(), **flags):
    """What eval_attacks.py --json writes of a run; usual: those of its flags that are the defaults."""
    config = {"method": method, "depth": 10, "width": 2, "epochs": 8, "eps": 8.0, "dropout": 0.3, "seed": seed}
    config |= {"hardware": "a CPU", "seconds": 60.0 * (seed + 1), "dataset": "cifar10.npz", **flags}
    config["not_default"] = ["depth", "width", *(flag for flag in flags if flag not in usual)]
    attacks = {"pgd-50-10": pgd} | ({"autoattack": autoattack} if autoattack else {})
    return {"clean": clean, "attacks": attacks, "n": 100, "eps": config["eps"], "training": config}


def write_results(folder, results):
    """Paths of JSON files with these results."""
    files = [folder / f"{i}.json" for i in range(len(results))]
    for file, content in zip(files, results):
        file.write_text(json.dumps(content))
    return files


def check_legend(figure):
    """The only legend lies within the figure and hides nothing of the axes, which stay large."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole, axis = legend.get_window_extent(), figure.bbox, figure.axes[0]
    assert 0 <= box.x0 and box.x1 <= whole.x1 and 0 <= box.y0 and box.y1 <= whole.y1
    assert box.y1 < axis.get_tightbbox().y0 or box.x0 > axis.get_tightbbox().x1
    assert axis.get_window_extent().height > 2.4 * figure.dpi and axis.get_window_extent().width > 4 * figure.dpi
    return legend


def test_legends_tell_runs_apart():
    def config(method="slat", seed=0, **flags):
        return {"method": method, "seed": seed, "eps": 8.0, **flags, "not_default": ["eps", *flags]}

    base = config(batch_size=64)
    for other, expected in (
        (config(batch_size=64), ["a", "b"]),  # the folders
        (config(batch_size=64, seed=1), ["SLAT, seed 0", "SLAT, seed 1"]),
        (config(batch_size=64, dropout=0.0), ["SLAT", "SLAT, dropout 0"]),
        (config(batch_size=64, eta=0.5, layers=["0", "conv1"]), ["SLAT", "SLAT, eta 0.5, layers 0,conv1"]),
        (config(), ["SLAT, batch size 64", "SLAT"]),
        (config("fgsm", batch_size=64), ["SLAT", "FGSM"]),
        (config("fgsm", batch_size=64, alpha=4.0), ["SLAT", "FGSM, alpha 4"]),
        (config("new_one", batch_size=64), ["SLAT", "NEW-ONE"]),  # a method that figures.py does not know
    ):
        found = figures.legends(["runs/a", "runs/b"], [base, other])
        assert [label for label, _ in found] == expected
        for label, style in found:
            assert (style["markerfacecolor"] == "white") == (", " in label.split(", seed")[0])
        assert ([style["marker"] for _, style in found] == ["$0$", "$1$"]) == (other["seed"] == 1)


@pytest.mark.parametrize(
    "label", ["SLAT {}", "SLAT, dropout 0, seed {}", "slat_wrn10-2_epochs8_eps8_layers-0-conv1_seed{}"]
)
def test_a_legend_below_hides_nothing(label):
    pyplot = figures.pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i in range(9):
        axis.plot([0, 1], [i, 9 - i], label=label.format(i))
    axis.set(xlabel="share", ylabel="accuracy")
    figures.legend_below(figure, axis)
    check_legend(figure)
    pyplot.close(figure)


def test_table_and_figures_of_results(cli, tmp_path):
    results = [
        result("fgsm", 0, 60.0, 30.0),
        result("fgsm", 1, 62.0, 34.0, 0.5),
        result("slat", 0, 50.0, 31.0, 28.0, usual=["eta"], eta=1.0),
        result("slat", 0, 52.0, 32.0, 29.0, eta=0.6),
        result("slat", 0, 20.0, 1.0, usual=["eta"], layers=["0", "conv3", "conv4"], eta=1.0, latent_clamp=False),
        result("fgsm", 0, 61.0, 20.0, alpha=7.2, dropout=0),
        result("fgsm", 0, 61.0, 20.0, alpha=7.2),
        result("fgsm", 0, 30.0, 20.0, eps=16.0) | {"eps": 8.0},
    ]
    files = [str(file) for file in write_results(tmp_path, results)]
    code, out, err = cli(figures, f"table {' '.join(files)} --out {tmp_path / 'table'}")
    assert code == 0 and not err and (tmp_path / "table.md").read_text() == out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[-7:]]
    assert [row[:2] for row in rows] == [
        ["SLAT", ""],
        ["SLAT", "eta 0.6"],
        ["SLAT", "no latent clamp, layers 0,conv3,conv4"],
        ["FGSM", ""],
        ["FGSM", "alpha 7.2"],
        ["FGSM", "alpha 7.2, dropout 0"],
        ["FGSM", "trained with eps 16"],
    ]
    # The paper's numbers stand beside its own set-ups alone.
    clean = ["50.0 (85.9)", "52.0", "20.0", "61.0 ± 1.4 (87.4)", "61.0 (90.9)", "61.0", "30.0"]
    assert [row[7] for row in rows] == clean and {row[5] for row in rows} == {"8"} and rows[0][2] == "cifar10"
    assert rows[3][6] == "100" and rows[3][8:11] == ["32.0 ± 2.8 (0.0)", "0.5 [1 of 2] (0.0)", "1.5 ± 0.7"]
    assert [row[12] for row in rows[2:5]] == ["[0](4.json)", "[0](0.json), [1](1.json)", "[0](6.json)"]
    # --short leaves out what is the same in all rows: the network, epochs, eps and n.
    code, short, _ = cli(figures, f"table --short {files[2]} {files[4]} --out {tmp_path / 'short'}")
    assert code == 0 and short.splitlines() == [
        "| method | flags | clean | PGD-50-10 | AutoAttack | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| SLAT |  | 50.0 (85.9) | 31.0 (47.1) | 28.0 (44.6) | [0](2.json) |",
        "| SLAT | no latent clamp, layers 0,conv3,conv4 | 20.0 | 1.0 | not run | [0](4.json) |",
    ]
    (tmp_path / "table.notes.md").write_text("## Findings\n\nNone.\n")
    assert cli(figures, f"table {' '.join(files)} --out {tmp_path / 'table'}")[0] == 0
    assert (tmp_path / "table.md").read_text() == out + "\n## Findings\n\nNone.\n"
    code, out, err = cli(figures, f"eta {' '.join(files)} --out {tmp_path / 'eta'}")
    assert code == 0 and written(tmp_path / "eta") == {
        "SLAT": {"eta": [0.6, 1.0], "pgd-50-10": [[32], [31]], "autoattack": [[29], [28]], "clean": [[52], [50]]}
    }
    code, out, err = cli(figures, f"eps {' '.join(files)} --out {tmp_path / 'eps'}")
    assert code == 0 and {name: found["pgd-50-10"] for name, found in written(tmp_path / "eps").items()} == {
        "SLAT": [[31]],
        "FGSM": [[30, 34]],
    }
    for name, flags in (("wide", {"width": 10}), ("long", {"epochs": 30}), ("strong", {"eps": 16.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result("fgsm", 0, 80.0, 40.0, **flags)))
    for flags, message in (
        (f"eta {files[0]}", "--eta"),
        (f"eps {files[0]} {tmp_path / 'wide.json'}", "WRN-10-10 on 100 images of cifar10, WRN-10-2 on 100"),
        (f"eps {files[0]} {tmp_path / 'long.json'}", "fgsm after 30 epochs, fgsm after 8"),
        (f"dropout {files[0]} {tmp_path / 'strong.json'}", "of cifar10 at eps 16, WRN-10-2 on 100"),
    ):
        code, _, err = cli(figures, f"{flags} --out {tmp_path / 'figure'}")
        assert code == 2 and message in err and err.count("\n") == 1


def eps_figure(monkeypatch, folder, autoattack):
    """figures.eps of {(method, eps): AutoAttack's accuracy or None}."""
    results = [result(method, 0, 60.0, 42.0, value, eps=eps) for (method, eps), value in autoattack.items()]
    drawn = []
    monkeypatch.setattr(figures, "write", lambda name, figure, numbers: drawn.append(figure))
    figures.eps(argparse.Namespace(runs=write_results(folder, results), out="eps"))
    return drawn[0]


@pytest.mark.parametrize(("at_8", "in_legend"), [(35.0, "--"), (None, "None")])
def test_a_line_bridges_nothing_and_the_legend_shows_what_is_drawn(monkeypatch, tmp_path, at_8, in_legend):
    autoattack = {("fgsm", 4.0): 40.0, ("fgsm", 8.0): at_8, ("fgsm", 12.0): None, ("fgsm", 16.0): 1.0}
    figure = eps_figure(monkeypatch, tmp_path, autoattack)
    lines = {line.get_linestyle(): line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "None"}
    expected = {":": ["60.0"] * 4, "-": ["42.0"] * 4, "--": ["40.0", str(at_8 or "nan"), "nan", "1.0"]}
    assert {style: list(map(str, values)) for style, values in lines.items()} == expected
    legend = figure.legends[0]
    styles = [handle.get_linestyle() for handle in legend.legend_handles]
    shown = dict(zip([text.get_text() for text in legend.get_texts()], styles))
    assert shown == {"FGSM": "None", "clean": ":", "PGD-50-10": "-", "AutoAttack": in_legend}
    texts = eps_figure(monkeypatch, tmp_path, {("slat", 4.0): None, ("slat", 8.0): None}).legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["SLAT", "clean", "PGD-50-10"]


def test_a_legend_of_all_methods_and_of_new_ones_fits(monkeypatch, tmp_path):
    methods = [*figures.METHODS, *(f"new_{i}" for i in range(8))]
    figure = eps_figure(monkeypatch, tmp_path, {(method, eps): 30.0 for method in methods for eps in (8.0, 16.0)})
    handles = check_legend(figure).legend_handles
    assert len(handles) == len(methods) + 3
    assert len({handle.get_color() for handle in handles[: len(figures.METHODS)]}) == len(figures.METHODS)


def test_committed_tables_are_what_the_results_say(cli):
    """Each table of README and docs follows the command that made it; RESULTS.md was not edited by hand."""
    pages = [Path("README.md"), *Path("docs").glob("*.md")]
    made = r"<!-- python -m paper.figures (table .*?) -->\n(.*?\n)\n"
    found = [match for page in pages for match in re.findall(made, page.read_text(), re.S)]
    for command, text in found:
        words = [sorted(glob.glob(word)) if "*" in word else [word] for word in command.split()]
        assert cli(figures, " ".join(sum(words, []))) == (0, text, "")
    _, out, _ = cli(figures, " ".join(["table", *glob.glob("results/cpu/*.json")]))
    notes = Path("results/RESULTS.notes.md").read_text()
    assert Path("results/RESULTS.md").read_text() == out.replace("](results/", "](") + "\n" + notes


@pytest.mark.parametrize("content", ["", "[1]", '{"training": {}}', '{"training": {"method": "slat", "eps": "a"}}'])
def test_damaged_results_are_one_line(cli, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    for command in ("table", "eps", "dropout"):
        code, _, err = cli(figures, f"{command} {tmp_path / 'a.json'} --out {tmp_path / 'x'}")
        assert code == 2 and err.count("\n") == 1 and "a.json" in err or "none of these results" in err
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(content)
    code, _, err = cli(figures, f"curves {tmp_path} --out {tmp_path / 'x'}")
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("curves nowhere", "nowhere/config.json is missing"),
        ("grad-norm nowhere", "nowhere/config.json is missing"),
        ("curves {run} --out no/such/name", "no folder"),
        ("linearity {run} --layers conv9", "conv9"),
        ("landscape {run} --eps 999", "--eps"),
        ("table {run}/config.json", "does not say how the network was trained"),
        ("draw {run}", "draw"),
    ],
)
def test_errors_are_one_line(cli, runs, flags, message):
    code, _, err = cli(figures, flags.format(run=runs.split()[0]))
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("module", [figures, toy_2d])
def test_without_matplotlib_there_is_a_hint(cli, runs, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = f"curves {runs}" if module is figures else "--seeds 1 --steps 2"
    code, _, err = cli(module, f"{flags} --out {tmp_path / 'x'}")
    assert code == 2 and "pip install matplotlib" in err


# ---------------------------------------------------------------- sweep.py


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_every_printed_command_is_understood_by_its_script(cli, monkeypatch, tmp_path, name):
    code, out, _ = cli(sweep, f"{name} --seeds 0,1 --small --dataset {TINY} --results {tmp_path} --runs {tmp_path}")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * len(sweep.SWEEPS[name])
    for line in lines:
        train, evaluate = line.split(" && ")
        for command in (train, evaluate):
            _, script, *flags = shlex.split(command)
            module = importlib.import_module(script.removesuffix(".py"))
            monkeypatch.setattr(sys, "argv", [script, *flags])
            args = module.parse_args()
            if command == train:
                assert (args.depth, args.width) == (10, 2)
                assert args.epochs == (2 if "free" in line or "yopo" in line else 8)
                (tmp_path / args.out).mkdir(exist_ok=True)  # as the run would


def test_a_sweep_skips_what_is_done_and_resumes_what_is_broken(cli, tmp_path):
    flags = f"eta --runs {tmp_path}/runs --results {tmp_path}/results"
    lines = cli(sweep, flags)[1].splitlines()
    assert len(lines) == 6 and all("--resume" not in line for line in lines)
    names = [shlex.split(line)[-1].split("/")[-1].removesuffix(".json") for line in lines]
    (tmp_path / "results" / f"{names[0]}.json").write_text("{}")
    for name, file in ((names[1], "model.pt"), (names[2], "config.json")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text("{}")
    now = cli(sweep, flags)[1].splitlines()
    assert len(now) == 5
    assert now[0].startswith("python eval_attacks.py") and "train" not in now[0]
    assert "--resume &&" in now[1] and now[2:] == lines[3:]
    for name in names:
        (tmp_path / "results" / f"{name}.json").write_text("{}")
    code, out, err = cli(sweep, flags)
    assert code == 0 and out == "" and "nothing left" in err
