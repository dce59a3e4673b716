# SPDX-License-Identifier: MIT
"""Speed, on this machine, which should do nothing else. What `updates`, `seeds` and `rollout` compare runs alternately.

PYTHONPATH=. python .github/bench.py updates [CLONE]   of several sizes; next to the official code's, from its clone
PYTHONPATH=. python .github/bench.py seeds             several seeds at once by vmap, next to one alone
PYTHONPATH=. python .github/bench.py cost [WIDTH DEPTH]   of a chunk by each method: time, and operations next to BC's
PYTHONPATH=. python .github/bench.py rollout           an evaluation, policy and all, next to env.step in one process
PYTHONPATH=. python .github/bench.py success CLONE     QGF on cube-single by training time, next to the official code's
"""

import importlib
import multiprocessing
import sys
import time
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import qgf

N, S, A, H, B = 200_000, 28, 5, 5, 256
GPU = jax.default_backend() == "gpu"
PAPER = dict(width=1024, depth=4, batch_size=1024)
SIZES = (dict(width=256, depth=3), dict(width=512, depth=4))
SIZES += (PAPER,) if GPU else (dict(width=64, depth=2), dict(width=256, depth=4))


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


def on_device():
    data, starts = random_data(), np.arange(N - 1000)
    return jax.device_put(data | dict(starts=np.int32(np.resize(starts, N)), n_starts=np.int32(len(starts))))


def ours(data, cfg):
    """Work for `compare`: a few updates of each seed, one after the other or by vmap."""
    states, n = qgf.init_states((S, 0, A), cfg), qgf.CALL if GPU else 20
    one = qgf.replace(cfg, seeds=1)
    add = lambda s: jax.tree.map(lambda x: x[None], s)
    vmapped = jax.jit(jax.vmap(lambda s: qgf.train(add(s), data, n, one)), donate_argnums=0)
    train = vmapped if cfg.seeds > 1 else lambda s: qgf.train(s, data, n, cfg)

    def work():
        nonlocal states
        states, info = train(states)
        if cfg.seeds > 1:
            states = jax.tree.map(lambda x: x[:, 0], states)
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


def official(clone, width, depth, batch_size=B):
    """The same for an agent of the official code and its own sampler."""
    agent = official_agent(clone, width, depth)
    data = official_data(random_data())

    def work():
        nonlocal agent
        for _ in range(10):
            agent, _ = agent.update(data.sample_sequence(batch_size, H, 0.99))
        jax.block_until_ready(agent.policy.params)
        return 10

    return work


def official_data(data):
    from utils.datasets import Dataset

    data = {k: np.asarray(data[k]) for k in ("observations", "actions", "rewards", "masks", "ends")}
    last = np.float32(data.pop("ends") == np.arange(len(data["rewards"])))
    return Dataset.create(**data, terminals=last, next_observations=np.roll(data["observations"], -1, axis=0))


def updates(clone=None):
    data = on_device()
    for size in SIZES:
        name = f"{size['width']}x{size['depth']}"
        other = {f"official {name}": official(clone, **size)} if clone else {}
        compare(other | {f"qgf.py {name}": ours(data, qgf.Config(**size))}, "updates")


def seeds():
    data = on_device()
    for size in SIZES[:3]:
        cfgs = [qgf.Config(**size, seeds=k) for k in ((1, 10) if GPU else (1, 2, 4, 8))]
        compare({f"{c.seeds} seeds {c.width}x{c.depth}": ours(data, c) for c in cfgs}, "updates")


def cost(width=256, depth=3):
    cfg = qgf.Config(width=int(width), depth=int(depth), edp=1.0)
    nets = jax.tree.map(lambda x: x[0], qgf.init_states((S, 0, A), cfg).target)
    print(f"{'method':16}{'ms, batch 1':>13}{'µs, batch 256':>15}{'GFLOP, batch 256':>18}")
    for method in ("bc", "bc@4", "bc@16", "qgf", "qgf@4", "qgf-jacobian", "qgf-chain", "bptt", "qfql", "gradstep", "edp"):
        (name, n), cells = qgf.parse_method(method), []
        for batch, unit in ((1, 1e3), (256, 1e6)):
            args = nets, jnp.zeros((batch, S)), jnp.ones((batch, n, H * A)), 0.01
            compiled = qgf.sample_actions.lower(*args, method=name, T=10).compile()
            seconds = []
            for _ in range(22):
                start = time.perf_counter()
                jax.block_until_ready(compiled(*args))
                seconds.append(time.perf_counter() - start)
            cells.append(np.median(seconds[2:]) / batch * unit)
        flops = compiled.cost_analysis().get("flops", float("nan")) / 1e9  # as XLA counts: a loop's body once
        print(f"{method:16}{cells[0]:13.2f}{cells[1]:15.1f}{flops:18.3f}", flush=True)


def environments(env_id):
    multiprocessing.set_forkserver_preload(["ogbench.manipspace", "optax", "scipy.stats"])
    make = partial(qgf.Chunks, env_id, H, M=qgf.SLOTS)
    return qgf.AsyncVectorEnv([make] * qgf.CORES, context="forkserver", autoreset_mode=qgf.AutoresetMode.DISABLED)


def rollout():
    cfg, env_id = qgf.Config(episodes=40), "cube-single-singletask-v0"
    nets = jax.tree.map(lambda x: x[0], qgf.init_states((S, 0, A), cfg).target)
    envs = environments(env_id)
    alone, rng = qgf.Chunks(env_id, H), np.random.default_rng(0)
    for i in range(4):
        start = time.perf_counter()
        rate = qgf.rollout(envs, nets, 0.0, "bc", cfg)[:, 2].sum() / (time.perf_counter() - start)
        alone.reset(seed=0)
        start, steps = time.perf_counter(), 0
        for _ in range(40):
            steps += alone.step(rng.uniform(-1, 1, (1, H, A)))[1][0, 2]
        single = steps / (time.perf_counter() - start)
        if i:  # the first compiles, and makes the environments
            print(f"{rate:.0f} steps/s, env.step in one process {single:.0f}, ratio {rate / single:.2f}", flush=True)
    envs.close(terminate=True)


def success(clone):
    """Both learn from the same data, each with its own defaults (the official one with chunks), and act by our code
    at λ = 0.1. Only updates are timed, compiling left out; each is evaluated once its time has doubled."""
    from agree import layers

    cfg, env_id = qgf.Config(seed=int(time.time()) % 1000), "cube-single-singletask-v0"
    data = qgf.load_dataset(qgf.find_dataset(cfg, "cube-single-play-v0")[0], qgf.Chunks(env_id, H), H)
    probe = qgf.sample_batch(jax.random.PRNGKey(0), data, qgf.replace(cfg, batch_size=qgf.PROBE))["observations"]
    a_0, envs = jax.random.normal(jax.random.PRNGKey(0), (qgf.PROBE, 1, H * A)), environments(env_id)
    agent, states = official_agent(clone, 512, 4), qgf.init_states((S, 0, A), cfg)
    theirs = official_data(data)

    def train_official():
        nonlocal agent
        for _ in range(100):
            agent, _ = agent.update(theirs.sample_sequence(B, H, cfg.discount))
        jax.block_until_ready(agent.policy.params)
        return dict(policy=layers(agent.policy.params), critic=layers(agent.target_critic.params))

    def train_ours():
        nonlocal states
        states, _ = qgf.train(states, data, 100, cfg)
        return jax.block_until_ready(jax.tree.map(lambda x: x[0], states.target))

    kinds = {"official": train_official, "qgf.py": train_ours}
    seconds, updates = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 100)
    for work in kinds.values():
        work()
    for limit in 15 * 2 ** np.arange(6):
        for name, work in kinds.items():
            while seconds[name] < limit:
                start = time.perf_counter()
                nets = work()
                seconds[name] += time.perf_counter() - start
                updates[name] += 100
            w = qgf.relative_weight(0.1, nets, probe, a_0, "qgf", cfg.denoise_steps)
            won = qgf.rollout(envs, nets, w, "qgf", cfg)[:, 0].mean()
            print(f"{name:10} after {seconds[name]:4.0f} s and {updates[name]:6} updates: QGF solves {won:.2f}", flush=True)
    envs.close(terminate=True)


if __name__ == "__main__":
    dict(updates=updates, seeds=seeds, cost=cost, rollout=rollout, success=success)[sys.argv[1]](*sys.argv[2:])
