# SPDX-License-Identifier: MIT
"""Episodes of a trained run, chunk by chunk, for the tools that look inside them."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import qgf


def last_row(folder, method):
    """The last row of this method in a run's episodes.csv, which has its w and first seed."""
    rows = [row for row in qgf.read_csv(Path(folder) / "episodes.csv") if row["method"] == method]
    if not rows:
        sys.exit(f"{folder} has no row of {method}: give its run --methods {method}")
    return rows[-1]


def play(env, nets, method, w, seed, cfg):
    """The episode of this seed, as `qgf.rollout` plays it, but alone.

    Yields for each chunk: the observation before it, its actions (H*A,), whether the episode is
    over, and success, return and length so far. Where an episode is close, it may end otherwise
    than in the table, since rounding differs between one environment and several.
    """
    S, _, A = env.sizes
    name, samples = qgf.parse_method(method)
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    over = False
    while not over:
        a_0 = np.float32(rng.standard_normal((1, samples, cfg.horizon * A)))
        s, g = obs[None, :S], obs[None, S:]
        actions, _ = qgf.sample_actions(nets, s, g, a_0, w, qgf.ESTIMATORS[name], cfg)
        before = obs
        obs, _, over, _, info = env.step(np.reshape(actions, (cfg.horizon, A)))
        yield before, np.asarray(actions)[0], over, tuple(info["episode"])
