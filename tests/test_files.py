"""Damaged, wrong and hostile files: each ends in one line, and none runs code."""

import io
import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch

import train_fgsm
from conftest import SMALL, assert_same, run_main
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


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
GOOD = {"train_x": IMAGES, "train_y": np.arange(20) % 4, "test_x": IMAGES[:5], "test_y": np.arange(5) % 4}
BAD_DATA = {
    "float images": ({"train_x": IMAGES.astype(np.float32)}, "it must be uint8"),
    "four channels": ({"train_x": IMAGES.repeat(2, -1)[..., :4]}, "(N, H, W, 3)"),
    "no images": ({"train_x": IMAGES[:0], "train_y": GOOD["train_y"][:0]}, "it must be uint8"),
    "no pixels": ({"test_x": GOOD["test_x"][:, :0]}, "it must be uint8"),
    "other sizes": ({"test_x": GOOD["test_x"][:, :6]}, "different sizes"),
    "labels too few": ({"train_y": GOOD["train_y"][:-1]}, "whole numbers (20,)"),
    "labels with fractions": ({"test_y": GOOD["test_y"] + 0.5}, "whole numbers (5,)"),
    "label below zero": ({"train_y": GOOD["train_y"] - 1}, "train_y has labels -1 to 2"),
    "label of no class": ({"test_y": GOOD["test_y"] + 3}, "test_y has labels 3 to 6, it must have 0 to 3"),
    "label without end": ({"train_y": GOOD["train_y"] + 10**9}, "0 to 999 at most"),
    "labels of 64 bits": ({"train_y": GOOD["train_y"].astype(np.uint64) + 2**63}, "0 to 999 at most"),
    "an array missing": ({"test_y": None}, "test_y"),
    "objects": ({"train_y": np.array([print] * 20)}, "not a data set"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_wrong_data(refused, tmp_path, name):
    change, message = BAD_DATA[name]
    (tmp_path / "data.npz").write_bytes(saved({k: v for k, v in (GOOD | change).items() if v is not None}))
    refused(train_fgsm, f"--dataset {tmp_path / 'data.npz'} --out {tmp_path / 'run'}", "data.npz", message)


def test_damaged_and_hostile_data(cli, refused, tmp_path):
    path, trap, packed = tmp_path / "data.npz", pickle.dumps(Payload(tmp_path / "pwned")), io.BytesIO()
    flags = f"--dataset {path} --depth 10 --width 1 --batch-size 4 --epochs 1 --device cpu --out {tmp_path / 'run'}"
    with zipfile.ZipFile(packed, "w") as file:
        for name in GOOD:
            file.writestr(f"{name}.npy", trap)
    for content in (trap, packed.getvalue(), saved(GOOD)[:-900], b"hello", b""):
        path.write_bytes(content)
        refused(train_fgsm, flags, "data.npz")
    assert [*tmp_path.iterdir()] == [path]
    path.write_bytes(saved(GOOD))
    assert cli(train_fgsm, flags)[0] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run_main(train_fgsm, f"{SMALL} --epochs 1 --out {folder}") == 0
    return folder


def test_wrong_and_hostile_weights(checkpoint, tmp_path):
    good, path = torch.load(checkpoint / "model.pt", weights_only=True), tmp_path / "model.pt"
    weights, arguments = good["state_dict"], good["arguments"]
    trap = Payload(tmp_path / "pwned")
    bad = [
        (good | {"state_dict": trap}, ""),
        (good | {"arguments": trap}, ""),
        ([1, 2], "not a checkpoint"),
        (good | {"state_dict": [1]}, "no state_dict"),
        (good | {"state_dict": weights | {"fc.bias": "hello"}}, ""),
        (good | {"arguments": "hello"}, "no arguments"),
        (good | {"arguments": arguments | {"depth": 11}}, "6n"),
        (good | {"arguments": arguments | {"width": 2}}, "size mismatch"),
        (good | {"state_dict": {k: v for k, v in weights.items() if k != "fc.bias"}}, 'missing.*"fc.bias"'),
        (good | {"state_dict": weights | {"fc.scale": weights["fc.bias"]}}, 'unexpected.*"fc.scale"'),
        ({"state_dict": weights}, "no arguments"),
        (pickle.dumps(trap), "damaged"),
        ((checkpoint / "model.pt").read_bytes()[:5000], "damaged"),
        (b"no", "damaged"),
        (b"", "damaged"),
        (None, "no file"),
    ]
    for content, message in bad:
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match="model.pt") as error:
            load_model(path)
        text = str(error.value)
        assert "\n" not in text and len(text) < 400 and re.search(message, text, re.I), text
    shutil.copy(checkpoint / "checkpoint.pt", tmp_path)
    with pytest.raises(ValueError, match="is not finished: name .*checkpoint.pt to load it as it stands"):
        load_model(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_flipped_bit_is_noticed(checkpoint, tmp_path):
    """Or does no harm: not every byte of a zip means something."""
    path, refused = tmp_path / "checkpoint.pt", 0
    content, whole = (checkpoint / "checkpoint.pt").read_bytes(), load_file(checkpoint / "checkpoint.pt")
    for i in range(50):
        flipped = bytearray(content)
        flipped[len(content) * i // 50 + i] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            assert_same(load_file(path), whole)
        except ValueError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda s: s.pop("optimizer"), 2, "does not fit"),
        (lambda s: s.update(extra=[1]), 2, "does not fit"),
        (lambda s: s["rng"].update(cpu=torch.zeros(3)), 2, "does not fit"),
        (lambda s: s.update(rng=5), 2, "does not fit"),
        (lambda s: s.update(rows=5), 2, "does not fit"),
        (lambda s: s.update(rows=[]), 2, "does not fit"),
        (lambda s: s["state_dict"].pop("fc.bias"), 2, "does not fit"),
        (lambda s: s["state_dict"]["fc.bias"].fill_(float("nan")), 1, "not finite"),
    ],
)
def test_wrong_checkpoints(refused, checkpoint, tmp_path, change, code, message):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"epochs": 2}
    (run / "config.json").write_text(json.dumps(config))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, run / "checkpoint.pt")
    refused(train_fgsm, f"{SMALL} --epochs 2 --out {run} --resume", message, code=code)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"a"', "{}", '{"method": "slat"}'])
def test_a_damaged_config(refused, checkpoint, tmp_path, content):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "config.json").write_text(content)
    message = "cannot resume" if content.endswith("}") else "config.json is damaged"
    refused(train_fgsm, f"{SMALL} --epochs 1 --out {run} --resume", message)
