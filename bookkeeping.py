"""What a script does beside training: run folder, progress line, accuracies after an epoch, checkpoint."""

import json
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import clock, fail, write_text, write_torch
from eval_attacks import percent, pgd, predict
from wrn import load_file

FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "best.pt")
# Flags that may differ between a run and its resumption.
FREE_FLAGS = ("device", "compile", "data_dir", "out", "not_default", "resume", "overwrite")
HEADER = "epoch   loss  train |  test clean  fgsm pgd10 |  train clean  fgsm pgd10    time"
ROW = (
    "{epoch:5} {loss:6.3f} {train_acc:6.1f} |  {test_clean:10.1f} {test_fgsm:5.1f} {test_pgd10:5.1f} "
    "|  {train_clean:11.1f} {train_fgsm:5.1f} {train_pgd10:5.1f}"
)


class Run:
    """A run's folder, its counters and what is printed. Nothing here decides how training goes on.

    passes: what a step costs in forward and backward passes, standard training being 3.
    steps_per_batch: optimiser steps on each batch (Free-AT's replays).
    epoch, step: how many are done. total_steps: of the whole run.
    extra: {name: tensor or number} that a method carries from step to step; it is saved in the checkpoint.
    """

    def __init__(self, args, model, optimizer, data, passes, steps_per_batch=1):
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        self.out = Path(args.out)
        self.steps_per_epoch = len(data.train_x) // args.batch_size * steps_per_batch
        self.total_steps = args.epochs * self.steps_per_epoch
        self.epoch = self.step = 0
        self.rows, self.best, self.extra = [], -1.0, {}
        self.line = common.StatusLine()
        self._open_folder()
        self._announce(passes)
        self._begin_epoch()

    def _open_folder(self):
        """Create the folder and config.json, or check that --resume fits what is there and load the checkpoint."""
        args, out = self.args, self.out
        config = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite")}
        if out.exists() and not out.is_dir():
            fail(f"argument --out: {out} is a file, it must name a folder")
        if args.resume:
            if not (out / "config.json").exists():
                fail(f"no run to resume in {out}")
            try:
                before = dict(json.loads((out / "config.json").read_text()))
            except (ValueError, TypeError):
                fail(f"{out}/config.json is damaged: --overwrite starts the run anew")
            for key in sorted(config, key=lambda key: key != "method"):
                if key not in FREE_FLAGS and before.get(key) != config[key]:
                    flag = "--" + key.replace("_", "-") if key != "method" else "the method"
                    fail(f"cannot resume {out}: {flag} was {before.get(key)} there and is {config[key]} now")
            if (out / "checkpoint.pt").exists():  # there is none if it was killed in its first epoch
                self._load_checkpoint()
            return
        found = [name for name in FILES if (out / name).exists()]
        if found and not args.overwrite:
            fail(f"{out} holds a run: --resume continues it, --overwrite replaces it, --out names another folder")
        out.mkdir(parents=True, exist_ok=True)
        for name in found:
            (out / name).unlink()
        write_text(out / "config.json", json.dumps({**config, **common.versions(args.device)}, indent=1) + "\n")

    def _announce(self, passes):
        args, data, m = self.args, self.data, self.model.arguments
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(f"network  WRN-{m['depth']}-{m['width']}, {count:.1f} M parameters, dropout {m['dropout']}")
        print(f"data     {data.name}: {len(data.train_x):,} training, {len(data.test_x):,} test images,", end=" ")
        print(f"{len(data.classes)} classes")
        print(f"device   {common.versions(args.device)['hardware']}, {args.precision}")
        print(f"run      {self.out}: {args.epochs} epochs, {self.total_steps:,} steps, eps {args.eps:g}/255")
        print(f"cost     {passes:g} passes a step; standard training: 3")
        if args.resume:
            print(f"resumed  after epoch {self.epoch} of {args.epochs}")
        print(HEADER, flush=True)

    def _begin_epoch(self):
        """Sums over the epoch's steps; they stay on the device, so that the host need not wait for it."""
        zero = torch.zeros((), device=self.args.device)
        self.sums = {"loss": zero, "correct": zero.long(), "seen": 0, "bad_step": zero.long()}
        self.start = time.perf_counter()

    def log(self, loss, logits, y):
        """Count a step. Twice a second at most (in a file: every 20 seconds) the progress line fetches the sums."""
        self.step += 1
        sums, loss = self.sums, loss.detach()
        sums["loss"] = sums["loss"] + loss
        sums["correct"] = sums["correct"] + (logits.detach().argmax(1) == y).sum()
        sums["seen"] += len(y)
        sums["bad_step"] = torch.where(loss.isfinite() | (sums["bad_step"] > 0), sums["bad_step"], self.step)
        if self.line.due():
            steps = self.step - self.epoch * self.steps_per_epoch
            rate = steps / (time.perf_counter() - self.start)
            between = sum(row["monitor_seconds"] for row in self.rows) / max(len(self.rows), 1)
            left = (self.total_steps - self.step) / rate + (self.args.epochs - self.epoch) * between
            self.line.show(
                f"epoch {self.epoch + 1}/{self.args.epochs} step {steps}/{self.steps_per_epoch} "
                f"loss {float(sums['loss']) / steps:.3f} acc {100 * int(sums['correct']) / sums['seen']:.1f} "
                f"lr {self.optimizer.param_groups[0]['lr']:.3f} {rate * len(y):.0f} img/s {clock(left)} left"
            )

    def end_epoch(self):
        """Measure, print and save; or end the run if a loss or weights are not finite."""
        sums = self.sums
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": float(sums["loss"]) / self.steps_per_epoch,  # waits for the device
            "train_acc": 100 * int(sums["correct"]) / sums["seen"],
            "seconds": time.perf_counter() - self.start,
        }
        row["images_per_second"] = sums["seen"] / row["seconds"]
        self._check_finite()
        self.line.show(f"epoch {self.epoch + 1}/{self.args.epochs}: clean, FGSM and PGD-10 accuracy ...")
        start = time.perf_counter()
        row |= self._measure()
        row["monitor_seconds"] = time.perf_counter() - start
        row["warning"] = overfitting(row)
        self.epoch += 1
        self.rows.append(row)
        self.line.clear()
        print(ROW.format(**row), f"{clock(row['seconds']):>7}", flush=True)
        if row["warning"]:
            print(f"warning: epoch {self.epoch}: {row['warning']}", flush=True)
        # Chosen on training images, never on test images (Andriushchenko & Flammarion 2020).
        if row["train_pgd10"] > self.best:
            self.best = row["train_pgd10"]
            write_torch(self.out / "best.pt", self._weights())
        self._save_checkpoint()
        self._begin_epoch()

    def _check_finite(self):
        what, step = "the loss is", int(self.sums["bad_step"])
        if not step and not all(w.isfinite().all() for w in self.model.state_dict().values()):
            what, step = "weights are", self.step
        if step:
            where = f"{what} not finite, first seen in epoch {self.epoch + 1} at step {step:,}"
            fail(f"{where}: try a lower --lr-max; {self.out} keeps its last good checkpoint", 1)

    def _measure(self):
        """The monitor's accuracies on test and on training images."""
        self.model.eval()
        accuracies = {}
        # Eager: the attack's batches shrink, and each size would be compiled anew.
        with common.autocast(self.args), torch.compiler.set_stance("force_eager"):
            for split, images in (("test", self.data.test), ("train", self.data.train)):
                found = monitor(self.model, *images(self.args.monitor), self.args.eps / 255)
                accuracies |= {f"{split}_{name}": value for name, value in found.items()}
        accuracies["alignment"] = accuracies.pop("test_alignment")
        return accuracies

    def finish(self):
        """Write model.pt and say where everything is."""
        write_torch(self.out / "model.pt", self._weights())
        seconds = sum(row["seconds"] for row in self.rows)
        print(f"trained  {clock(seconds)} for {self.total_steps:,} steps; accuracies above are in per cent")
        first = next((row for row in self.rows if row["warning"]), None)
        if first:
            print(f"warning: first seen in epoch {first['epoch']}: {first['warning']}")
        print(f"wrote    {self.out}/model.pt")
        print(f"next     {shlex.join(['python', 'eval_attacks.py', str(self.out), '--eps', f'{self.args.eps:g}'])}")

    def _weights(self):
        return {"arguments": self.model.arguments, "state_dict": self.model.state_dict()}

    def _save_checkpoint(self):
        state = {
            **self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "extra": self.extra,
            "rng": torch.get_rng_state(),
        }
        if self.args.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(self.args.device)
        write_torch(self.out / "checkpoint.pt", state)
        self._write_metrics()

    def _write_metrics(self):
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _load_checkpoint(self):
        path, device = self.out / "checkpoint.pt", self.args.device
        try:
            state = load_file(path)
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.rows, self.best = (state[key] for key in ("epoch", "step", "rows", "best"))
            self.extra = {k: v.to(device) if torch.is_tensor(v) else v for k, v in state["extra"].items()}
            if not len(self.rows) == self.epoch <= self.args.epochs or self.step != self.epoch * self.steps_per_epoch:
                raise ValueError(f"step {self.step} is not the end of epoch {self.epoch}")
            torch.set_rng_state(state["rng"])
            if device.startswith("cuda") and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], device)
            self._write_metrics()  # a kill may have come between the two files
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            fail(f"{path} does not fit this run ({common.first_line(error)})")


# ---------------------------------------------------------------- the accuracies after an epoch


def monitor(model, x, y, eps):
    """Clean, FGSM and PGD-10 accuracy in per cent and gradient alignment of a network in eval mode: a quick look.

    fgsm is the plain accuracy on x + eps sign(grad), so it can exceed clean (label leaking). pgd10 is
    eval_attacks.pgd with 10 steps of eps / 4 from one fixed random start. alignment is the mean cosine of the
    gradients at x and at x + u, u ~ U(-eps, eps) (Andriushchenko & Flammarion 2020, arXiv:2007.02617, eq. 3).
    """

    def gradients(x):
        for part, label in zip(x.split(250), y.split(250)):
            part = part.clone().requires_grad_()
            loss = F.cross_entropy(model(part).float(), label, reduction="sum")
            yield torch.autograd.grad(loss, part)[0]

    gradient = torch.cat(list(gradients(x)))
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    other = torch.cat(list(gradients(x + eps * u)))
    x_fgsm = (x + eps * gradient.sign()).clamp(0, 1)
    return {
        "clean": percent(predict(model, x) == y),
        "fgsm": percent(predict(model, x_fgsm) == y),
        "pgd10": percent(pgd(model, x, y, eps, steps=10, restarts=1)[0]),
        "alignment": F.cosine_similarity(gradient.flatten(1), other.flatten(1)).mean().item(),
    }


def overfitting(row):
    """What is suspicious about the accuracies of an epoch, or None; the margins are above the noise of 100 images.

    A network that is robust to FGSM but not to PGD has overfitted catastrophically (Wong et al. 2020). One that knows
    FGSM images better than clean ones reads the label off the perturbation (Kurakin et al. 2017, arXiv:1611.01236).
    """
    clean, fgsm, pgd10 = row["test_clean"], row["test_fgsm"], row["test_pgd10"]
    if pgd10 < fgsm / 2 and pgd10 < fgsm - 10:
        leaks = f", label leaking: clean accuracy is only {clean:.1f} %" if fgsm > clean + 2 else ""
        return f"catastrophic overfitting: PGD-10 accuracy {pgd10:.1f} % where FGSM accuracy is {fgsm:.1f} %{leaks}"
    if fgsm > clean + 2:
        return f"label leaking: FGSM accuracy {fgsm:.1f} % exceeds clean accuracy {clean:.1f} %"
    return None
