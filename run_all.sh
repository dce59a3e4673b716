#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train and evaluate QGF on a list of environments and seeds; what is done is skipped, and a table of all ends it.
#
#   ./run_all.sh                                               cube-single and cube-double, their five tasks, seed 0
#   ./run_all.sh "cube-single cube-double-task3" "0 1 2"       these environments, these seeds
#   ./run_all.sh "scene" "0" --updates 200000 --width 512      further options go to qgf.py
#   OUT=/data/runs PYTHON=python3.12 ./run_all.sh              another folder of runs, another Python
#   DRY_RUN=1 ./run_all.sh | parallel -j 4                     print the commands only; GNU parallel runs four at a time
#   sbatch --array=0-9 run_all.sh                              SLURM: each array task does one run of the list
#
# Exits with 1, and a list, if a run failed; the others have run all the same.
set -uo pipefail
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")" && pwd)} # SLURM runs a copy of this script from elsewhere
every=$(for env in cube-single cube-double; do for task in 1 2 3 4 5; do echo "$env-task$task"; done; done)
envs=${1:-$every}
seeds=${2:-0}
out=${OUT:-runs}
only=${SLURM_ARRAY_TASK_ID:-}
number=0
failed=()
suffix=
if [[ " ${*:3} " == *" --goal"* ]]; then suffix=-goal; fi
trap 'echo "run_all.sh: interrupted; the same command goes on" >&2; exit 130' INT TERM
for env in $envs; do
  for seed in $seeds; do
    if [ -n "$only" ] && [ "$only" != "$((number++))" ]; then continue; fi
    command=("${PYTHON:-python}" "$here/qgf.py" --env "$env" --seed "$seed" --out "$out" "${@:3}")
    if [ -n "${DRY_RUN:-}" ]; then
      printf '%q ' "${command[@]}" && echo
    elif [ -e "$out/$env$suffix-s$seed/episodes.csv" ]; then
      echo "$env, seed $seed: done before, in $out/$env$suffix-s$seed"
    elif ! "${command[@]}"; then
      failed+=("$env$suffix-s$seed")
    fi
  done
done
if [ -z "$only${DRY_RUN:-}" ]; then
  "${PYTHON:-python}" "$here/qgf.py" --table "$out"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "run_all.sh: failed: ${failed[*]}" >&2
  exit 1
fi
