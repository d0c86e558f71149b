"""README and docs: every link leads somewhere, every command is understood, every number is that of results/."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import SCRIPTS
from paper import figures

PAGES = [Path("README.md"), Path("data/README.md"), Path("results/RESULTS.md"), *sorted(Path("docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def headings(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("http"):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|github\.com/[\w-]+/[\w.-]+)$", link), link
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in headings(target), f"{page}: {link}"


def commands(page):
    """Every python command in a page's code blocks: [program, flag, ...], without pipes and redirections."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if "python" in words:
                words = words[words.index("python") + 1 :]
                cut = [i for i, word in enumerate(words) if word in ("|", ">", "2>")]
                yield words[: cut[0]] if cut else words


@every_page
def test_commands_are_understood(cli, monkeypatch, page):
    for words in commands(page):
        if words[0] == "-m":
            module = importlib.import_module(words[1])
            code, out, _ = cli(module, "--help")
            if len(words) > 2 and re.match(r"[a-z]", words[2]):
                assert words[2] in out, words
                sub = cli(module, f"{words[2]} --help")
                out += sub[1] if sub[0] == 0 else ""
            flags = {word for word in words[2:] if word.startswith("--")}
            assert code == 0 and flags <= set(re.findall(r"--[a-z-]+", out)), words
        elif words[0].startswith("tests/"):
            assert Path(words[0]).exists(), words
        else:
            module = importlib.import_module(words[0].removesuffix(".py"))
            monkeypatch.setattr(sys, "argv", words)
            module.parse_args()


def mean_cell(name, eps):
    """Clean / PGD-50-10 / AutoAttack of a method at its defaults, 8 epochs or fewer: mean over the seeds there are."""
    results = map(figures.read_json, Path("results/cpu").glob(f"{name}_wrn10-2_epochs?_eps{eps}_seed*.json"))
    columns = zip(*((result["clean"], *figures.robust_under(result)) for result in results))
    means = [figures.mean_std(column)[0] for column in columns]
    return " / ".join("-" if mean is None else f"{mean:.1f}" for mean in means) or "not run"


def test_the_readmes_table_of_methods_is_what_was_measured():
    rows = re.findall(r"^\| `train_(\w+)\.py` \| .* \| ([^|]+) \| ([^|]+) \|$", Path("README.md").read_text(), re.M)
    assert {name for name, *_ in rows} == SCRIPTS.keys()
    bench = json.loads(Path("results/bench/steps_wrn16-2.json").read_text())["result"]["steps"]
    for name, cost, cell in rows:
        measured = bench[name]["measured"]
        assert cost == f"{measured:.2f}" or cost == f"{measured:.2f} a replay"
        assert cell == mean_cell(name, 16), name


def test_the_readmes_lines_are_slat(trained):
    """Executed as they stand, they give the images, perturbations and loss of train_slat.slat."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S) if "delta[name]" in c]
    model, x, y = trained
    layers, eps = ["0", "conv1", "conv2"], 8 / 255
    names = {"torch": torch, "F": F, "model": model, "x": x.clone(), "y": y, "layers": layers}
    names |= {"eps": eps, "eta": eps, "input_step": 0.9 * eps}
    exec(code, names)
    x_adv, delta = SCRIPTS["slat"].slat(model, x, y, eps, layers, eps, 0.9 * eps)
    assert torch.equal(names["x_adv"], x_adv) and all(torch.equal(names["delta"][name], delta[name]) for name in delta)
    assert names["loss"] == F.cross_entropy(model(x_adv, delta=delta), y)


def test_the_readme_is_short():
    assert len(Path("README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_docstring_ends_with_what_was_measured(name):
    (found,) = re.findall(r"^Result, WRN-10-2, .*: eps 8: (.*); eps 16: (.*)\.$", SCRIPTS[name].__doc__, re.M)
    assert found == (mean_cell(name, 8), mean_cell(name, 16))
