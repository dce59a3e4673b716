# SPDX-License-Identifier: MIT
"""Does Q tell how many steps are left? What it says of each chunk, and what followed, by method.

    python .github/tools/calibrate.py runs/scene-s3 OUT.csv [EPISODES]

plays all methods of the run's episodes.csv, each at its last w, and writes a line for each chunk:
the steps until the goal that Q̄(s, g, a) predicts, and those that followed (nothing if the goal was
not reached). Any goal only: its reward of -1 makes Q = -(1 - γ^k) / (1 - γ), k steps before it.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from play import last_row, play, qgf
from tqdm import tqdm


def steps_to_go(q, discount):
    """The k whose -(1 - γ^k) / (1 - γ) is q; infinite where q is below all of them."""
    left = 1 + (1 - discount) * np.asarray(q)  # γ^k
    with np.errstate(divide="ignore"):
        return np.log(np.clip(left, 0, 1)) / np.log(discount)


def main(folder, path, episodes=50):
    nets, cfg, task = qgf.load_run(folder)
    if not task.has_goals:
        sys.exit(f"{folder} is of one task: its rewards do not count steps")
    env = qgf.Chunks(task, cfg.horizon)
    S, _, _ = env.sizes
    judge = jax.jit(lambda s, g, a: qgf.q_min(nets["critic"], s, g, a))
    methods = dict.fromkeys(row["method"] for row in qgf.read_csv(Path(folder) / "episodes.csv"))
    lines = []
    for method in methods:
        row = last_row(folder, method)
        for i in tqdm(range(int(episodes)), desc=method):
            seed = int(row["first_seed"]) + i
            before, actions, _, totals = zip(
                *play(env, nets, method, float(row["w"]), seed, cfg), strict=True
            )
            obs, a = np.array(before), np.array(actions)  # (chunks, S+G), (chunks, H*A)
            predicted = steps_to_go(judge(obs[:, :S], obs[:, S:], a), cfg.discount)
            success, _, length = totals[-1]
            for k, x in enumerate(predicted):
                step = k * cfg.horizon
                left = f"{length - step:.0f}" if success > 0 else ""
                where = dict(env=task.name, seed=cfg.seed, method=method, episode=i, step=step)
                lines.append(where | dict(predicted=f"{x:.1f}", left=left))
    qgf.write_csv(Path(path), lines)
    print(f"saved {path}: {len(lines):,} chunks")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
