"""The demo's sentences against the numbers that it prints."""

import re

from paper import demo

LEAKS, OVERFITS = "reads the label off the very step", "catastrophic overfitting"


def said(*numbers):
    return " ".join(demo.verdict("X", *numbers))


def test_a_sentence_is_printed_only_if_the_numbers_are_so():
    assert LEAKS in said(30, 56, 0) and OVERFITS in said(30, 56, 0)
    assert LEAKS not in said(42, 28, 20) and OVERFITS not in said(42, 28, 20)
    assert LEAKS in said(30, 56, 40) and OVERFITS not in said(30, 56, 40)  # leaks, but withstands PGD
    assert LEAKS not in said(60, 50, 3) and OVERFITS in said(60, 50, 3)


def test_the_demo_says_what_its_networks_do(cli):
    code, out, _ = cli(demo, "")
    assert code == 0 and max(map(len, out.splitlines())) <= 80, out
    rows = {}
    for name in ("FGSM", "SLAT"):
        (row,) = re.findall(rf"^{name} +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
        rows[name] = clean, one_step, pgd = [float(value) for value in row]
        text = re.search(rf"^{name}: (.*?)(?:\n\n|\n\()", out + "\n(", re.M | re.S)[1]
        # Every number of the text is one of its row, rounded; nothing is said that they do not bear out.
        assert [int(value) for value in re.findall(r"\d+", text)] == [round(v) for v in (one_step, clean, pgd)], text
        text = " ".join(text.split())
        assert (LEAKS in text) == (one_step > clean) and ("no label leaking" in text) == (one_step <= clean), text
        assert (OVERFITS in text) == (pgd < one_step / 2) and ("not collapsed" in text) == (pgd >= one_step / 2), text
    # What the demo is there to show: one has collapsed, the other has not.
    assert rows["FGSM"][1] > rows["FGSM"][0] + 10 and rows["FGSM"][2] < 5, rows
    assert rows["SLAT"][1] < rows["SLAT"][0] and rows["SLAT"][2] > 10, rows
