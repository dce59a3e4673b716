#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train and evaluate QGF on a list of environments and seeds, one after the other; what is done is skipped.
#
#   ./run_all.sh                                               cube-single and cube-double, their five tasks, seed 0
#   ./run_all.sh "cube-single cube-double-task3" "0 1 2"       these environments, these seeds
#   ./run_all.sh "scene" "0" --updates 200000 --width 512      further options go to qgf.py
#   OUT=/data/runs PYTHON=python3.12 ./run_all.sh              another folder of runs, another Python
#
# Exits with 1, and a list, if a run failed; the others have run all the same.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
every=$(for env in cube-single cube-double; do for task in 1 2 3 4 5; do echo "$env-task$task"; done; done)
envs=${1:-$every}
seeds=${2:-0}
out=${OUT:-runs}
failed=()
trap 'echo "run_all.sh: interrupted; the same command goes on" >&2; exit 130' INT TERM
for env in $envs; do
  for seed in $seeds; do
    if [ -e "$out/$env-s$seed/episodes.csv" ]; then
      echo "$env, seed $seed: done before, in $out/$env-s$seed"
    elif ! "${PYTHON:-python}" "$here/qgf.py" --env "$env" --seed "$seed" --out "$out" "${@:3}"; then
      failed+=("$env-s$seed")
    fi
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "run_all.sh: failed: ${failed[*]}" >&2
  exit 1
fi
