#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train and evaluate QGF on a list of environments; what is done is skipped, and a table of all ends it.
#
#   ./run_all.sh                                          cube-single and cube-double, their five tasks, seed 0
#   DATA=/big ./run_all.sh paper 0 --seeds 10             the paper's 20 tasks with its settings, ten seeds at once,
#                                                         on OGBench's 100M sets, as in /big/scene-play-100m-v0/
#   DATA=/big ./run_all.sh paper-goals 0 --seeds 10       its five goal-conditioned environments
#   ./run_all.sh "cube-single cube-double-task3" "0 1"    these environments, a run for each of these seeds
#   ./run_all.sh "scene" "0" --updates 200000             further options go to qgf.py
#   ./run_all.sh --dry-run | parallel -j 4                print the commands; GNU parallel runs four at a time
#   DATA=/big sbatch --array=0-19 run_all.sh paper        SLURM: each array task does one run of the list
#   OUT=/big/runs PYTHON=python3.12 ./run_all.sh          another folder of runs, another Python
#
# Exits with 1, and a list, if a run failed; the others have run all the same.
set -o pipefail # not -u, for which an empty array is an error in the Bash that macOS brings
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")" && pwd)} # SLURM runs a copy of this script from elsewhere
dry=
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi
tasks() { for env in "$@"; do for task in 1 2 3 4 5; do echo "$env-task$task"; done; done; }
options=("${@:3}")
case ${1:-} in
  "") envs=$(tasks cube-single cube-double) ;;
  paper) envs=$(tasks cube-triple cube-quadruple puzzle-4x4 scene) && options=(--preset paper "${@:3}") ;;
  paper-goals)
    envs="puzzle-4x5 cube-triple cube-quadruple puzzle-4x6 cube-octuple"
    options=(--preset paper --goal "${@:3}")
    ;;
  *) envs=$1 ;;
esac
seeds=${2:-0}
out=${OUT:-runs}
only=${SLURM_ARRAY_TASK_ID:-}
number=0
failed=()
suffix=
if [[ " ${options[*]} " == *" --goal"* ]]; then suffix=-goal; fi
trap 'echo "run_all.sh: interrupted; the same command goes on" >&2; exit 130' INT TERM
for env in $envs; do
  data=()
  if [ -n "${DATA:-}" ]; then
    found=$(compgen -G "$DATA/${env%-task?}-play-*/" | head -n 1)
    data=(--data "${found:-$DATA/${env%-task?}}")
  fi
  for seed in $seeds; do
    if [ -n "$only" ] && [ "$only" != "$((number++))" ]; then continue; fi
    command=("${PYTHON:-python}" "$here/qgf.py" --env "$env" --seed "$seed" --out "$out" "${data[@]}" "${options[@]}")
    if [ -n "$dry" ]; then
      printf '%q ' "${command[@]}" && echo
    elif [ -e "$out/$env$suffix-s$seed/episodes.csv" ]; then
      echo "$env, seed $seed: done before, with the options of then, in $out/$env$suffix-s$seed"
    elif ! "${command[@]}"; then
      failed+=("$env$suffix-s$seed")
    fi
  done
done
if [ -z "$only$dry" ]; then
  "${PYTHON:-python}" "$here/qgf.py" --table "$out"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "run_all.sh: failed: ${failed[*]}" >&2
  exit 1
fi
