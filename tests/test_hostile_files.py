"""Files from strangers: every one loads right or ends in one line, and none runs code."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import train_fgsm
from conftest import SMALL, train
from wrn import WideResNet, load_model


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def sample(n=20):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), np.arange(n) % 4
    return {"train_x": x, "train_y": y, "test_x": x[:5], "test_y": y[:5]}


def saved(arrays, compressed=True):
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def outcome(path, capsys):
    """The arrays that load_arrays gives, or the one line it ends with."""
    try:
        return common.load_arrays(str(path), "data")[0]
    except SystemExit as end:
        error = capsys.readouterr().err
        assert end.code == 2 and error.count("\n") == 1, error
        return error


def npy(header, data=b""):
    """An .npy whose header says what it likes."""
    header = repr(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def archive(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


HUGE = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
GOOD = sample()
BAD_DATA = {
    "float images": ({"train_x": GOOD["train_x"].astype(np.float32)}, "it must be uint8"),
    "bool images": ({"test_x": GOOD["test_x"] > 5}, "it must be uint8"),
    "grey images": ({"train_x": GOOD["train_x"][..., 0]}, "it must be uint8"),
    "four channels": ({"train_x": GOOD["train_x"].repeat(2, -1)[..., :4]}, "(N, H, W, 3)"),
    "no images": ({"train_x": GOOD["train_x"][:0], "train_y": GOOD["train_y"][:0]}, "it must be uint8"),
    "no pixels": ({"test_x": GOOD["test_x"][:, :0]}, "it must be uint8"),
    "other sizes": ({"test_x": GOOD["test_x"][:, :6]}, "different sizes"),
    "labels too few": ({"train_y": GOOD["train_y"][:-1]}, "whole numbers (20,)"),
    "labels in columns": ({"train_y": GOOD["train_y"][:, None]}, "whole numbers (20,)"),
    "labels with fractions": ({"test_y": GOOD["test_y"] + 0.5}, "whole numbers (5,)"),
    "labels as text": ({"test_y": GOOD["test_y"].astype(str)}, "whole numbers (5,)"),
    "label below zero": ({"train_y": GOOD["train_y"] - 1}, "train_y has labels -1 to 2"),
    "label of no class": ({"test_y": GOOD["test_y"] + 3}, "test_y has labels 3 to 6, it must have 0 to 3"),
    "label without end": ({"train_y": GOOD["train_y"] + 10**9}, "0 to 999 at most"),
    "labels of 64 bits": ({"train_y": GOOD["train_y"].astype(np.uint64) + 2**63}, "0 to 999 at most"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_wrong_data(tmp_path, capsys, name):
    path = tmp_path / "data.npz"
    path.write_bytes(saved(GOOD | BAD_DATA[name][0]))
    error = outcome(path, capsys)
    assert BAD_DATA[name][1] in error and "data.npz" in error


def hostile_archives(folder):
    good = {f"{key}.npy": value for key, value in zip(GOOD, map(saved_npy, GOOD.values()))}
    trap = pickle.dumps(Payload(folder / "pwned"))
    yield "a pickle", trap
    yield "a pickle inside", archive(good | {"train_x.npy": trap})
    yield (
        "an array of objects",
        archive(good | {"train_x.npy": npy({"descr": "|O", "fortran_order": False, "shape": (1,)}, trap)}),
    )
    yield "a header that runs code", archive(good | {"train_x.npy": npy("__import__('os').system('touch pwned')", b"")})
    yield "a header without end", archive(good | {"train_x.npy": npy(HUGE)})
    yield "a negative shape", archive(good | {"train_x.npy": npy(HUGE | {"shape": (-1, 32, 32, 3)})})
    yield "an unknown type", archive(good | {"train_x.npy": npy(HUGE | {"descr": "|q9"})})
    yield "no array", archive(good | {"train_x.npy": b"hello"})
    yield "nothing", archive({})
    yield "no zip", b"hello"
    yield "no bytes", b""


def saved_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_hostile_archives(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in hostile_archives(tmp_path):
        (tmp_path / "data.npz").write_bytes(content)
        assert isinstance(outcome("data.npz", capsys), str), name
        assert not (tmp_path / "pwned").exists(), name


# MUTATIONS=5000 pytest tests/test_hostile_files.py tries more of them.
mutated = settings(
    max_examples=int(os.environ.get("MUTATIONS", 150)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def mutate(content, changes):
    content = bytearray(content)
    for kind, where, data in changes:
        at = int(where * len(content))
        if kind == "flip" and at < len(content):
            content[at] ^= data[0] or 1
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data
        else:
            content[at : at + 50] = bytes(len(content[at : at + 50]))
    return bytes(content)


@mutated
@given(changes=mutations, compressed=st.booleans())
def test_mutated_data(tmp_path, capsys, changes, compressed):
    path = tmp_path / "data.npz"
    path.write_bytes(mutate(saved(GOOD, compressed), changes))
    found = outcome(path, capsys)
    if not isinstance(found, str):
        # What loads is what was saved (a checksum held), or lacks nothing that a data set needs.
        assert all(np.array_equal(found[key], GOOD[key]) for key in GOOD)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run of one epoch."""
    return train("fgsm", 1, tmp_path_factory.mktemp("run") / "run")


@mutated
@given(changes=mutations)
def test_mutated_weights(checkpoint, tmp_path, changes):
    content = (checkpoint / "model.pt").read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(mutate(content, changes))
    try:
        model = load_model(path)
    except ValueError as error:
        assert "\n" not in str(error) and "model.pt" in str(error)
    else:
        assert isinstance(model, WideResNet)


def test_hostile_weights(checkpoint, tmp_path):
    good = torch.load(checkpoint / "model.pt", weights_only=True)
    weights = good["state_dict"]
    bad = {
        "code": {"arguments": good["arguments"], "state_dict": Payload(tmp_path / "pwned")},
        "no dictionary": [1, 2],
        "weights are a list": good | {"state_dict": [1]},
        "a weight is text": good | {"state_dict": weights | {"fc.bias": "hello"}},
        "arguments are text": good | {"arguments": "hello"},
        "no depth": good | {"arguments": {}},
        "another width": good | {"arguments": good["arguments"] | {"width": 2}},
        "a missing weight": good | {"state_dict": {k: v for k, v in weights.items() if k != "fc.bias"}},
        "another type": good | {"state_dict": weights | {"fc.bias": torch.ones(10, 10)}},
        "an endless tensor": good | {"state_dict": weights | {"fc.bias": torch.ones(1).expand(10**12)}},
    }
    path = tmp_path / "model.pt"
    for name, content in bad.items():
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_model(path)
        assert "\n" not in str(error.value) and "model.pt" in str(error.value), name
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("optimizer"), "does not fit"),
        (lambda s: s.update(extra=[1]), "does not fit"),
        (lambda s: s.update(rng=torch.zeros(3)), "does not fit"),
        (lambda s: s.update(epoch="two"), "does not fit"),
        (lambda s: s.update(step=-1), "does not fit"),
        (lambda s: s.update(rows=5), "does not fit"),
        (lambda s: s["state_dict"].pop("fc.bias"), "does not fit"),
        (lambda s: s["state_dict"]["fc.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_hostile_checkpoints(cli, checkpoint, tmp_path, change, message):
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
