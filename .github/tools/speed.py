# SPDX-License-Identifier: MIT
"""Compare the speed of qgf.py with that of the official code, on the same random data.

    python .github/tools/speed.py CLONE

CLONE is a clone of github.com/zhouzypaul/qgf; this needs flax, ml_collections and distrax as well.
An update is one of policy, critic and value, with its batch, as each program's own loop makes it.
An action is a chunk for each of 10 states. The two alternate, five times each. The table has the
medians of updates (or calls) per second, and the median and range of the five ratios. Nothing
else should run meanwhile.
"""

import importlib
import sys
import time
from functools import partial
from pathlib import Path

import agree
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import qgf

N, LENGTH = 100_000, 1000  # rows, and those of a trajectory
S, A, H = 37, 5, 5  # sizes as in cube-double
ROUNDS = 5


def random_arrays():
    """What both programs need of the data: rows of numbers, of the right shapes."""
    rng = np.random.default_rng(0)
    states = np.float32(rng.normal(size=(N + 1, S)))
    return dict(
        observations=states[:-1],
        actions=np.float32(rng.uniform(-1, 1, (N, A))),
        rewards=np.float32(rng.normal(size=N)),
        masks=np.ones(N, np.float32),
        terminals=np.float32(np.arange(1, N + 1) % LENGTH == 0),
        next_observations=states[1:],
    )


def official(arrays, width):
    """-> update(n) and act(method, n) of the official code."""
    module = importlib.import_module("agents.qgf")
    dataset = importlib.import_module("utils.datasets").Dataset.create(**arrays)
    config = module.get_config()
    config.update(actor_hidden_dims=(width,) * 4, horizon_length=H, action_chunking=True)
    config.value_network_kwargs = dict(hidden_dims=(width,) * 4, layer_norm=True)
    examples = arrays["observations"][:1], arrays["actions"][:1]
    agents = {}
    for method in ("qgf", "qgf-jacobian"):
        config.apply_jacobian = method == "qgf-jacobian"
        agents[method] = module.QGFAgent.create(0, *examples, config)
    agent = agents["qgf"]

    def update(n):
        nonlocal agent
        for _ in range(n):
            batch = dataset.sample_sequence(config["batch_size"], H, config["discount"])
            agent, _ = agent.update(batch)
        jax.block_until_ready(agent.policy.params)

    def act(method, n):
        for i in range(n):
            key = jax.random.PRNGKey(i)
            np.asarray(agents[method].sample_actions(arrays["observations"][:10], seed=key))

    return update, act


def ours(arrays, width):
    """-> update(n) and act(method, n) of qgf.py."""
    cfg = qgf.Config(policy_width=width, critic_width=width, horizon=H)
    row = np.arange(N, dtype=np.int32)
    ends = row // LENGTH * LENGTH + LENGTH - 1
    starts = row[row + H <= ends]
    columns = {name: arrays[name] for name in ("observations", "actions", "rewards", "masks")}
    columns |= dict(goals=np.zeros((N, 0), np.float32), ends=ends, starts=starts)
    data = jax.device_put(qgf.Data(**columns, chunks=np.int32(len(starts))))
    states = {
        name: qgf.init_state(init, (S, 0, A), cfg) for name, (init, *_) in qgf.LEARNERS.items()
    }

    def update(n):
        others = {}
        for name, (_, loss, _) in qgf.LEARNERS.items():
            for _ in range(n // qgf.CALL):
                state = states[name]
                states[name], log = qgf.train(loss, 10**6, state, others, data, qgf.CALL, cfg)
                jax.device_get(log)
            others = others | states[name].average

    def act(method, n):
        nets = states["policy"].average | states["critic"].average
        estimator = qgf.ESTIMATORS[method]
        s, g = arrays["observations"][:10], np.zeros((10, 0))
        for i in range(n):
            a_0 = np.float32(np.random.default_rng(i).normal(size=(10, 1, H * A)))
            np.asarray(qgf.sample_actions(nets, s, g, a_0, 1.0, estimator, cfg)[0])

    return update, act


def compare(name, theirs, mine, n):
    """Time both, alternately, and print a row."""
    mine(n)  # compiles
    theirs(n)
    times = np.zeros((ROUNDS, 2))
    for row in times:
        for k, run in enumerate((mine, theirs)):
            start = time.perf_counter()
            run(n)
            row[k] = time.perf_counter() - start
    rates = n / np.median(times, axis=0)
    ratios = times[:, 1] / times[:, 0]
    print(
        f"{name:28}{rates[0]:9.1f}{rates[1]:10.1f}{np.median(ratios):8.2f}"
        f"  [{ratios.min():.2f}, {ratios.max():.2f}]",
        flush=True,
    )


def main(clone):
    agree.use(clone)
    arrays = random_arrays()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: per second")
    print(f"{'':28}{'qgf.py':>9}{'official':>10}{'ratio':>8}")
    for width, n in ((64, 400), (256, 200), (512, 100), (1024, 100)):
        update, act = ours(arrays, width)
        their_update, their_act = official(arrays, width)
        compare(f"updates, {width} units", their_update, update, n)
        if width == 512:
            for method in ("qgf", "qgf-jacobian"):
                compare(f"actions, {method}", partial(their_act, method), partial(act, method), 20)


if __name__ == "__main__":
    main(sys.argv[1])
