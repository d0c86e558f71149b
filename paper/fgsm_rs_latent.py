"""FGSM-RS with latent, the control of the SLAT paper's Table 2: FGSM-RS in the input, SLAT's steps in hidden layers.

    python -m paper.fgsm_rs_latent --eps 8 --input-step 1.25

Its latent perturbations come "from the original sample rather than the perturbed sample" (Park & Lee 2021,
arXiv:2104.01575): the gradients of the hidden layers are those at x, the input's that at FGSM-RS's random start. So a
step takes one gradient more than SLAT's: 7 passes. Loop and flags are those of train_slat.py.
"""

from unittest import mock

import train_slat
from console import launch
from train_fgsm_rs import fgsm_rs
from train_slat import parse_args, slat  # noqa: F401  parse_args is for paper.sweep


def fgsm_rs_latent(model, x, y, eps, layers, eta, input_step, latent_clamp=True):
    """As slat, but for x_adv, which is that of fgsm_rs with a step of input_step, whether "0" is in layers or not."""
    hidden = [name for name in layers if name != "0"]
    delta = slat(model, x, y, eps, hidden, eta, 0, latent_clamp)[1] if hidden else {}
    return fgsm_rs(model, x, y, eps, input_step), delta


def main():
    with mock.patch.object(train_slat, "slat", fgsm_rs_latent):
        train_slat.main()


if __name__ == "__main__":
    launch(main)
