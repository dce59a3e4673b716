# SPDX-License-Identifier: MIT
"""Race qgf.py against the official code: minutes of training until a task is solved.

    python .github/race.py CLONE    race, save results/race/race.csv, print a table
    python .github/race.py          print the table that was saved

CLONE is as for speed.py. Run `python qgf.py --env cube-single-task2` before: it gets the data.
Both programs learn from these data with its settings: sizes of networks, batches, learning rate,
γ, τ and chunks. They differ as README says. Each makes PART updates of all its networks in turn.
The clock runs while it trains, and while it compiles, but not while episodes are played. Both
play the same episodes. qgf.py guides with its default λ. The official code has no default: its w
is the best of WEIGHTS after the last update of seed 0, on episodes that are not the race's.
Nothing else should run meanwhile.
"""

import importlib
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import agree
import jax
import jax.numpy as jnp
import numpy as np
import ogbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import curves  # noqa: E402

import qgf  # noqa: E402

ENV = "cube-single-task2"
LEVEL = 0.8  # of success, which is to be reached
SEEDS = 3  # of training
PART = 2000  # updates between two points of the curve
EPISODES = 50  # of a point and seed
WEIGHTS = (0.03, 0.06, 0.12, 0.25, 0.5)
OTHER = 5_000_000  # seed of the first episode that w is chosen on
OURS, OFFICIAL = "qgf", "official code"
FOLDER = HERE / "results" / "race"


def ours(seed, data, sizes):
    """-> learn(n), which returns the networks that act after n more updates."""
    cfg = qgf.parse(["--env", ENV, "--seed", str(seed)])
    states = {learner: qgf.init_state(learner, sizes, cfg) for learner in qgf.LEARNERS}

    def learn(n):
        for learner in states:
            for _ in range(n // qgf.CALL):
                states[learner], log = qgf.train(learner, states[learner], data, qgf.CALL, cfg)
                jax.device_get(log)
        return jax.tree.map(jnp.copy, states["policy"].average | states["critic"].average)

    return learn


def official(seed, path, env, cfg):
    """The same of the official code -> learn(n), which returns the agent after n more updates."""
    module = importlib.import_module("agents.qgf")
    arrays = ogbench.load_dataset(path, add_info=True)
    ogbench.relabel_utils.relabel_dataset(env.task.env_id, env.unwrapped, arrays)
    names = ["observations", "actions", "rewards", "masks", "terminals", "next_observations"]
    arrays = {name: arrays[name] for name in names}
    dataset = importlib.import_module("utils.datasets").Dataset.create(**arrays)
    config = module.get_config()
    config.update(
        actor_hidden_dims=(cfg.policy_width,) * cfg.depth,
        batch_size=cfg.batch_size,
        bc_lr=cfg.lr,
        critic_lr=cfg.lr,
        value_lr=cfg.lr,
        horizon_length=cfg.horizon,
        action_chunking=True,
        discount=cfg.discount,
        expectile=cfg.expectile,
        denoise_steps=cfg.denoise_steps,
    )
    config.value_network_kwargs.hidden_dims = (cfg.critic_width,) * cfg.depth
    np.random.seed(seed)  # batches are drawn from here
    agent = module.QGFAgent.create(seed, arrays["observations"][:1], arrays["actions"][:1], config)

    def learn(n):
        nonlocal agent
        for _ in range(n):
            batch = dataset.sample_sequence(cfg.batch_size, cfg.horizon, cfg.discount)
            agent, _ = agent.update(batch)
        return jax.block_until_ready(agent)

    return learn


def play(program, nets, w, envs, sizes, cfg, first_seed):
    """-> how many of cfg.episodes are solved."""
    number = itertools.count()

    def official_actions(agent, s, g, a_0, w, method, cfg):
        key = jax.random.PRNGKey(next(number))
        return agent.sample_actions(s, seed=key, guidance_weight=w), None

    before = qgf.sample_actions, qgf.FIRST_SEED
    qgf.FIRST_SEED = first_seed
    if program == OFFICIAL:
        qgf.sample_actions = official_actions
    results = qgf.rollout(envs, nets, w, "qgf", sizes, cfg)
    qgf.sample_actions, qgf.FIRST_SEED = before
    return int(results[:, 0].sum())


def race(clone):
    """Train both, then play; save the rows."""
    agree.use(clone)
    cfg = qgf.parse(["--env", ENV, "--episodes", str(EPISODES)])
    task = qgf.find_task(ENV)
    env = qgf.Chunks(task, cfg.horizon)
    (path,) = qgf.find_files(task, cfg)
    data = qgf.load_data(path, task, env, cfg)
    batch = qgf.sample_batch(jax.random.PRNGKey(0), data, replace(cfg, batch_size=1024))
    envs = qgf.make_envs(task, cfg)

    points = []  # of the curves: a row of the file, and the networks that act
    for seed in range(SEEDS):
        learners = {OURS: ours(seed, data, env.sizes), OFFICIAL: official(seed, path, env, cfg)}
        seconds = dict.fromkeys(learners, 0.0)
        for updates in range(PART, cfg.critic_updates + 1, PART):
            for program, learn in learners.items():
                start = time.perf_counter()
                nets = learn(PART)
                seconds[program] += time.perf_counter() - start
                row = dict(task=ENV, program=program, seed=seed, updates=updates)
                points.append((row | dict(seconds=f"{seconds[program]:.1f}"), nets))
            print(f"seed {seed}, {updates} updates: {seconds}", flush=True)

    last = next(x for row, x in reversed(points) if (row["program"], row["seed"]) == (OFFICIAL, 0))
    rows, chosen = [], {}
    for w in WEIGHTS:
        chosen[w] = play(OFFICIAL, last, w, envs, env.sizes, cfg, OTHER)
        print(f"{OFFICIAL}, w {w}: {chosen[w]} of {EPISODES} other episodes", flush=True)
    best = max(chosen, key=chosen.get)
    for row, nets in points:
        w = best
        if row["program"] == OURS:
            w = qgf.relative_weight(cfg.guidance[0], nets, batch, "qgf", cfg)
        solved = play(row["program"], nets, w, envs, env.sizes, cfg, qgf.FIRST_SEED)
        rows.append(row | dict(w=f"{w:.4g}", episodes=EPISODES, solved=solved))
        qgf.write_csv(FOLDER / "race.csv", rows)
        print(rows[-1], flush=True)
    envs.close(terminate=True)


def table(rows):
    """-> lines of text: success at each point, and when each program first reaches LEVEL."""
    lines = [f"{'':14}{'updates':>8}{'minutes':>9}  success"]
    answers = []
    for program, points in curves.by_minutes(rows).items():
        reached = [minutes for minutes, y in points.items() if y.mean() >= LEVEL]
        when = f"after {reached[0]:.1f} minutes" if reached else "not reached"
        answers.append(f"{program}: {LEVEL:.2f} {when}")
        for k, (minutes, y) in enumerate(points.items(), start=1):
            by_seed = " ".join(f"{x:.2f}" for x in y)
            lines.append(f"{program:14}{k * PART:8}{minutes:9.2f}  {y.mean():.2f} ({by_seed})")
    return lines + answers


def main(*clone):
    if clone:
        race(*clone)
    print(*table(qgf.read_csv(FOLDER / "race.csv")), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
