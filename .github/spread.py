# SPDX-License-Identifier: MIT
"""How unevenly the guided gradient is spread over states and times, along the unguided flow, for each run.

    PYTHONPATH=. python .github/spread.py qgf runs/scene-task2-s0 runs/cube-single-s0
"""
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qgf


def sizes(run, method):
    """The rms of each gradient over its H*A numbers: (T, B), at each step and state of the run's probe."""
    states, record, _ = qgf.load(Path(run) / "checkpoint.npz")
    nets, s, T = jax.tree.map(lambda x: x[0], states.target), np.float32(record["probe"]), record["config"]["denoise_steps"]
    flow, q = partial(qgf.velocity, nets["policy"], s), partial(qgf.q_min, nets["critic"], s)

    def euler(a_t, i):
        t = jnp.full((len(s), 1), i / T)
        v = flow(a_t, t)
        return a_t + v / T, jnp.sqrt(jnp.mean(qgf.GUIDANCE[method](q, flow, a_t, t, v, T) ** 2, axis=1))

    a_0 = jax.random.normal(jax.random.PRNGKey(0), (len(s), nets["policy"][-1]["b"].size))
    return np.asarray(jax.lax.scan(euler, a_0, jnp.arange(T))[1])


if __name__ == "__main__":
    method, *runs = sys.argv[1:]
    print(f"{method:24}{'rms':>8}{'mean/rms':>10}{'median/rms':>12}{'top 1% of squares':>19}   rms at each t, over rms")
    for run in runs:
        size = sizes(run, method)
        rms, squares = np.sqrt(np.mean(size**2)), np.sort(size.ravel() ** 2)
        top = squares[len(squares) * 99 // 100 :].sum() / squares.sum()
        by_time = " ".join(f"{x:.2f}" for x in np.sqrt(np.mean(size**2, axis=1)) / rms)
        line = f"{Path(run).name:24}{rms:8.3g}{size.mean() / rms:10.2f}{np.median(size) / rms:12.2f}"
        print(f"{line}{top:19.2f}   {by_time}")
