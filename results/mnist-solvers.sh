#!/usr/bin/env bash
# Which solver of the local problems is best: MNIST, standard tanh autoencoder, 5 epochs with their own schedule, seed 0.
# One rate is searched for each (lr of the local steps, or the activation lr where the solver has no lr), three values; for
# LocoProp-S with RMSProp a fourth, since its best of three was the largest. One folder per solver and rate, so that an
# interrupted study goes on where it was. Two runs at a time, one thread each (their seconds are therefore not prices). Run
# from the repository's root; `locobench show results/mnist-solvers --best --speed results/speed.json` draws table and plots.
set -euo pipefail
export LOCOBENCH=${LOCOBENCH:-.venv/bin/locobench}
trials() {
  method=$1; shift
  for rate in "$@"; do echo "$method $rate"; done
}
{
  trials locoprop-m 3e-5 1e-4 3e-4
  trials locoprop-s 3e-5 1e-4 3e-4 1e-3
  trials locoprop-m-adam 1e-4 3e-4 1e-3
  trials locoprop-m-anderson 30 100 300
  trials locoprop-s-exact 100 300 1000
  trials locoprop-s-cg 100 300 1000
} | xargs -P 2 -L 1 bash -c \
  '"$LOCOBENCH" compare --data mnist --epochs 5 --methods "$0" --lr "$0=$1" --threads 1 --out "results/mnist-solvers/$0/$1" >/dev/null'
