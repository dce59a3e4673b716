# SPDX-License-Identifier: MIT
"""Draw .github/toy.svg: what guidance does to a flow, in two dimensions and ten seconds.

    python .github/toy.py

The policy and the critic are trained by qgf.py's own `train` on made-up data: one state, actions
(2,) around two centres, and a reward that grows towards a corner in which there are no data.
"""

import base64
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import qgf  # noqa: E402

CENTRES = np.array([[-0.45, 0.1], [0.35, -0.35]])  # of the data's two modes
SPREAD = 0.12
BEST = np.array([0.75, 0.65])  # where the reward is largest
SIDE, GAP, EDGE = 220, 12, 1.6  # of a panel, in pixels; between panels; its range is -EDGE to EDGE
STYLE = """text { font: 13px sans-serif; fill: #24292f }
.frame { fill: none; stroke: #8c959f }
.data, .sample { fill: none; stroke-linecap: round }
.data { stroke: #8c959f; stroke-width: 2.2 }
.path { fill: none; stroke: #0969da; stroke-opacity: .35 }
.sample { stroke: #0969da; stroke-width: 4 }
.v, .d { fill: none; stroke-width: 1.4 }
.v { stroke: #0969da }
.d { stroke: #cf222e }
.flow { marker-end: url(#v) }
.push { marker-end: url(#d) }
@media (prefers-color-scheme: dark) {
text { fill: #d1d7e0 }
.path, .v, .sample { stroke: #4493f8 }
.d { stroke: #ff6a69 }
}"""


def train_both():
    """-> cfg, the data's actions (N, 2), and the averaged networks of policy and critic."""
    cfg = qgf.Config(horizon=1, policy_width=128, critic_width=64, depth=2, denoise_steps=20)
    rng = np.random.default_rng(0)
    N = 4000
    actions = CENTRES[rng.integers(2, size=N)] + SPREAD * rng.standard_normal((N, 2))
    actions = np.clip(actions, -1, 1)
    rewards = -np.sum((actions - BEST) ** 2, axis=1)
    rows = np.arange(N, dtype=np.int32)  # each row is a trajectory, and solves the task
    data = qgf.Data(
        observations=jnp.zeros((N, 1)),
        actions=jnp.float32(actions),
        rewards=jnp.float32(rewards),
        masks=jnp.zeros(N),
        goals=jnp.zeros((N, 0)),
        ends=jnp.array(rows),
        starts=jnp.array(rows),
    )
    nets = {}
    for learner in ("policy", "critic"):
        state = qgf.init_state(learner, (1, 0, 2), cfg)
        state, _ = qgf.train(learner, state, data, 3000, cfg)
        nets |= state.average
    return cfg, actions, nets


def paths(nets, a_0, w, cfg):
    """Guided flows as `qgf.sample_actions` makes them -> a_t, v and push, each (T, B, 2)."""
    s, g = jnp.zeros((len(a_0), 1)), jnp.zeros((len(a_0), 0))

    def flow(a, t):
        return qgf.velocity(nets["policy"], s, a, t, cfg)

    def q(a):
        return qgf.q_min(nets["critic"], s, g, a)

    a_t = a_0
    steps = []
    for i in range(cfg.denoise_steps):
        t = jnp.full((len(a_0), 1), i / cfg.denoise_steps)
        v = flow(a_t, t)
        push = w * qgf.fade(t) * qgf.qgf(q, flow, a_t, t, v, cfg.denoise_steps)
        steps.append((a_t, v, push))
        a_t = a_t + (v + push) / cfg.denoise_steps
    final, _ = qgf.sample_actions(nets, s, g, a_0[:, None], w, "qgf", cfg)
    assert np.allclose(final, jnp.clip(a_t, -1, 1), atol=1e-4)  # the same as the file's own
    steps.append((final, 0 * final, 0 * final))
    return [np.array(x) for x in zip(*steps, strict=True)]


def contours(nets):
    """Q as an image of bands, for all panels -> a PNG as a data URI."""
    x = np.linspace(-EDGE, EDGE, 160)
    a = np.stack(np.meshgrid(x, x[::-1]), axis=-1).reshape(-1, 2)  # (160*160, 2), top row first
    s, g = jnp.zeros((len(a), 1)), jnp.zeros((len(a), 0))
    q = np.array(qgf.q_min(nets["critic"], s, g, jnp.float32(a)))
    band = np.floor(12 * q.argsort().argsort() / len(q)) / 11  # twelve bands of equal area
    pixels = np.zeros((len(a), 4), np.uint8)
    pixels[:, :3] = 26, 127, 55
    pixels[:, 3] = 110 * band
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(160, 160, 4)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def place(a):
    """Actions (..., 2) -> pixels in a panel, as numbers with one digit."""
    return np.round(SIDE / 2 * (1 + np.array([1, -1]) * a / EDGE), 1)


def dots(a, name):
    """A dot for each action (B, 2): a line of no length, with round ends."""
    return f'<path class="{name}" d="{"".join(f"M{x} {y}h0" for x, y in place(a))}"/>'


def arrows(a, change, name):
    """An arrow from each action (B, 2) to a + change."""
    ends = zip(place(a), place(a + change), strict=True)
    return "".join(f'<path class="{name}" d="M{x} {y}L{u} {v}"/>' for (x, y), (u, v) in ends)


def panel(column, row, title, body):
    """A frame at this place of the grid, over Q's bands and the data."""
    x, y = column * (SIDE + GAP), row * (SIDE + GAP + 20) + 20
    return (
        f'<g transform="translate({x},{y})"><text x="2" y="-6">{title}</text>'
        f'<g clip-path="url(#clip)"><use href="#q"/><use href="#data"/>{body}</g>'
        f'<rect class="frame" width="{SIDE}" height="{SIDE}"/></g>'
    )


KEY = """<path class="data" d="M8 12h0"/><text x="26" y="17">an action of the data</text>
<path class="sample" d="M8 40h0"/><text x="26" y="45">an action of the policy</text>
<path class="v flow" d="M0 68L18 68"/><text x="26" y="73">v, the flow</text>
<path class="d push" d="M0 96L18 96"/><text x="26" y="101">w c(t) d, the push</text>
<rect y="118" width="18" height="12" fill="#1a7f37" fill-opacity=".43"/>
<text x="26" y="129">large Q</text>"""


def main():
    cfg, actions, nets = train_both()
    states = jnp.zeros((1024, 1))
    batch = qgf.Batch(states, jnp.zeros((1024, 0)), jnp.zeros((1024, 2)), None, None, None)
    a_0 = jax.random.normal(jax.random.PRNGKey(1), (60, 2))
    panels = []
    for column, strength in enumerate((0, 0.3, 1, 5)):
        w = qgf.relative_weight(strength, nets, batch, "qgf", cfg)
        a, v, push = paths(nets, a_0, w, cfg)
        lines = ""
        for path in a[::2].transpose(1, 0, 2)[:40]:  # (T+1, B, 2) -> (B, T/2 + 1, 2)
            points = " ".join(f"{x},{y}" for x, y in place(path))
            lines += f'<polyline class="path" points="{points}"/>'
        title = f"λ = {strength}" if strength else "λ = 0: behaviour cloning"
        panels.append(panel(column, 0, title, lines + dots(a[-1], "sample")))
        if strength == 1:
            for k, t in enumerate((0.1, 0.5, 0.9)):
                i = round(t * cfg.denoise_steps)
                now = a[i, :24]
                body = arrows(now, v[i, :24] / 4, "v flow")
                body += arrows(now, push[i, :24] / 4, "d push")
                panels.append(panel(k, 1, f"λ = 1, where it is at t = {t}", body))
    key_x, key_y = 3 * (SIDE + GAP) + 8, SIDE + GAP + 40
    panels.append(f'<g transform="translate({key_x},{key_y})">{KEY}</g>')
    heads = "".join(
        f'<marker id="{name}" viewBox="-1 -1 8 8" refX="5" refY="3" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path d="M0 0L6 3L0 6" class="{name}"/></marker>'
        for name in ("v", "d")
    )
    clip = f'<clipPath id="clip"><rect width="{SIDE}" height="{SIDE}"/></clipPath>'
    width, height = 4 * SIDE + 3 * GAP, 2 * (SIDE + 20) + GAP
    image = f'<image id="q" width="{SIDE}" height="{SIDE}" href="{contours(nets)}"/>'
    data = f'<g id="data">{dots(actions[:150], "data")}</g>'
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 0 {width + 2} {height + 1}">'
        f"<style>{STYLE}</style><defs>{heads}{clip}{image}{data}</defs>{''.join(panels)}</svg>\n"
    )
    (HERE / "toy.svg").write_text(text)
    print(f"saved {HERE / 'toy.svg'}, {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
