# SPDX-License-Identifier: MIT
"""Draw .github/pictures/toy.svg: what guidance does to a flow, in two dimensions.

    python .github/tools/toy.py

The policy and the critic are trained by qgf.py's own `train` on made-up data: one state, actions
(2,) around two centres, and a reward that grows towards a corner in which there are no data.
"""

import sys

import curves
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import table
from matplotlib.colors import LinearSegmentedColormap

sys.path.insert(0, str(table.TOP))
import qgf

CENTRES = np.array([[-0.45, 0.1], [0.35, -0.35]])  # of the data's two modes
SPREAD = 0.12
BEST = np.array([0.75, 0.65])  # where the reward is largest
EDGE = 1.6  # a panel shows -EDGE to EDGE
FLOW = curves.STYLES["qgf"][0]
PUSH = curves.STYLES["bc@32"][0]
GREEN = "#2c9a4b"
BANDS = LinearSegmentedColormap.from_list("bands", [f"{GREEN}00", f"{GREEN}80"])


def train_both(updates):
    """-> cfg, the data's actions (N, 2), and the averaged networks of policy and critic."""
    cfg = qgf.Config(horizon=1, policy_width=128, critic_width=64, depth=2)
    rng = np.random.default_rng(0)
    N = 4000
    actions = CENTRES[rng.integers(2, size=N)] + SPREAD * rng.standard_normal((N, 2))
    actions = np.clip(actions, -1, 1)
    rows = np.arange(N, dtype=np.int32)  # each row is a trajectory, and solves the task
    data = qgf.Data(
        observations=jnp.zeros((N, 1)),
        actions=jnp.float32(actions),
        rewards=jnp.float32(-np.sum((actions - BEST) ** 2, axis=1)),
        masks=jnp.zeros(N),
        goals=jnp.zeros((N, 0)),
        ends=jnp.array(rows),
        starts=jnp.array(rows),
        chunks=jnp.int32(N),
    )
    nets = {}
    for init, loss, _ in qgf.LEARNERS.values():
        state = qgf.init_state(init, (1, 0, 2), cfg)
        state, _ = qgf.train(loss, updates, state, nets, data, updates, cfg)
        nets = nets | state.average
    return cfg, actions, nets


def paths(nets, a_0, w, cfg):
    """Guided flows as `qgf.sample_actions` makes them -> a_t (T+1, B, 2), v and push (T, B, 2)."""
    s, g = jnp.zeros((len(a_0), 1)), jnp.zeros((len(a_0), 0))
    T = cfg.denoise_steps

    def flow(a, t):
        return qgf.velocity(nets["policy"], s, a, t, cfg)

    def q(a):
        return qgf.q_min(nets["critic"], s, g, a)

    a_t, v, push = [a_0], [], []
    for i in range(T):
        t = jnp.full((len(a_0), 1), i / T)
        v.append(flow(a_t[-1], t))
        push.append(w * qgf.qgf(q, flow, a_t[-1], t, v[-1], T))
        a_t.append(a_t[-1] + (v[-1] + push[-1]) / T)
    a_t[-1] = jnp.clip(a_t[-1], -1, 1)
    final, _ = qgf.sample_actions(nets, s, g, a_0[:, None], w, qgf.qgf, cfg)
    assert np.allclose(final, a_t[-1], atol=1e-3)  # the same as the file's own, up to rounding
    return np.array(a_t), np.array(v), np.array(push)


def bands(nets):
    """Q in twelve bands of equal area: (160, 160), the lowest row first."""
    x = np.linspace(-EDGE, EDGE, 160)
    a = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    s, g = jnp.zeros((len(a), 1)), jnp.zeros((len(a), 0))
    q = np.array(qgf.q_min(nets["critic"], s, g, jnp.float32(a)))
    return np.floor(12 * q.argsort().argsort() / len(q)).reshape(160, 160)


def lines(ax, points, **style):
    """Lines through points (B, n, 2), as one path, which keeps the file small."""
    gaps = np.full((len(points), 1, 2), np.nan)
    together = np.concatenate([points, gaps], axis=1).reshape(-1, 2)
    (line,) = ax.plot(*together.T, solid_capstyle="round", **style)
    return line


def arrows(ax, a, change, colour, width):
    """A quarter of each change, from a (B, 2)."""
    scale = dict(angles="xy", scale_units="xy", scale=4)
    return ax.quiver(*a.T, *change.T, color=colour, width=width, **scale)


def draw(updates=3000):
    """-> the figure."""
    cfg, actions, nets = train_both(updates)
    zeros = jnp.zeros((1024, 1)), jnp.zeros((1024, 0)), jnp.zeros((1024, 2))
    batch = qgf.Batch(*zeros, None, None, None)
    a_0 = jax.random.normal(jax.random.PRNGKey(1), (32, 2))
    image = bands(nets)
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.9))
    for ax in axes.flat[:7]:
        extent = (-EDGE, EDGE, -EDGE, EDGE)
        ax.imshow(image, cmap=BANDS, origin="lower", extent=extent, interpolation="none")
        (data,) = ax.plot(*actions[:100].T, ".", c=curves.GREY, ms=2.5, rasterized=True)
        ax.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    for ax, strength in zip(axes[0], (0, 0.3, 1, 5), strict=True):
        w = qgf.relative_weight(strength, nets, batch, qgf.qgf, cfg)
        a, v, push = paths(nets, a_0, w, cfg)
        path = lines(ax, a[:, :20].swapaxes(0, 1), c=FLOW, alpha=0.4, lw=0.8)
        (sample,) = ax.plot(*a[-1].T, ".", c=FLOW, ms=6)
        ax.set_title(f"λ = {strength}" if strength else "λ = 0: behaviour cloning")
        if strength == 1:
            for below, t in zip(axes[1], (0.1, 0.5, 0.9), strict=False):
                i = round(t * cfg.denoise_steps)
                flow = arrows(below, a[i, :16], v[i, :16], FLOW, 0.006)
                pushed = arrows(below, a[i, :16], push[i, :16], PUSH, 0.012)
                below.set_title(f"λ = 1 at t = {t}")
    axes[1, 3].axis("off")
    figure.tight_layout()
    key = {
        "an action of the data": data,
        "an action of the policy": sample,
        "its path from noise": path,
        "v, the flow (a quarter)": flow,
        "w d, the push (a quarter)": pushed,
        "large Q (bands of equal area)": plt.Rectangle((0, 0), 1, 1, fc=f"{GREEN}80"),
    }
    axes[1, 3].legend(key.values(), key.keys(), loc="center", frameon=False)
    return figure


if __name__ == "__main__":
    curves.set_style()
    curves.save(draw(), curves.PICTURES / "toy.svg")
