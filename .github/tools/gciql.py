# SPDX-License-Identifier: MIT
"""Train OGBench's GCIQL on the same data, goals and clock, and play the same episodes.

    python .github/tools/gciql.py CLONE scene SEED MINUTES OUT

CLONE is a clone of github.com/seohongpark/ogbench, whose GCIQL needs flax, ml_collections and
distrax as well. It trains with the settings of its own commands for these data for so many minutes,
compilation included, and is then played greedily, 100 episodes from first seed 2,000,000. They are
added to OUT/ENV-gciql-sSEED/episodes.csv. Goals are OGBench's oracle representation, as in qgf.py,
in place of full states. They are padded with zeros to the size of a state, which GCIQL expects.
"""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from play import qgf
from tqdm import tqdm

ALPHA = 1.0  # weight of behaviour cloning, in OGBench's commands for these four datasets
CALL = 100  # updates between looks at the clock


def make_agent(clone, data, seed):
    """-> GCIQL's agent, and its own sampler of batches, with oracle goals (N, G) of the data."""
    sys.path.insert(0, str(Path(clone, "impls").resolve()))
    from agents import gciql
    from utils.datasets import Dataset, GCDataset

    class OracleGoals(GCDataset):
        def get_observations(self, idxs):
            """What becomes of value_goals and actor_goals, (B, S)."""
            return self.dataset["oracle_reps"][idxs]

    config = gciql.get_config()
    config.alpha = ALPHA
    N = int(data.ends[-1]) + 1
    terminals = np.arange(N) == data.ends[:N]
    goals = np.zeros_like(data.observations[:N])
    goals[:, : data.goals.shape[1]] = data.goals[:N]
    columns = dict(observations=data.observations[:N], actions=data.actions[:N], oracle_reps=goals)
    columns |= dict(terminals=np.float32(terminals), valids=np.float32(~terminals))
    dataset = OracleGoals(Dataset.create(**columns), config)
    np.random.seed(seed)  # GCDataset draws from here
    example = dataset.sample(1)
    agent = gciql.GCIQLAgent.create(seed, example["observations"], example["actions"], config)
    return agent, partial(dataset.sample, config.batch_size)


def main(clone, env_name, seed, minutes, out):
    seed = int(seed)
    git = ["git", "-C", clone, "rev-parse", "--short=12", "HEAD"]
    code = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    cfg = qgf.config(env=env_name, seed=seed, episodes=100, horizon=1)
    task = qgf.find_task(env_name)
    env = qgf.make_env(task, cfg.horizon)
    path = qgf.find_files(task, cfg)[0]
    data = jax.device_get(qgf.load_data(path, task, env, cfg))
    agent, sample = make_agent(clone, data, seed)
    end = time.monotonic() + 60 * float(minutes)
    updates = 0
    with tqdm(desc="training gciql", unit=" updates", mininterval=10) as bar:
        while time.monotonic() < end:
            for _ in range(CALL):
                agent, log = agent.update(sample())
            bar.set_postfix({k: float(x) for k, x in log.items() if k.endswith("_loss")})
            bar.update(CALL)
            updates += CALL

    S = env.sizes[0]

    def act(nets, s, g, a_0, w, method, cfg):
        goals = np.zeros((len(s), S), np.float32)
        goals[:, : g.shape[1]] = g
        return agent.sample_actions(s, goals, seed=jax.random.PRNGKey(0), temperature=0), 0.0

    qgf.sample_actions = act  # which rollout calls
    envs = qgf.make_envs(task, cfg)
    results = qgf.rollout(envs, {}, 0.0, "bc", env.sizes, cfg)
    envs.close(terminate=True)
    key = dict(env=task.name, seed=seed, first_seed=cfg.first_seed, code=code, updates=updates)
    key |= dict(method="gciql", guidance=0.0, weight=0.0, w=0)
    rows = [
        key | dict(episode=i, success=success, **{"return": total}, length=length)
        for i, (success, total, length) in enumerate(results.tolist())
    ]
    path = Path(out) / f"{task.name}-gciql-s{seed}" / "episodes.csv"
    qgf.write_csv(path, qgf.read_csv(path) + rows)
    print(f"saved {path}: {updates:,} updates, success {results[:, 0].mean():.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
