#!/usr/bin/env bash
# The equal learning-rate search behind the defaults of `locobench compare`: CURVES, standard tanh autoencoder, 6 epochs,
# seed 0, five learning rates a factor of about 3 apart per method; a best value on the edge adds one beyond it.
# One folder per method and rate, so that an interrupted search goes on where it was. Two runs at a time, one thread each
# (their seconds are therefore not prices). Run from the repository's root.
set -euo pipefail
export LOCOBENCH=${LOCOBENCH:-.venv/bin/locobench}
trials() {
  method=$1; shift
  for lr in "$@"; do echo "$method $lr"; done
}
{
  trials adam 1e-4 3e-4 1e-3 3e-3 1e-2
  trials rmsprop-tf 3e-5 1e-4 3e-4 1e-3 3e-3
  trials momentum 3e-4 1e-3 3e-3 1e-2 3e-2
  trials locoprop-m 1e-5 3e-5 1e-4 3e-4 1e-3
  trials locoprop-s 1e-5 3e-5 1e-4 3e-4 1e-3
  trials rmsprop 3e-5 1e-4 3e-4 1e-3 3e-3
  trials nesterov 3e-4 1e-3 3e-3 1e-2 3e-2
  trials sgd 1e-3 3e-3 1e-2 3e-2 1e-1
  trials adagrad 1e-3 3e-3 1e-2 3e-2 1e-1
  # Fewer, each with a worse one on either side of the best; of spectral steps two alone.
  trials kfac 3e-2 1e-1 3e-1 1
  trials muon 1e-2 3e-2 1e-1 3e-1 1
  trials soap 3e-3 1e-2 3e-2
  trials shampoo 3e-5 1e-4 3e-4 1e-3
  trials locoprop-spectral 1e-1 3e-1
} | xargs -P 2 -L 1 bash -c \
  '"$LOCOBENCH" compare --methods "$0" --lr "$0=$1" --threads 1 --out "results/curves-search/$0/$1" >/dev/null'
