"""`make check-results`: in README and docs every link leads somewhere, every command is understood, every number is
that of results/. Not part of `make test`, so that a fork of the code need not carry our prose."""

import glob
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval_attacks
from conftest import SCRIPTS, parsed
from paper import bench, figures, slat_hidden, sweep
from paper.results import PAPER, collapse, collapse_bound, mean_std

DOCS = [Path("README.md"), Path("data/README.md"), Path("results/RESULTS.md"), *sorted(Path("docs").glob("*.md"))]
PAGES = [*DOCS, Path("results/DIARY.md")]
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def headings(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|github\.com/[\w-]+/[\w.-]+)$", link), link
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in headings(target), f"{page}: {link}"


def commands(page):
    """Every python command of a page, in a block or in a line: [program, flag, ...], without pipes and redirections."""
    for block in map("".join, re.findall(r"```sh\n(.*?)```|`(python [^`]*)`", page.read_text(), re.S)):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            _, found, rest = re.split("[#|>]", line)[0].partition("python ")
            if found:
                yield shlex.split(rest)


@every_page
def test_commands_are_understood(cli, page):
    for words in commands(page):
        if words[0] == "-m":
            module = importlib.import_module(words[1])
            part = "".join(words[2:3]) if re.match("[a-z]", "".join(words[2:])) else ""
            code, out, _ = cli(module, f"{part} --help")
            flags = {word for word in words if word.startswith("--")}
            assert code == 0 and part in out and flags <= set(re.findall(r"--[a-z-]+", out)), words
        elif words[0].startswith("tests/"):
            assert Path(words[0]).exists(), words
        else:
            parsed(importlib.import_module(words[0].removesuffix(".py")), shlex.join(words[1:]))


def test_flags_in_the_text_exist(cli):
    helps = "".join(cli(module, "--help")[1] for module in (*SCRIPTS.values(), eval_attacks, sweep, bench, slat_hidden))
    for page in DOCS:
        for code in re.findall(r"`(--[^`]*)`", page.read_text()):
            assert set(re.findall(r"--[\w-]+", code)) <= set(re.findall(r"--[\w-]+", helps)), f"{page}: {code}"


def cell(results, digits=1):
    """Clean / PGD-50-10 / AutoAttack, mean over seeds, a seed that ran twice being one; '-' where there is none."""
    seeds = {}
    for result in results:
        seeds.setdefault(result["training"]["seed"], []).append((result["clean"], *figures.robust_under(result)))
    columns = zip(*([mean_std(column)[0] for column in zip(*found)] for found in seeds.values()))
    means = [mean_std(column)[0] for column in columns]
    return " / ".join("-" if mean is None else f"{mean:.{digits}f}" for mean in means) or "not run"


def at_defaults(name, eps, seed="?"):
    """The results of a method at its defaults: 8 epochs, or 2 for Free-AT and YOPO; a seed may have run twice."""
    files = f"{name}_wrn10-2_epochs{2 if name in ('free', 'yopo') else 8}_eps{eps}_seed{seed}*.json"
    found = [path for path in Path("results/cpu").glob(files) if "best" not in path.name]
    return [figures.read_json(path) | {"path": path} for path in found]


def test_tables_and_counts_are_what_was_measured():
    readme = re.sub(r"[^\S\n]+", " ", Path("README.md").read_text())
    steps = json.loads(Path("results/bench/steps_wrn16-2.json").read_text())["result"]["steps"]
    rows = re.findall(r"^\| `train_(\w+)\.py` \| .* \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", readme, re.M)
    measured = {name for name in SCRIPTS if at_defaults(name, 8, seed=0)}  # what has no numbers yet is not listed
    assert {name for name, *_ in rows} == measured and len(rows) >= 12
    for name, cost, at_16, collapsed, at_8 in rows:
        results = {eps: at_defaults(name, eps) for eps in (8, 16)}
        assert cost.removesuffix(" a replay") == f"{steps[name]['measured']:.1f}"
        assert [at_8, at_16] == [cell(found, 0) for found in results.values()], name
        under_pgd = [result for result in results[16] if figures.robust_under(result)[0] is not None]
        lost = {result["training"]["seed"] for result in under_pgd if collapse(result)}
        assert collapsed == f"{len(lost)} of {len({r['training']['seed'] for r in under_pgd})}", name
        line = "%): eps 8: {}; eps 16: {}.\n".format(*map(cell, results.values()))
        assert SCRIPTS[name].__doc__.endswith(line), f"train_{name}.py"
    for s in steps.values():
        row = f"{s['counted']:.2f} | {s['measured']:.2f} | {100 * s['spread']:.0f} % | {s['ms']:.0f} | "
        row += f"{s['images_per_second']:.0f} | {s['peak_bytes'] / 1e6:.0f} |"
        assert row.replace("| 0 %", "| ") in Path("docs/performance.md").read_text()
    slat = Path("results").glob("[cg]pu/runs/slat*/config.json")
    slat = [path for path in slat if '"dropout": 0.3' in path.read_text()]
    files = [path for name in ("slat", "fgsm") for path in Path("results/cpu").glob(f"{name}_wrn10-2_epochs8_*.json")]
    training = [figures.read_json(path)["training"] for path in files]
    minutes = [run["seconds"] / 60 for run in training if run["precision"] == "bf16"]
    assert f"none of {len(slat)} runs" in readme
    assert f"{min(minutes):.0f} to {max(minutes):.0f} minutes" in Path("docs/performance.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "results/RESULTS.md"])
def test_accuracies_in_the_text_are_what_was_measured(page):
    """Each `a / b` and `a / b / c` is a result, a mean over seeds, clean / PGD-10 after an epoch, or the paper's."""
    results = {path.stem: figures.read_json(path) for path in Path("results").glob("[cg]pu/*.json")}
    setups = {name: re.sub(r"_seed\d(_again|_autoattack)?", "", name) for name in results}
    keys = {*setups, *setups.values()}
    digits = 0 if page == "README.md" else 1
    measured = {cell((r for name, r in results.items() if key in (name, setups[name])), digits) for key in keys}
    known = set(measured)
    known |= {" / ".join(f"{value:.1f}" for value in values if value is not None) for values in PAPER.values()}
    known |= {text.rpartition(" / ")[0] for text in known}
    for path in Path("results").glob("[cg]pu/runs/*/metrics.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            known.add(f"{line['test_clean']:.1f} / {line['test_pgd10']:.1f}")
    triple = r"(?<![\d.])\d+\.\d(?: / (?:\d+\.\d|-)(?!\d))+"
    text = re.sub(r"\s+", " ", Path(page).read_text())
    found = set(re.findall(triple, text))
    if page == "README.md":  # has no decimals
        assert not found
        found = set(re.findall(r"(?<![\d./])\d+(?: / \d+){1,2}(?![\d.]| /)", text))
        known = measured
    assert len(found) > 10 and found <= known, found - known


def metrics(*patterns):
    """The epochs of each run in results/ that fits one of these patterns, by seed."""
    paths = [path for pattern in patterns for path in glob.glob(f"results/{pattern}/metrics.jsonl")]
    return [figures.read_json(path) for path in sorted(paths, key=lambda path: int(re.findall(r"\d+", path)[-1]))]


def test_small_runs_collapse_as_the_course_says():
    """The tables of docs/collapse.md: PGD-10 accuracy at the end, by seed, and how often it is below 10 %."""
    page = Path("docs/collapse.md").read_text()
    methods = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d, ]+) \| (.*) \|$", page, re.M)
    steps = re.findall(r"^\| `(\w+)`: [^|]* \| ([\d, ]+) \| (.*) \|$", page, re.M)
    assert len(methods) >= 5 and len(steps) == 6
    rows = [(f"{name.lower().replace('-', '_')}_dropout-{dropout}", *row) for name, dropout, *row in methods]
    of_steps = {way: "slat" if way == "label" else f"slat_hidden_hidden-{way}" for way, *_ in steps}
    rows += [(f"{of_steps[way]}_dropout-0", *row) for way, *row in steps]
    for i, (folder, accuracies, collapsed) in enumerate(rows):
        found = [run[-1]["test_pgd10"] for run in metrics(f"collapse/{folder}_seed?")]
        assert accuracies == ", ".join(f"{value:.0f}" for value in found), folder
        assert collapsed == f"{sum(value < 10 for value in found)} of {len(found)}", folder
        assert i >= len(methods) or all(value < 10 or value >= 24 for value in found)


def test_early_collapses_are_what_the_pages_say():
    """After the first epoch on the complete data; alignment after the second of the small runs tells what comes."""
    course = re.sub(r"\s+", " ", Path("docs/collapse.md").read_text())
    whole = re.sub(r"\s+", " ", Path("results/RESULTS.md").read_text())
    results = whole.partition("### Stopped early")[2]
    rows = re.findall(r"\| (\S+|SLAT, `--hidden (\w+)`) \| (\d+) \| (0\.[\d., ]+) \| ([\d, ]+) \|", results)
    assert len(rows) >= 8
    for name, hidden, eps, alignments, accuracies in rows:
        method, way = ("slat_hidden", f"_hidden-{hidden}") if hidden else (name.lower().replace("-", "_"), "")
        run = f"{method}_wrn10-2_epochs8_eps{eps}{way}_dropout-0_seed*[0-9]"
        found = metrics(f"cpu/runs/{run}", f"first/{run}")
        assert alignments == ", ".join(f"{run[0]['alignment']:.2f}" for run in found), name
        assert accuracies == ", ".join(f"{run[0]['test_pgd10']:.0f}" for run in found), name
    runs = metrics("[cg]pu/runs/*")
    sound = [[epoch["test_pgd10"] for epoch in run] for run in runs if run[0]["alignment"] > 0.86]
    later = sum(pgd10[-1] < collapse_bound(pgd10) for pgd10 in sound)
    counts = f"Of the {len(runs)} runs in `cpu/runs` and `gpu/runs` {len(sound)} have an alignment of 0.86 or more"
    assert f"{counts} after the first epoch. Of these {later} end collapsed" in whole
    small = metrics("collapse/*")
    lost = [run[1]["alignment"] for run in small if run[-1]["test_pgd10"] < 10]
    kept = [run[1]["alignment"] for run in small if run[-1]["test_pgd10"] >= 10]
    said = f"at most {max(lost):.2f} in the {len(lost)} runs that collapse, {min(kept):.2f} or more in the other"
    assert f"{said} {len(kept)}." in course
    for epochs, where in (("1-2", "SLAT ends at {} and {} % (0 of 5"), ("3-12", "in the other ten at {} and {} %.")):
        ends = [f"{run[-1]['test_pgd10']:.0f}" for run in metrics(f"collapse/*_dropout-epochs-{epochs}_*")]
        assert where.format(", ".join(ends[:-1]), ends[-1]) in results


def test_what_the_steps_tell_is_what_the_course_says():
    told = [run for run in figures.read_json("results/figures/told.json")["runs"].values() if "its label" in run]
    assert len(told) == 8
    others, page = "another image's label", re.sub(r"\s+", " ", Path("docs/collapse.md").read_text())

    def bounds(kind, key):
        values = [run[kind][key] for run in told]
        return f"{min(values):.0f} to {max(values):.0f} %"

    assert f"reads that class in {bounds('a wrong class', 'read by the probe')} of cases" in page
    assert f"in {bounds(others, 'hidden')} of cases, as without steps ({bounds(others, 'no step')})" in page
    lost = [run[others] for run in told if run["test_pgd10"] < 10]
    assert len(lost) == 5
    (less, second, had), (more, first, before) = sorted(
        (run["input"] - run["no step"], run["input"], run["no step"]) for run in lost
    )[-2:]
    assert less < 4 < more
    said = f"one of five collapsed networks does, in {first:.0f} % of cases, where it had {before:.0f} (a second: "
    assert f"{said}{second:.0f} and {had:.0f}, not distinguishable)" in page


def test_committed_figures_and_table_are_what_the_results_say(cli, monkeypatch):
    """Those that need no network: the commands of remake.sh, expanded by the shell, give the committed numbers."""
    script, remade = "results/figures/remake.sh", {}
    out = subprocess.run(["bash", "-c", f'python() {{ echo "$@"; }}; . {script}'], capture_output=True, text=True)
    commands = [line.split()[2:] for line in out.stdout.splitlines() if "-m paper.figures" in line]
    monkeypatch.setattr(figures, "write", lambda name, figure, numbers: remade.update({name: numbers}))
    for words in commands:
        if words[0] in ("curves", "alignment", "eps", "eta", "dropout"):
            assert cli(figures, " ".join(words))[0] == 0
    assert len(remade) == 12
    for name, numbers in remade.items():
        assert json.loads(Path(f"{name}.json").read_text()) == numbers, f"remake {name}: bash {script}"
    table = cli(figures, " ".join(["table", *glob.glob("results/[cg]pu/*.json")]))[1].replace("](results/", "](")
    assert Path("results/RESULTS.md").read_text() == table + "\n" + Path("results/RESULTS.notes.md").read_text()


def test_the_readmes_lines_are_slat(trained):
    """Executed as they stand, they give the images, perturbations and loss of train_slat.slat."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S) if "delta[name]" in c]
    model, x, y = trained
    layers, eps = ["0", "conv1", "conv2"], 8 / 255
    names = dict(torch=torch, F=F, model=model, x=x.clone(), y=y, layers=layers, eps=eps, eta=eps, input_step=0.9 * eps)
    exec(code, names)
    x_adv, delta = SCRIPTS["slat"].slat(model, x, y, eps, layers, eps, 0.9 * eps)
    assert torch.equal(names["x_adv"], x_adv) and all(torch.equal(names["delta"][name], delta[name]) for name in delta)
    assert names["loss"] == F.cross_entropy(model(x_adv, delta=delta), y)
