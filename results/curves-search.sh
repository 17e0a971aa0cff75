#!/usr/bin/env bash
# The equal learning-rate search behind the defaults of `locobench compare`: CURVES, standard tanh autoencoder, 6 epochs,
# seed 0, five learning rates a factor of about 3 apart per method; a best value on the edge adds one beyond it.
# One folder per method and rate, so that an interrupted search goes on where it was. Run from the repository's root.
set -euo pipefail
locobench=${LOCOBENCH:-.venv/bin/locobench}
search() {
  method=$1; shift
  for lr in "$@"; do
    "$locobench" compare --methods "$method" --lr "$method=$lr" --out "results/curves-search/$method/$lr" >/dev/null
  done
}
search adam 1e-4 3e-4 1e-3 3e-3 1e-2
search rmsprop-tf 3e-5 1e-4 3e-4 1e-3 3e-3
search rmsprop 3e-5 1e-4 3e-4 1e-3 3e-3
search momentum 3e-4 1e-3 3e-3 1e-2 3e-2
search nesterov 3e-4 1e-3 3e-3 1e-2 3e-2
search sgd 1e-3 3e-3 1e-2 3e-2 1e-1
search adagrad 1e-3 3e-3 1e-2 3e-2 1e-1
search locoprop-m 1e-5 3e-5 1e-4 3e-4 1e-3
search locoprop-s 1e-5 3e-5 1e-4 3e-4 1e-3
