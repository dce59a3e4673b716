# SPDX-License-Identifier: MIT
"""Film an episode that QGF solved and behaviour cloning did not, from the same start.

    MUJOCO_GL=egl python .github/film.py .github/cube.webp --env cube-double

The options are those of the run, which must have ended. Episodes of the goals 2 to 5 come first,
since more than one cube must move for them. Each episode is played again, alone: rounding differs
between one environment and several, so the first that ends as it did then is filmed. The film stops
a little after QGF has solved it.
"""

import itertools
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import qgf  # noqa: E402

SIZE = 320  # pixels, of each side
SKY = 90  # rows at the top, left out
EVERY = 4  # environment steps between frames


def load_run(cfg, task, env):
    """-> the networks that act, and the rows of the table after the last update."""
    out = Path(cfg.out).expanduser()
    folders = dict(policy=out / f"{task.dataset}-policy-s{cfg.seed}")
    folders["critic"] = out / f"{task.name}-s{cfg.seed}"
    nets = {}
    for learner, folder in folders.items():
        state = qgf.load(folder, qgf.init_state(learner, env.sizes, cfg), {})
        nets |= state.average
    rows = qgf.read_csv(folders["critic"] / "episodes.csv")
    return nets, [row for row in rows if row["updates"] == str(state.step)]


def choose(rows, guidance):
    """-> numbers of episodes that QGF solved and BC did not, and QGF's w; goals 2 to 5 first."""
    bc = {row["episode"]: row for row in rows if row["method"] == "bc"}
    good = [
        (int(row["episode"]), float(row["w"]))
        for row in rows
        if (row["method"], row["guidance"], row["success"]) == ("qgf", str(guidance), "1.0")
        if bc[row["episode"]]["success"] == "0.0"
    ]
    return sorted(good, key=lambda x: (x[0] % qgf.GOALS == 0, x[0]))


def play(env, nets, method, w, episode, cfg):
    """Episode number `episode`, as `qgf.rollout` plays it -> success, frames, what happened."""
    S, _, A = env.sizes
    frames = []
    step = env.env.step
    steps = itertools.count()

    def filmed(action):
        if next(steps) % EVERY == 0:
            frames.append(env.unwrapped.render())
        return step(action)

    obs, _ = env.reset(seed=qgf.FIRST_SEED + episode)
    rng = np.random.default_rng(episode)
    env.env.step = filmed
    over = False
    while not over:
        a_0 = np.float32(rng.standard_normal((1, 1, cfg.horizon * A)))
        s, g = obs[None, :S], obs[None, S:]
        actions, _ = qgf.sample_actions(nets, s, g, a_0, w, method, cfg)
        obs, _, over, _, info = env.step(np.reshape(actions, (cfg.horizon, A)))
    del env.env.step
    success, _, length = info["episode"]
    outcome = "solved" if success else "not solved"
    frames.append(env.unwrapped.render())
    return bool(success), frames, f"{method}: {outcome} in {length:.0f} steps"


def main(path, *options):
    cfg = qgf.parse(options)
    task = qgf.find_task(cfg.env)
    env = qgf.Chunks(task, cfg.horizon, width=SIZE, height=SIZE)
    nets, rows = load_run(cfg, task, env)
    for episode, w in choose(rows, cfg.guidance[0]):
        print(f"playing episode {episode}", flush=True)
        clips = [play(env, nets, method, w, episode, cfg) for method in ("bc", "qgf")]
        if [success for success, _, _ in clips] == [False, True]:
            break
    else:
        sys.exit("no episode that QGF solves and BC does not: evaluate more episodes")
    images = []
    for i in range(len(clips[1][1]) + 15):  # the last frame stays a while
        pair = []
        for _, frames, words in clips:
            image = Image.fromarray(frames[min(i, len(frames) - 1)][SKY:])
            at = 6, image.height - 22
            draw = ImageDraw.Draw(image)
            draw.text(at, words, "white", font_size=15, stroke_width=1, stroke_fill="black")
            pair.append(np.array(image))
        images.append(Image.fromarray(np.concatenate(pair, axis=1)))
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=100, loop=0, quality=35, method=6
    )
    print(f"saved {path}: episode {episode}, goal {1 + episode % qgf.GOALS}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    jax.config.update("jax_enable_x64", False)
    main(*sys.argv[1:])
