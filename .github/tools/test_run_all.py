# SPDX-License-Identifier: MIT
"""run_all.sh: which commands it gives, and how it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qgf

RUN_ALL = Path(__file__).parents[2] / "run_all.sh"


def environment(**more):
    """This process's environment, without what the script reads."""
    names = ("DATA", "OUT", "PYTHON", "SLURM_ARRAY_TASK_ID")
    return {name: x for name, x in os.environ.items() if name not in names} | more


def run_all(*args, **env):
    return subprocess.run(
        [RUN_ALL, *args], env=environment(**env), text=True, capture_output=True, check=False
    )


def program(path, script):
    """An executable in place of Python."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_it_goes_on_after_a_failure_and_says_so(tmp_path):
    """OUT reaches both programs as it is: each knows what ~ means."""
    stub = program(tmp_path / "python", 'echo "$*" >> "$CALLS"; [ "$3" != broken ]')
    env = dict(PYTHON=stub, CALLS=str(tmp_path / "calls"), OUT="~/o")
    p = run_all("one broken two", "0 1", "--lr", "1e-4", **env)
    assert p.returncode == 1
    assert "failed: broken-s0 broken-s1" in p.stderr
    *calls, last = [x.split() for x in (tmp_path / "calls").read_text().splitlines() if ".py" in x]
    assert [(c[2], c[4]) for c in calls] == [(e, s) for e in ("one", "broken", "two") for s in "01"]
    assert all(c[5:] == ["--out", "~/o", "--lr", "1e-4"] for c in calls)
    assert last == [str(RUN_ALL.parent / ".github/tools/table.py"), "~/o"]
    assert Path(last[0]).exists()


@pytest.mark.parametrize(
    "words, args, env",
    [
        ("no-such-python", ["cube-single"], dict(PYTHON="no-such-python")),
        ("the list has 20 runs", ["paper"], dict(SLURM_ARRAY_TASK_ID="20")),
    ],
)
def test_it_refuses_what_cannot_work(words, args, env):
    p = run_all(*args, **dict(PYTHON=sys.executable) | env)
    assert p.returncode == 1
    assert words in p.stderr
    assert p.stderr.count("\n") == 1


def test_it_lists_the_runs():
    everything = run_all("--dry-run").stdout.splitlines()  # four families, three seeds
    assert len(everything) == 12
    assert "--env scene --seed 2" in everything[8]
    assert "./run_all.sh" in run_all("--help").stdout


def test_it_lists_the_papers_runs():
    lines = run_all("--dry-run", "paper", "0", DATA="/big").stdout.splitlines()
    assert len(lines) == 20
    for line in lines:
        assert "--discount 0.999 --expectile 0.9 --no-sparse --data /big" in line
        cfg = qgf.parse(line.split()[2:])
        assert (cfg.lr_decay, cfg.sparse, cfg.data) == (0, False, "/big")
    env = dict(DATA="/big", SLURM_ARRAY_TASK_ID="19")
    one = run_all("--dry-run", "paper", "0", **env).stdout.splitlines()
    assert one == lines[19:]
    assert "--env scene-task5" in one[0]


def test_it_ends_its_run_when_it_is_ended(tmp_path):
    stub = program(tmp_path / "python", "[ $1 = -c ] && exit; touch started; exec sleep 60")
    env = environment(PYTHON=stub)
    p = subprocess.Popen([RUN_ALL, "one"], cwd=tmp_path, env=env, stderr=-1, text=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    p.terminate()
    assert "interrupted; the same command resumes" in p.communicate(timeout=60)[1]
    assert p.returncode == 1
