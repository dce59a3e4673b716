#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train and evaluate QGF on a list of tasks, one after the other, and print a table of all results.
#
#   ./run_all.sh                                          any goal of four families, three seeds (on two cores, an estimated eight hours)
#   ./run_all.sh "cube-single scene-task1" "0 1"          these tasks and seeds; further options go to qgf.py
#   DATA=/big ./run_all.sh paper "0 1 2"                  the paper's 20 tasks, on /big/scene-play-100m-v0 and so on
#   DATA=/big ./run_all.sh --dry-run paper | parallel     only print the commands; GNU parallel runs them
#   DATA=/big sbatch -G1 --array=0-19 run_all.sh paper    SLURM: each array task does one run of the list
#   OUT=/big/runs PYTHON=python3.12 ./run_all.sh          another folder of runs, another Python
#
# Given again, it resumes what was stopped. It exits with 1, and a list, if a run failed; the others run all the same.
case ${1:-} in
  --help | -h) sed -n '3,12s/^# \{0,1\}//p' "$0" && exit ;;
  --dry-run) dry=1 && shift ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
[ -e "$here/qgf.py" ] || here=$SLURM_SUBMIT_DIR # sbatch runs a copy of this script from elsewhere
paper=(--policy-updates 500000 --critic-updates 500000 --batch-size 1024 --policy-width 1024 --critic-width 1024)
paper+=(--lr 3e-4 --lr-decay 0 --discount 0.999 --expectile 0.9 --no-sparse)
case ${1:-} in
  "") envs="cube-single cube-double scene puzzle-3x3" && seeds="0 1 2" && options=() ;;
  paper) envs=$(echo {cube-triple,cube-quadruple,puzzle-4x4,scene}-task{1..5}) && options=("${paper[@]}") ;;
  *) envs=$1 && options=() ;;
esac
[ -z "$DATA" ] || options+=(--data "$DATA") # qgf.py finds a task's files in this folder
options+=("${@:3}")
python=${PYTHON:-python} && out=${OUT:-runs} && number=0 && failed=()
fail() { echo "run_all.sh: $*" >&2 && exit 1; }
[ -n "$dry" ] || "$python" -c "" 2>/dev/null || fail "$python does not run: activate the environment, or set PYTHON"
trap 'kill $run_pid 2>/dev/null; wait; fail "interrupted; the same command resumes"' INT TERM
for env in $envs; do
  for seed in ${2:-${seeds:-0}}; do
    if [ -n "$SLURM_ARRAY_TASK_ID" ] && [ "$SLURM_ARRAY_TASK_ID" != "$((number++))" ]; then continue; fi
    run=("$python" "$here/qgf.py" --env "$env" --seed "$seed" --out "$out" "${options[@]}") && ran=1
    if [ -n "$dry" ]; then printf '%q ' "${run[@]}" && echo && continue; fi
    "${run[@]}" & run_pid=$!
    wait $run_pid || failed+=("$env-s$seed")
  done
done
[ -n "$ran" ] || fail "SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID: the list has $number runs, from 0"
[ -n "$dry$SLURM_ARRAY_TASK_ID" ] || "$python" "$here/.github/tools/table.py" "$out" || failed+=(table)
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
