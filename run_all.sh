#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train and evaluate QGF on a list of tasks, one after the other, and print a table of all results.
#
#   ./run_all.sh                                          five tasks of cube-single, scene, puzzle-3x3, cube-double
#                                                         (eight hours on two cores); tasks 2 to 5 use task 1's flow
#   ./run_all.sh "cube-single scene-task1" "0 1"          these tasks, a run for each of these seeds
#   ./run_all.sh "scene" "0" --updates 200000             further options go to qgf.py
#   DATA=/big ./run_all.sh paper "0" --seeds 10           the paper's 20 tasks, on /big/scene-play-100m-v0 and so on
#   DATA=/big ./run_all.sh --dry-run paper | parallel     only print the commands; GNU parallel runs them
#   DATA=/big sbatch -G1 --array=0-19 run_all.sh paper    SLURM: each array task does one run of the list
#   OUT=/big/runs PYTHON=python3.12 ./run_all.sh          another folder of runs, another Python
#
# Given again, it resumes what was stopped. It exits with 1, and a list, if a run failed; the others run all the same.
set -o pipefail # so that an empty glob fails; not -u: an empty array is an error in the Bash of macOS
here=$(cd "$(dirname "$0")" && pwd)
[ -e "$here/qgf.py" ] || here=$SLURM_SUBMIT_DIR # sbatch runs a copy of this script from elsewhere
if [ "$1" = --help ] || [ "$1" = -h ]; then sed -n '3,15s/^# \{0,1\}//p' "$0" && exit; fi
if [ "$1" = --dry-run ]; then dry=1 && shift; fi
tasks() { for env in "$@"; do for task in 1 2 3 4 5; do echo "$env-task$task"; done; done; }
paper=(--updates 500000 --batch-size 1024 --width 1024 --critic-width 0 --depth 4 --lr 3e-4 --discount 0.999
  --expectile 0.9 --sparse 0)
case ${1:-} in
  "") envs=$(tasks cube-single scene puzzle-3x3 cube-double) && options=() && share=1 ;;
  paper) envs=$(tasks cube-triple cube-quadruple puzzle-4x4 scene) && options=("${paper[@]}") ;;
  *) envs=$1 && options=() ;;
esac
python=${PYTHON:-python} && out=${OUT:-runs} && number=0 && failed=() && more=("${options[@]}" "${@:3}")
fail() { echo "run_all.sh: $*" >&2 && exit 1; }
[ -n "$dry" ] || "$python" -c "" 2>/dev/null || fail "$python does not run: activate the environment, or set PYTHON"
[ -z "$DATA" ] || [ -d "$DATA" ] || fail "DATA=$DATA is no folder"
trap 'fail "interrupted; the same command resumes"' INT TERM
for env in $envs; do
  base=${env%-task?} && files=${base%-goal}-play-* && data=()
  [ -z "$DATA" ] || data=(--data "$(compgen -G "$DATA/$files" | grep -v -e -val.npz | head -n 1)") || fail "no $files in $DATA"
  for seed in ${2:-0}; do
    if [ -n "$SLURM_ARRAY_TASK_ID" ] && [ "$SLURM_ARRAY_TASK_ID" != "$((number++))" ]; then continue; fi
    policy=() && [ -z "$share" ] || [[ $env == *1 ]] || policy=(--policy "$out/${env%?}1-s$seed")
    run=("$python" "$here/qgf.py" --env "$env" --seed "$seed" --out "$out" "${policy[@]}" "${data[@]}" "${more[@]}")
    if [ -n "$dry" ]; then printf '%q ' "${run[@]}" && echo && continue; fi
    "${run[@]}" || failed+=("$env-s$seed")
  done
done
[ -n "$dry$SLURM_ARRAY_TASK_ID" ] || PYTHONPATH=$here "$python" "$here/.github/table.py" "$out" || failed+=(table)
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
