#!/usr/bin/env bash
# Remakes the figures in this folder from the committed results and networks: bash results/figures/remake.sh [DATASET]
# tests/check_results.py runs those lines that need no network and compares the numbers.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && shopt -s nullglob && set -e
N=results/cpu R=results/cpu/runs G=results/gpu/runs S=wrn10-2_epochs8 F=results/figures D="--dataset ${1:-cifar10}"

python -m paper.figures curves $R/{slat,fgsm,fgsm_rs,n_fgsm,pgd,fgsm_ckpt}_${S}_eps8_seed0 --out $F/curves
python -m paper.figures curves $R/{fgsm,fgsm_rs,n_fgsm,slat}_${S}_eps16_seed0 --out $F/curves-eps16
python -m paper.figures curves results/collapse/{fgsm,n_fgsm}_dropout-0_seed0 --out $F/collapse
python -m paper.figures curves $R/{fgsm,slat}_wrn10-2_epochs30_eps12_seed0 --out $F/curves-30-epochs
python -m paper.figures curves $G/{fgsm,slat}_wrn16-8_epochs30_eps8_seed0 --out $F/curves-wrn16-8
python -m paper.figures curves $G/{fgsm,slat}_wrn28-10_epochs30_eps8_seed0 --out $F/curves-wrn28-10
python -m paper.figures alignment $G/{fgsm,slat}_wrn28-10_epochs30_eps8_seed0 --out $F/alignment-wrn28-10
python -m paper.figures alignment $R/{slat,fgsm,fgsm_rs,n_fgsm,zero_grad,n_aaer,fgsm_ckpt}_${S}_eps16_seed0 --out $F/alignment-eps16
python -m paper.figures alignment $R/{fgsm_${S}_eps16,slat_${S}_eps16,slat_${S}_eps16_dropout-0}_seed0 --out $F/two-collapses
python -m paper.figures eps $N/{slat,fgsm,fgsm_rs,n_fgsm,fgsm_ckpt}_${S}_eps{4,8,12,16}{,_precision-fp32}_seed*.json --out $F/eps
python -m paper.figures eta $N/slat_${S}_eps8_{seed0,input-step-1.0_seed0,eta-*_seed0}.json --out $F/eta
python -m paper.figures dropout $N/{slat,fgsm}_${S}_eps8_{,dropout-*_}seed*.json --out $F/dropout

python -m paper.figures step $R/{fgsm,slat}_${S}_eps16_seed0 --eps 16 $D --n 200 --out $F/step-eps16
python -m paper.figures landscape $R/{slat,fgsm,pgd}_${S}_eps8_seed0 $D --n 50 --points 13 --out $F/landscape
python -m paper.figures landscape $R/{fgsm,fgsm_rs,slat}_${S}_eps16_seed0 --eps 16 $D --n 50 --out $F/landscape-eps16
python -m paper.figures grad-norm $R/{slat,fgsm,fgsm_rs,pgd}_${S}_eps8_seed0 $R/free_*_eps8_seed0 $D --n 200 --out $F/grad-norm
python -m paper.figures linearity $R/{slat,fgsm,fgsm_rs,pgd}_${S}_eps8_seed0 $R/free_*_eps8_seed0 $D --n 100 --out $F/linearity
T=results/collapse H=_dropout-0_seed
python -m paper.figures told $T/{slat$H,slat_hidden_hidden-{none,random,predicted,everywhere,noise}$H,slat_dropout-0.3_seed,fgsm$H}? --eps 16 $D --n 1000 --out $F/told
python -m paper.toy_2d --out $F/toy_2d
# attack.png: cp -r results/cpu/runs/fgsm_wrn10-2_epochs8_eps8_seed0 runs/attack, then
# python eval_attacks.py runs/attack --attack pgd --dataset data/cifar10_tiny.npz --n 100 --save-adv runs/attack/adv.npz
# python -m paper.demo runs/attack && mv runs/attack/examples.png results/figures/attack.png
