# SPDX-License-Identifier: MIT
"""Speed as ratios: what is compared runs in turn, several times, on this machine, which should do nothing else.

PYTHONPATH=. python .github/bench.py updates [CLONE]    of four sizes; beside the official code's, from its clone
PYTHONPATH=. python .github/bench.py seeds      several seeds at once by vmap, beside one alone
PYTHONPATH=. python .github/bench.py slices     ten slices of 100k transitions in turn, beside one that stays
PYTHONPATH=. python .github/bench.py rollout RUN    a saved run's episodes, policy and all, beside env.step in one process
"""

import importlib
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np

import qgf

N, S, A, H, B = 200_000, 28, 5, 5, 256
SIZES = ((64, 2), (256, 3), (256, 4), (512, 4))


def compare(kinds, unit, repeats=5):
    """kinds: name -> a function that does some work and returns its amount. Prints rates, and ratios to the first."""
    rates = {name: [] for name in kinds}
    for work in kinds.values():
        work()  # compiles
    for _ in range(repeats):
        for name, work in kinds.items():
            start, done = time.perf_counter(), 0
            while (took := time.perf_counter() - start) < 3:
                done += work()
            rates[name].append(done / took)
    for name, rate in rates.items():
        ratio = np.divide(rate, next(iter(rates.values())))
        spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        print(f"{name:24} {np.median(rate):8.1f} {unit}/s, ratio {spread}", flush=True)


def random_data():
    rng = np.random.default_rng(0)
    data = dict(observations=rng.normal(size=(N, S)), actions=rng.uniform(-1, 1, (N, A)))
    data |= dict(rewards=rng.normal(size=N), masks=np.ones(N))
    data = {k: np.float32(v) for k, v in data.items()}
    return data | dict(ends=np.int32(np.arange(N) // 1000 * 1000 + 999))


def ours(data, cfg):
    """Work for `compare`: a few updates of each seed, one after the other or by vmap."""
    states = qgf.init_seeds(S, A, 0, cfg)
    n = 20  # a call's; a run makes qgf.CALL of them in one
    many = jax.jit(jax.vmap(lambda s: qgf.train(s, data, n, cfg)), donate_argnums=0)
    train = many if cfg.seeds > 1 else lambda s: qgf.train_seeds(s, data, n, cfg)

    def work():
        nonlocal states
        states, info = train(states)
        np.asarray(info["q"])
        return n * cfg.seeds

    return work


def official_agent(clone, width, depth, name="QGFAgent", module="qgf", **settings):
    """An agent of the official code, from its clone. Needs flax, ml_collections and distrax."""
    if clone not in sys.path:
        sys.path.insert(0, clone)
        agents = types.ModuleType("agents")  # without its __init__, which imports agents that need more
        agents.__path__ = [f"{clone}/agents"]
        sys.modules["agents"] = agents
    agent = importlib.import_module(f"agents.{module}")
    config = agent.get_config()
    config.update(
        settings | dict(actor_hidden_dims=(width,) * depth, horizon_length=H, action_chunking=True)
    )
    config.value_network_kwargs = dict(hidden_dims=(width,) * depth, layer_norm=True)
    return getattr(agent, name).create(
        0, np.zeros((2, S), np.float32), np.zeros((2, A), np.float32), config
    )


def official(clone, width, depth):
    """The same for an agent of the official code and its own sampler."""
    agent = official_agent(clone, width, depth)
    from utils.datasets import Dataset

    data = random_data()
    last = np.float32(data.pop("ends") == np.arange(N))
    data = Dataset.create(
        **data, terminals=last, next_observations=np.roll(data["observations"], -1, axis=0)
    )

    def work():
        nonlocal agent
        for _ in range(10):
            agent, _ = agent.update(data.sample_sequence(B, H, 0.99))
        jax.block_until_ready(agent.policy.params)
        return 10

    return work


def updates(clone=None):
    data = qgf.to_device(random_data(), H)
    for width, depth in SIZES:
        beside = {f"official {width}x{depth}": official(clone, width, depth)} if clone else {}
        cfg = qgf.Config(width=width, depth=depth)
        compare(beside | {f"qgf.py {width}x{depth}": ours(data, cfg)}, "updates")


def seeds():
    data = qgf.to_device(random_data(), H)
    for width, depth in ((64, 2), (256, 3), (512, 4)):
        cfgs = [qgf.Config(width=width, depth=depth, seeds=k) for k in (1, 2, 4, 8)]
        compare({f"{c.seeds} seeds {width}x{depth}": ours(data, c) for c in cfgs}, "updates")


def slices():
    cfg = qgf.Config(swap=200)
    base, _, env_id, dataset, _ = qgf.find_task(cfg.env)
    [path], _ = qgf.find_dataset(cfg, base, dataset)
    env = qgf.make_env(env_id, "")
    with tempfile.TemporaryDirectory() as folder, np.load(path) as file:
        paths = [Path(folder) / f"{i}.npz" for i in range(10)]
        for i, p in enumerate(paths):
            np.savez(p, **{k: file[k][10_010 * i :][:100_100] for k in file.files})
        load = lambda path: qgf.to_device(qgf.load_dataset(path, env), H)
        states = qgf.init_seeds(S, A, 0, cfg)

        def work(source):
            nonlocal states
            _, data = next(source)
            for _ in range(cfg.swap // qgf.CALL):
                states, info = qgf.train_seeds(states, data, qgf.CALL, cfg)
                np.asarray(info["q"])
            return cfg.swap

        synchronous = ((p, load(p)) for _ in range(10**6) for p in paths)
        kinds = dict(resident=qgf.stream(paths[:1], load, cfg, 0), stream=qgf.stream(paths, load, cfg, 0))
        kinds |= dict(synchronous=synchronous)
        compare({k: partial(work, source) for k, source in kinds.items()}, "updates")


class Stopwatch(gymnasium.Wrapper):
    spent = 0.0

    def step(self, action):
        start = time.perf_counter()
        try:
            return super().step(action)
        finally:
            Stopwatch.spent += time.perf_counter() - start


def rollout(folder):
    states, record = qgf.load_run(Path(folder), {})
    cfg = qgf.Config(**record["config"])
    _, short, env_id, _, _ = qgf.find_task(cfg.env, cfg.goal)
    nets = qgf.nets_by_run(states, short, cfg)
    jobs = [qgf.Job(next(iter(nets)), m, w, i) for m, w in (("bc", 0.0), ("qgf", 0.03)) for i in range(80)]
    for i in range(qgf.SLOTS):
        qgf.slot(env_id, cfg.goal, i)["env"] = Stopwatch(qgf.make_env(env_id, cfg.goal))

    def here(commands):  # a process of `rollout` that is this one
        future = qgf.Future()
        future.set_result(qgf.act(env_id, cfg.goal, commands))
        return future

    with qgf.simulators(env_id, cfg.goal) as processes:
        qgf.rollout(nets, processes, jobs, cfg, "starting")
        for _ in range(3):
            Stopwatch.spent, start = 0.0, time.perf_counter()
            n = sum(e.length for e in qgf.rollout(nets, processes, jobs, cfg, "all processes"))
            rate = n / (time.perf_counter() - start)
            alone = (
                sum(e.length for e in qgf.rollout(nets, [here], jobs, cfg, "one process")) / Stopwatch.spent
            )
            print(
                f"{rate:.0f} steps/s, one process in env.step alone {alone:.0f}, ratio {rate / alone:.2f}"
            )


if __name__ == "__main__":
    dict(updates=updates, seeds=seeds, slices=slices, rollout=rollout)[sys.argv[1]](*sys.argv[2:])
