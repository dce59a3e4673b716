# SPDX-License-Identifier: MIT
"""Film an episode that QGF solved and BC did not, from the same start, side by side.

    MUJOCO_GL=egl PYTHONPATH=. python .github/film.py runs/cube-single-s0 cube.webp
"""
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

import qgf


def play(nets, cfg, env_id, method, w, seed):
    """-> the frames of an episode, and its words."""
    env = qgf.Chunks(env_id, cfg.horizon, width=320, height=320)
    frames, inner = [], env.envs[0]
    step = inner.step

    def filmed(action):
        result = step(action)
        frames.append(inner.unwrapped.render())
        return result

    inner.step = filmed
    obs, info = env.reset(seed=seed)
    rng, played = np.random.default_rng(seed), np.zeros(3)
    while info["seed"][0] == seed:
        noise = np.float32(rng.standard_normal((1, 1, env.action_space.shape[1] * env.action_space.shape[2])))
        actions, _ = qgf.sample_actions(nets, obs, noise, w, method, cfg.denoise_steps)
        obs, new, _, _, info = env.step(np.reshape(actions, env.action_space.shape))
        played += new[0]
    success, _, length = played
    return frames[:-1:4] + frames[-1:], f"{method}: {'solved' if success else 'not solved'} in {length:.0f} steps"


def main(folder, path):
    states, record, _ = qgf.load(Path(folder) / "checkpoint.npz")
    cfg = qgf.Config(**record["config"])
    nets = jax.tree.map(lambda x: x[0], states.target)
    results = qgf.read_results(Path(folder) / "episodes.csv", cfg.seeds)
    step = int(states.step[0])
    bc, guided = results[step, "bc", 0.0, 0.0][0], results[step, "qgf", 0.1, 0.0][0]
    good = [i for i in range(min(len(bc), len(guided))) if guided[i, 1] and not bc[i, 1]]
    if not good:
        raise SystemExit(f"{folder} has no episode that QGF solved and BC did not: evaluate more")
    seed, env_id = qgf.FIRST_EPISODE + good[0], qgf.find_task(cfg.env)[1]
    clips = [play(nets, cfg, env_id, "bc", 0.0, seed), play(nets, cfg, env_id, "qgf", guided[good[0], 0], seed)]
    images = []
    for i in range(max(len(frames) for frames, _ in clips) + 15):  # the last frame stays a while
        pair = [Image.fromarray(frames[min(i, len(frames) - 1)][90:]) for frames, _ in clips]  # without the sky
        for image, (_, words) in zip(pair, clips):
            at = 6, image.height - 22
            ImageDraw.Draw(image).text(at, words, "white", font_size=15, stroke_width=1, stroke_fill="black")
        images.append(Image.fromarray(np.concatenate(pair, axis=1)))
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0, quality=50, method=6)
    print(f"saved in {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
