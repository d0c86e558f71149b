"""Damaged, wrong and hostile files: each ends in one line, and none runs code."""

import argparse
import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

import common
import train_fgsm
from conftest import SMALL, assert_same, train
from wrn import load_file, load_model


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def saved(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def outcome(path, capsys):
    """The one line that load_arrays ends with."""
    with pytest.raises(SystemExit) as end:
        common.load_arrays(str(path), "data")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and path.name in error, error
    return error


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
GOOD = {"train_x": IMAGES, "train_y": np.arange(20) % 4, "test_x": IMAGES[:5], "test_y": np.arange(5) % 4}
BAD_DATA = {
    "float images": ({"train_x": IMAGES.astype(np.float32)}, "it must be uint8"),
    "four channels": ({"train_x": IMAGES.repeat(2, -1)[..., :4]}, "(N, H, W, 3)"),
    "no images": ({"train_x": IMAGES[:0], "train_y": GOOD["train_y"][:0]}, "it must be uint8"),
    "no pixels": ({"test_x": GOOD["test_x"][:, :0]}, "it must be uint8"),
    "other sizes": ({"test_x": GOOD["test_x"][:, :6]}, "the same H, W everywhere"),
    "labels too few": ({"train_y": GOOD["train_y"][:-1]}, "whole numbers (20,)"),
    "labels with fractions": ({"test_y": GOOD["test_y"] + 0.5}, "whole numbers (5,)"),
    "label below zero": ({"train_y": GOOD["train_y"] - 1}, "train_y has labels -1 to 2"),
    "label of no class": ({"test_y": GOOD["test_y"] + 3}, "test_y has labels 3 to 6, it must have 0 to 3"),
    "label without end": ({"train_y": GOOD["train_y"] + 10**9}, "0 to 999 at most"),
    "labels of 64 bits": ({"train_y": GOOD["train_y"].astype(np.uint64) + 2**63}, "0 to 999 at most"),
    "an array missing": ({"test_y": None}, "test_y"),
    "objects": ({"train_y": np.array([print] * 20)}, "no data set"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_wrong_data(tmp_path, capsys, name):
    path = tmp_path / "data.npz"
    path.write_bytes(saved({k: v for k, v in (GOOD | BAD_DATA[name][0]).items() if v is not None}))
    assert BAD_DATA[name][1] in outcome(path, capsys)


def test_damaged_and_hostile_data(cli, tmp_path, capsys):
    path, trap, packed = tmp_path / "data.npz", pickle.dumps(Payload(tmp_path / "pwned")), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in GOOD:
            file.writestr(f"{name}.npy", trap)
    for content in (trap, packed.getvalue(), saved(GOOD)[:-900], b"hello", b""):
        path.write_bytes(content)
        outcome(path, capsys)
    assert not (tmp_path / "pwned").exists()
    path.write_bytes(saved(GOOD))
    flags = f"--dataset {path} --depth 10 --width 1 --batch-size 4 --epochs 1 --device cpu --out {tmp_path / 'run'}"
    assert cli(train_fgsm, flags)[0] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run of one epoch."""
    return train("fgsm", 1, tmp_path_factory.mktemp("run") / "run")


def test_wrong_and_hostile_weights(checkpoint, tmp_path):
    good = torch.load(checkpoint / "model.pt", weights_only=True)
    weights, arguments = good["state_dict"], good["arguments"]
    bad = {
        "code": good | {"state_dict": Payload(tmp_path / "pwned")},
        "code in the arguments": good | {"arguments": Payload(tmp_path / "pwned")},
        "no dictionary": [1, 2],
        "weights are a list": good | {"state_dict": [1]},
        "a weight is text": good | {"state_dict": weights | {"fc.bias": "hello"}},
        "arguments are text": good | {"arguments": "hello"},
        "no depth that exists": good | {"arguments": arguments | {"depth": 11}},
        "another width": good | {"arguments": arguments | {"width": 2}},
        'missing.*"fc.bias"': good | {"state_dict": {k: v for k, v in weights.items() if k != "fc.bias"}},
        'unexpected.*"fc.scale"': good | {"state_dict": weights | {"fc.scale": weights["fc.bias"]}},
        "no arguments": {"state_dict": weights},
    }
    path = tmp_path / "model.pt"

    def refused(name):
        with pytest.raises(ValueError, match="model.pt") as error:
            load_model(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert "*" not in name or re.search(name, str(error.value), re.I), error.value

    for name, content in bad.items():
        torch.save(content, path)
        refused(name)
    for content in (
        pickle.dumps(Payload(tmp_path / "pwned")),
        (checkpoint / "model.pt").read_bytes()[:5000],
        b"no",
        b"",
    ):
        path.write_bytes(content)
        refused("content")
    path.unlink()
    refused("no file")
    assert not (tmp_path / "pwned").exists()
    load_model(checkpoint)


@pytest.mark.parametrize("new", [True, False])
def test_strangers_weights(tmp_path, new):
    """As any version of torch has saved them; code and numpy's scalars are named, not run."""
    path, weights = tmp_path / "weights.pt", {"w": torch.ones(3)}
    torch.save(weights, path, _use_new_zipfile_serialization=new)
    assert_same(load_file(path), weights)
    for extra, name in ((argparse.Namespace(lr=1), "argparse.Namespace"), (np.float64(3), "numpy.*scalar")):
        torch.save(weights | {"args": extra}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=f"weights.pt holds {name}, code that is not run: save"):
            load_file(path)


def test_a_flipped_bit_is_noticed(checkpoint, tmp_path):
    """Or does no harm: not every byte of a zip means something."""
    path, refused = tmp_path / "checkpoint.pt", 0
    content, whole = (checkpoint / "checkpoint.pt").read_bytes(), load_file(checkpoint / "checkpoint.pt")
    for i in range(100):
        flipped = bytearray(content)
        flipped[len(content) * i // 100 + i] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            assert_same(load_file(path), whole)
        except ValueError:
            refused += 1
    assert refused > 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("optimizer"), "does not fit"),
        (lambda s: s.update(extra=[1]), "does not fit"),
        (lambda s: s["rng"].update(cpu=torch.zeros(3)), "does not fit"),
        (lambda s: s.update(rng=5), "does not fit"),
        (lambda s: s.update(rows=5), "does not fit"),
        (lambda s: s.update(rows=[]), "does not fit"),
        (lambda s: s["state_dict"].pop("fc.bias"), "does not fit"),
        (lambda s: s["state_dict"]["fc.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_wrong_checkpoints(cli, checkpoint, tmp_path, change, message):
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"epochs": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 2 --out {tmp_path} --resume")
    assert code in (1, 2) and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"a"', "{}", '{"method": "slat"}'])
def test_a_damaged_config(cli, checkpoint, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes((checkpoint / "checkpoint.pt").read_bytes())
    (tmp_path / "config.json").write_text(content)
    code, _, err = cli(train_fgsm, f"{SMALL} --epochs 1 --out {tmp_path} --resume")
    assert code == 2 and err.count("\n") == 1 and ("damaged" in err or "cannot resume" in err)
