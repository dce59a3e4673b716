# SPDX-License-Identifier: MIT
"""Collect a play dataset with OGBench's own scripted policies, where it cannot be downloaded.

    python .github/collect.py cube-double-play-v0 1000000 collected.npz

Writes one .npz in OGBench's format, N rows: observations (N, S), actions (N, A), qpos (N, Q),
terminals (N,) and, where there are buttons, button_states (N, B). Each episode is determined by
the dataset and its number. A stopped collection continues with the same command.
"""

import argparse
import functools
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROWS = 1001  # in an episode
PARTS = 10  # files which a stopped collection continues from
DATASETS = "(cube-(single|double|triple|quadruple|octuple)|scene|puzzle-(3x3|4x4|4x5|4x6))-play-v0"
STACKING = dict(  # how often a cube goes onto another: OGBench's range for each environment
    single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35)
)


# ---- In a worker process ----------------------------------------
def end_with_parent():
    """Let this worker end with the program that started it, even if that was killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    """-> an episode as a dict of arrays (1001, ...), determined by the arguments"""
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


# ---- In the program ----------------------------------------
def save(path, folder, episodes):
    """Write a list of dicts of arrays (n, ...), one after the other, to `path`: all or nothing.

    Until it is whole it lies in `folder`, under a name of this process's own.
    """
    folder.mkdir(exist_ok=True)  # another collection of the same file may have removed it
    part = folder / f"{path.name}.{os.getpid()}.part"
    with open(part, "wb") as file:
        np.savez(file, **{k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]})
    part.replace(path)


def read(path, episodes):
    """-> dict of arrays (n, ...) of a part with these episodes; None if it is missing or damaged"""
    try:
        with np.load(path) as file:
            data = dict(file)
        return data if {len(x) for x in data.values()} == {ROWS * len(episodes)} else None
    except Exception:  # whatever NumPy and zipfile say of damaged files
        return None


def prepare(base, path, folder, rows):
    """Make the folders; end the program if there is no right or no room to write the rows there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{os.getpid()}.part"
        probe.write_bytes(b"x")
        probe.unlink()
        room = shutil.disk_usage(folder).free + sum(x.stat().st_size for x in folder.iterdir())
    except OSError as e:
        sys.exit(f"cannot write {path}: {e.strerror}")
    small = base in ("cube-single", "cube-double", "scene")
    need = rows * (600 if small else 1500)  # bytes at most, of the parts and of the whole
    if room < need:
        sys.exit(f"no room for {path}: it may take {need / 1e9:.1f} GB, {room / 1e9:.1f} are free")


def start_workers(count):
    """-> an executor of at most `count` processes which ignore Ctrl-C, from their start on"""
    os.environ.pop("MUJOCO_GL", None)  # nothing is rendered; one that is not there fails the import
    os.environ["PYTHONWARNINGS"] = "ignore"  # no display, and rounding to float32
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what processes inherit
    multiprocessing.set_forkserver_preload(["ogbench.manipspace.envs.scene_env"])
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(min(cores, count, 32), context, initializer=end_with_parent)


def stop(reason, path, folder, parts):
    """End the workers, and the program, with one line. At once: a tidy exit might wait for the rest
    of what a worker was sending."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(5)
    status = 1
    whole = sum(read(part, numbers) is not None for part, numbers in parts.items())
    message = f"{reason}: the same command continues from {whole} of {len(parts)} parts"
    if path.exists():  # another collection of the same file was faster
        shutil.rmtree(folder, ignore_errors=True)
        status = 0
        message = f"{path} is there"
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def collect(base, path, folder, parts):
    """Collect the parts that are not there, {path: its episodes}; then make one file of all."""
    missing = {part: numbers for part, numbers in parts.items() if read(part, numbers) is None}
    count = sum(map(len, missing.values()))
    total = sum(map(len, parts.values()))
    if missing:
        executor = start_workers(count)
        numbers = [i for part in missing.values() for i in part]
        episodes = deque(executor.submit(play, base, i) for i in numbers)
        tqdm.monitor_interval = 0  # no thread of its own
        pause = 0.2 if sys.stderr.isatty() else 30
        settings = dict(miniters=1, mininterval=pause, dynamic_ncols=True, unit="k rows")
        with tqdm(desc="collecting", total=total, initial=total - count, **settings) as bar:
            for part, numbers in missing.items():
                done = []
                for _ in numbers:
                    done.append(episodes.popleft().result())
                    bar.update()
                save(part, folder, done)
        executor.shutdown()
    data = [read(part, numbers) for part, numbers in parts.items()]
    if any(x is None for x in data):
        raise OSError("a part is missing or damaged")
    save(path, folder, data)
    shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="Collect a play dataset with OGBench's policies.")
    parser.add_argument("dataset", help="as cube-double-play-v0")
    parser.add_argument("rows", type=int, help="rows to collect, in episodes of 1001")
    parser.add_argument("path", type=Path, help="the .npz to write")
    args = parser.parse_args()
    path = args.path
    if not re.fullmatch(DATASETS, args.dataset):
        sys.exit(f"no scripted policy makes {args.dataset}: only cube-*, scene and puzzle-* play")
    if args.rows < 1:
        sys.exit("rows: at least 1")
    if path.exists():
        sys.exit(f"{path} is there already")
    base = args.dataset.removesuffix("-play-v0")
    count = math.ceil(args.rows / 1000)
    n = min(PARTS, count)
    folder = path.with_name(f"{path.name}.{base}-{count}.parts")
    parts = {folder / f"{i}.npz": range(count * i // n, count * (i + 1) // n) for i in range(n)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        prepare(base, path, folder, count * ROWS)
        collect(base, path, folder, parts)
    except KeyboardInterrupt:
        stop("stopped", path, folder, parts)
    except BrokenProcessPool:
        stop("a worker process was killed (is memory short?)", path, folder, parts)
    except OSError as e:
        stop(f"failed ({e})", path, folder, parts)


if __name__ == "__main__":
    main()
