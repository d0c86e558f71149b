"""What happens besides training: accuracies after an epoch, run folder, progress line, checkpoint. Steers nothing."""

import json
import os
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import autocast
from console import StatusLine, clock, fail, hardware, load_file, load_json, note, versions, write_file, write_torch
from eval_attacks import RUN_FILES, ContractError, ascend, cross_entropy, percent, pgd

# May differ between a run and its resumption; of the data set only the name may, see there.
FREE_FLAGS = ("device", "data_dir", "dataset", "out", "not_default")
HEADER = "epoch   loss  train |  test clean  fgsm pgd10 |  train clean  fgsm pgd10    time"
ROW = "{epoch:5} {loss:6.3f} {train_acc:6.1f} |  {test_clean:10.1f} {test_fgsm:5.1f} {test_pgd10:5.1f} |  "
ROW += "{train_clean:11.1f} {train_fgsm:5.1f} {train_pgd10:5.1f}"
LOCKS = {}  # {folder: file descriptor}; a lock goes when its process ends, however it ends


def monitor(model, x, y, eps, batch_size):
    """Clean, FGSM and PGD-10 accuracy in per cent and gradient alignment of a network in eval mode: a quick look.

    clean and fgsm are judged in the precision around the call; fgsm is the plain accuracy on x + eps sign(grad), so it
    can exceed clean (label leaking). pgd10 is eval_attacks.pgd with 10 steps of eps / 4 from one fixed random start.
    alignment is the mean cosine of the gradients at x and at x + u, u ~ U(-eps, eps) (Andriushchenko & Flammarion 2020,
    arXiv:2007.02617, eq. 3).
    """

    def at(x):
        parts = zip(x.split(batch_size), y.split(batch_size))
        logits, _, gradient = zip(*(ascend(model, part, cross_entropy, label) for part, label in parts))
        return percent(torch.cat(logits).argmax(1) == y), torch.cat(gradient)

    clean, gradient = at(x)
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    return {
        "clean": clean,
        "fgsm": at((x + eps * gradient.sign()).clamp(0, 1))[0],
        "pgd10": percent(pgd(model, x, y, eps, steps=10, restarts=1, batch_size=batch_size)[0]),
        "alignment": F.cosine_similarity(gradient.flatten(1), at(x + eps * u)[1].flatten(1)).mean().item(),
    }


def overfitting(row, classes):
    """What is suspicious about the accuracies of an epoch, or None; the margins are above the noise of 100 images.

    A network that is robust to FGSM but not to PGD has overfitted catastrophically (Wong et al. 2020), if it has learnt
    anything: without attack or under FGSM it is right twice as often as by guessing. One that knows FGSM images better
    than clean ones reads the label off the perturbation (Kurakin et al. 2017, arXiv:1611.01236).
    """
    clean, fgsm, pgd10 = row["test_clean"], row["test_fgsm"], row["test_pgd10"]
    found = []
    if pgd10 < fgsm / 2 and pgd10 < fgsm - 10 and max(clean, fgsm) >= 200 / classes:
        found.append(f"catastrophic overfitting: FGSM {fgsm:.1f} %, PGD-10 {pgd10:.1f} %")
    if fgsm > clean + 2:
        found.append(f"label leaking: FGSM {fgsm:.1f} %, clean {clean:.1f} %")
    return "; ".join(found) or None


class Run:
    """A run's folder, its counters and what is printed. Nothing here decides how training goes on.

    replays: how often log() is called for each batch. epoch: how many are done and saved.
    extra: {name: tensor or number} that a method carries from step to step; it is saved in the checkpoint.
    """

    def __init__(self, args, model, optimizer, data, replays=1, extra=None):
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        self.out, self.steps = Path(args.out), data.steps(args.batch_size) * replays
        self.epoch, self.rows, self.extra, self.line = 0, [], extra or {}, StatusLine()
        resumed = self._open_folder()
        if resumed and (self.out / "checkpoint.pt").exists():  # there is none if it was killed in its first epoch
            self._load_checkpoint()
        count, n, n_test = sum(p.numel() for p in model.parameters()), len(data.train_y), len(data.test_y)
        print(f"network  WRN-{args.depth}-{args.width}, {count / 1e6:.1f} M parameters, dropout {args.dropout}")
        print(f"data     {data.name}: {n:,} training, {n_test:,} test images, {len(data.classes)} classes")
        print(f"device   {hardware(args.device)}, {args.precision}")
        print(f"run      {self.out}: {args.epochs} epochs, {args.epochs * self.steps:,} steps, eps {args.eps:g}/255")
        if resumed:
            print(f"resumed  after epoch {self.epoch} of {args.epochs}")
        print(HEADER, flush=True)
        if self.epoch:  # the kill may have come before its accuracies were measured
            self._measure()
        self._begin_epoch()

    def _open_folder(self):
        """Create the folder and config.json, or check that --resume fits what is there; keep other runs out.

        Returns whether there is a run to resume.
        """
        args, out, data = self.args, self.out, self.data
        config = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite")}
        config["data"] = {"train": len(data.train_x), "test": len(data.test_x), "mean": data.mean, "std": data.std}
        config["data"]["crc32"] = data.crc32
        out.mkdir(parents=True, exist_ok=True)
        lock(out.resolve())
        found = [name for name in RUN_FILES if (out / name).is_file()]
        if args.resume and found:
            try:
                before = {} | load_json(out / "config.json")  # a TypeError if that is no dictionary
            except (ValueError, TypeError):
                fail(f"{out}/config.json is damaged or missing: --overwrite starts the run anew")
            for key in ("method", *config):
                if key not in FREE_FLAGS and before.get(key) != config[key]:
                    fail(f"cannot resume {out}: {key} was {before.get(key)} there and is {config[key]} now")
            return True
        if args.resume:
            note(f"there is no run in {out} yet: this one begins")
        if found and not args.overwrite:
            fail(f"{out} holds a run: --resume continues it, --overwrite replaces it, --out names another folder")
        for name in found:
            (out / name).resolve().unlink()  # what a link leads to, as it is written there again
        write_file(out / "config.json", json.dumps({**config, **versions(args.device)}, indent=1) + "\n")
        return False

    def _begin_epoch(self):
        """Sums over the epoch's steps; they stay on the device, so that the host need not wait for it."""
        self.step = self.loss = self.correct = 0
        self.start = time.perf_counter()

    def log(self, loss, logits, y):
        """Count a step. Twice a second at most (in a file: every 20 seconds) the progress line fetches the sums."""
        self.step += 1
        self.loss = self.loss + loss.detach()
        self.correct = self.correct + (logits.detach().argmax(1) == y).sum()
        if self.line.due():
            rate, epochs = self.step / (time.perf_counter() - self.start), self.args.epochs
            between = sum(row["monitor_seconds"] for row in self.rows) / max(len(self.rows), 1)
            left = ((epochs - self.epoch) * self.steps - self.step) / rate + (epochs - self.epoch) * between
            self.line.show(
                f"epoch {self.epoch + 1}/{epochs} step {self.step}/{self.steps} "
                f"loss {float(self.loss) / self.step:.3f} acc {100 * int(self.correct) / (self.step * len(y)):.1f} "
                f"lr {self.optimizer.param_groups[0]['lr']:.3f} {rate * len(y):.0f} img/s {clock(left)} left"
            )

    def end_epoch(self):
        """Save the epoch, then measure it; or end the run if its loss or the weights are not finite."""
        loss = float(self.loss) / self.steps  # waits for the device
        seconds, seen = time.perf_counter() - self.start, self.steps * self.args.batch_size
        lr, train_acc = self.optimizer.param_groups[0]["lr"], 100 * int(self.correct) / seen
        row = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * self.steps, "lr": lr, "loss": loss}
        row |= {"train_acc": train_acc, "seconds": seconds, "images_per_second": seen / seconds}
        if not all(tensor.isfinite().all() for tensor in (self.loss, *self.model.state_dict().values())):
            fail(f"loss or weights not finite in epoch {self.epoch + 1}, which is not saved: try a lower --lr-max", 1)
        self.epoch += 1
        self.rows.append(row)
        rng = {"cpu": torch.get_rng_state(), "device": device_rng(self.args.device)}
        state = {"optimizer": self.optimizer.state_dict(), "rows": self.rows, "extra": self.extra, "rng": rng}
        write_torch(self.out / "checkpoint.pt", self._weights() | state)
        self._measure()
        self._begin_epoch()

    def _measure(self):
        """Complete the last epoch's row with the network's accuracies and print it. Needs no memory beyond a step's."""
        row, start = self.rows[-1], time.perf_counter()
        self.line.show(f"epoch {self.epoch}/{self.args.epochs}: clean, FGSM and PGD-10 accuracy ...")
        self.model.eval()
        # Without cudnn's trials: the attack's batches shrink, and each size would be tried anew.
        with autocast(self.args), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            for split, images in (("test", self.data.test), ("train", self.data.train)):
                try:
                    found = monitor(self.model, *images(self.args.monitor), self.args.eps / 255, self.args.batch_size)
                except ContractError as error:  # logits or gradients overflow
                    fail(f"epoch {self.epoch} is saved but cannot be measured ({error}): try a lower --lr-max", 1)
                row |= {f"{split}_{name}": value for name, value in found.items()}
        row |= {"alignment": row.pop("test_alignment"), "monitor_seconds": time.perf_counter() - start}
        row["warning"] = overfitting(row, len(self.data.classes))
        # Chosen on training images, never on test images (Andriushchenko & Flammarion 2020).
        if row["train_pgd10"] > max((earlier["train_pgd10"] for earlier in self.rows[:-1]), default=-1):
            write_torch(self.out / "best.pt", self._weights())
        write_file(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.line.clear()
        print(f"{ROW.format(**row)} {clock(row['seconds']):>7}", flush=True)
        for warning in filter(None, (row["warning"] or "").split("; ")):
            print(f"warning: epoch {self.epoch}: {warning}", flush=True)

    def finish(self):
        """Write model.pt and say where everything is."""
        write_torch(self.out / "model.pt", self._weights())
        seconds = sum(row["seconds"] for row in self.rows)
        print(f"trained  {clock(seconds)}: {self.out}/model.pt; accuracies above are in per cent")
        print(f"next     {shlex.join(['python', 'eval_attacks.py', str(self.out)])}")

    def _weights(self):
        return {"arguments": self.model.arguments, "state_dict": self.model.state_dict()}

    def _load_checkpoint(self):
        path, device = self.out / "checkpoint.pt", self.args.device
        try:
            state = load_file(path)
            self.model.load_state_dict(state["state_dict"])
            state["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]  # those of this script
            self.optimizer.load_state_dict(state["optimizer"])
            self.rows, self.epoch = state["rows"], len(state["rows"])
            if state["extra"].keys() != self.extra.keys():
                raise ValueError(f"it carries {sorted(state['extra'])}, the method {sorted(self.extra)}")
            self.extra = {k: v.to(device) if torch.is_tensor(v) else v for k, v in state["extra"].items()}
            torch.set_rng_state(state["rng"]["cpu"])
            device_rng(device, state["rng"]["device"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            fail(f"{path} does not fit this run: {error}")


def lock(folder):
    """Keep every other process out of a run's folder while this one lives. On Windows, do without."""
    if os.name != "posix" or folder in LOCKS:
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training in {folder}: --out names another folder")
    except OSError:  # some network file systems cannot lock
        pass
    LOCKS[folder] = descriptor


def device_rng(device, state=None):
    """The state of a GPU's random numbers, set to `state` if one is given; None on a CPU."""
    gpu = torch.cuda if device.startswith("cuda") else torch.mps if device == "mps" else None
    where = [device] if gpu is torch.cuda else []
    if gpu and state is not None:
        gpu.set_rng_state(state, *where)
    return gpu and gpu.get_rng_state(*where)
