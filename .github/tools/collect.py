# SPDX-License-Identifier: MIT
"""Collect a play dataset with OGBench's own scripted policies, where it cannot be downloaded.

    python .github/tools/collect.py cube-double-play-v0 1000000 collected.npz

Writes one .npz in OGBench's format, N rows: observations (N, S), actions (N, A), qpos (N, Q),
terminals (N,) and, where there are buttons, button_states (N, B). The dataset and an episode's
number determine an episode. A stopped collection continues with the same command. It ends with
the program or shell that started it.
"""

import argparse
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROWS = 1001  # in an episode
DATASETS = "(cube-(single|double|triple|quadruple|octuple)|scene|puzzle-(3x3|4x4|4x5|4x6))-play-v0"
STACKING = dict(  # how often a cube goes onto another: OGBench's range for each environment
    single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35)
)


@functools.cache
def playground(base):
    """The environment for collecting, and its oracles by the name of the task, as in OGBench."""
    import gymnasium
    import ogbench.manipspace  # noqa: F401 (registers the environments)
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = gymnasium.make(f"{base}-v0", ROWS, mode="data_collection", terminate_at_goal=False)
    settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    closed = base.startswith("puzzle")  # the gripper
    oracles = dict(
        cube=cube_plan.CubePlanOracle(**settings),
        drawer=drawer_plan.DrawerPlanOracle(**settings),
        button=button_plan.ButtonPlanOracle(**settings, gripper_always_closed=closed),
        window=window_plan.WindowPlanOracle(**settings),
    )
    return env, oracles


def play(base, episode, attempt=0):
    """An episode as a dict of arrays (1001, ...), determined by the arguments."""
    env, oracles = playground(base)
    seed_oracle, seed_env = np.random.SeedSequence((0, episode, attempt)).generate_state(2)
    np.random.seed(seed_oracle)  # the oracles draw from NumPy's global generator
    ob, info = env.reset(seed=int(seed_env))
    p_stack = np.random.uniform(*STACKING.get(base.split("-")[-1], (0.5, 0.5)))
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)
    rows = []
    done = False
    while not done:
        action = np.clip(oracle.select_action(ob, info), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        row = dict(observations=ob, actions=action, terminals=done, qpos=info["prev_qpos"])
        if "prev_button_states" in info:
            row["button_states"] = info["prev_button_states"]
        rows.append(row)
        if oracle.done:
            target_ob, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)
        ob = next_ob
    types = dict(terminals=bool, button_states=np.int64)
    data = {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}
    if base == "scene":
        y, z = data["qpos"][:, 15:17].T  # of the cube
        if ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any():
            return play(base, episode, attempt + 1)  # out of reach: OGBench tries again as well
    return data


def end_with_parent(parent):
    """Let this process end, within a second, when the process of this id is no more its parent."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def save(path, arrays):
    """Write arrays (N, ...) to a file that takes its name once it is whole and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def play_part(base, episode, part):
    """Make the file of an episode, if it is not there."""
    if not part.exists():
        save(part, play(base, episode))


def collect(base, parts):
    """Play the episodes whose parts are missing, with a process for each core of this job."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # in the processes: no display, rounding to float32
    pool = ProcessPoolExecutor(
        min(len(os.sched_getaffinity(0)), len(parts)),
        multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
        initargs=(os.getpid(),),
    )
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what the processes inherit
    jobs = [pool.submit(play_part, base, i, part) for i, part in enumerate(parts)]
    signal.signal(signal.SIGINT, handler)
    pause = 0.2 if sys.stderr.isatty() else 30
    settings = dict(miniters=1, mininterval=pause, dynamic_ncols=True, unit="k rows")
    try:
        for job in tqdm(as_completed(jobs), "collecting", len(jobs), **settings):
            job.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    pool.shutdown()


def main():
    parser = argparse.ArgumentParser(description="Collect a play dataset with OGBench's policies.")
    parser.add_argument("dataset", help="as cube-double-play-v0")
    parser.add_argument("rows", type=int, help="rows to collect, in episodes of 1001")
    parser.add_argument("path", type=Path, help="the .npz to write")
    args = parser.parse_args()
    path = args.path
    if not re.fullmatch(DATASETS, args.dataset):
        sys.exit(f"no scripted policy makes {args.dataset}: only cube-*, scene and puzzle-* play")
    base = args.dataset.removesuffix("-play-v0")
    folder = path.with_name(f"{path.name}.{base}.parts")
    parts = [folder / f"{i}.npz" for i in range(max(1, math.ceil(args.rows / 1000)))]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    end_with_parent(os.getppid())
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            collect(base, parts)
            episodes = [dict(np.load(part)) for part in parts]
            save(path, {k: np.concatenate([x[k] for x in episodes]) for k in episodes[0]})
            shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues")
    except BrokenProcessPool:
        sys.exit("a worker process was killed: the same command continues")
    except OSError as e:
        if not path.exists():  # else another collection of the same file was faster
            sys.exit(f"cannot write {path}: {e}")
    print(f"{path} is there")


if __name__ == "__main__":
    main()
