# SPDX-License-Identifier: MIT
"""qgf.py next to the official code, whose results are in golden.npz.

python -m pytest -k golden     agree.py writes that file, and says what is in it
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import qgf

GOLDEN = dict(np.load(Path(__file__).parent / "golden.npz"))


def part(name):
    """What golden.npz has under a name."""
    return {k.removeprefix(f"{name}/"): x for k, x in GOLDEN.items() if k.startswith(f"{name}/")}


B, H, A = GOLDEN["batch/actions"].shape[1:]
S = GOLDEN["batch/observations"].shape[2]
SETTINGS = {name: x.item() for name, x in part("settings").items()}
CFG = qgf.Config(**SETTINGS, lr_decay=0.0)  # the official rate is constant
SIZES = S, 0, A  # no goals
LIKE = {
    name: network
    for init in (qgf.init_policy, qgf.init_critic)
    for name, network in init(jax.random.PRNGKey(0), SIZES, CFG).items()
}
LIKE["target"] = LIKE["critic"]


def networks(name):
    """{network: its layers} of what golden.npz has under a name as vectors."""
    return {network: ravel_pytree(LIKE[network])[1](x) for network, x in part(name).items()}


def close(ours, official):
    """Equal to 1e-5 of an array's largest entry, in each array of a pytree."""
    assert jax.tree.structure(ours) == jax.tree.structure(official)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(official), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


NETS = networks("params")
AVERAGE = NETS | dict(critic=NETS.pop("target"))  # the official code averages nothing else
BATCHES = [
    qgf.Batch(
        observations=GOLDEN["batch/observations"][i],
        goals=np.zeros((B, 0)),
        actions=GOLDEN["batch/actions"][i].reshape(B, H * A),
        returns=GOLDEN["batch/rewards"][i],
        discounts=CFG.discount**H * GOLDEN["batch/masks"][i],
        next_observations=GOLDEN["batch/next_observations"][i],
    )
    for i in range(3)
]


def test_golden_noise():
    """What the policy's loss draws from its key; if only jax has changed, this fails too."""
    key_noise, key_time = jax.random.split(GOLDEN["key/loss"])
    close(jax.random.normal(key_noise, (B, H * A)), GOLDEN["noise/flow"])
    steps = jax.random.randint(key_time, (B, 1), 0, CFG.denoise_steps + 1)
    close(steps / CFG.denoise_steps, GOLDEN["noise/time"])


def test_golden_chunks():
    """Returns and masks of chunks, at each row where the official code is right."""
    columns = {name: x for name, x in part("data").items() if name != "terminals"}
    first, official = GOLDEN["chunks/first"], part("chunks")
    N = len(columns["actions"])
    last = np.flatnonzero(GOLDEN["data/terminals"])
    ends = last[np.searchsorted(last, np.arange(N))]
    data = qgf.Data(
        **columns, goals=np.zeros((N, 0)), ends=ends, starts=first, chunks=np.int32(len(first))
    )
    data = qgf.Data(*map(jnp.asarray, data))
    batch = qgf.sample_batch(jax.random.PRNGKey(0), data, replace(CFG, batch_size=200))
    same = batch.observations[:, None] == official["observations"]  # (200, len(first), S)
    assert (same.all(axis=2).sum(axis=1) == 1).all()  # each starts where it may
    k = same.all(axis=2).argmax(axis=1)  # (200,) where in chunks/first
    assert set(k.tolist()) == set(range(len(first)))  # each was drawn
    assert 2 <= (official["masks"] == 0).sum() < len(first)
    close(batch.actions, official["actions"][k].reshape(200, H * A))
    close(batch.returns, official["rewards"][k])
    close(batch.discounts, CFG.discount**H * official["masks"][k])
    seen = official["masks"][k][:, None]  # after a success, nothing reads the next state
    close(seen * batch.next_observations, seen * official["next_observations"][k])


@pytest.mark.parametrize("name", ["policy", "critic", "value"])
def test_golden_loss(name):
    loss = qgf.policy_loss if name == "policy" else qgf.critic_loss
    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnames="cfg")
    gradient, log = differentiate(NETS, AVERAGE, {}, BATCHES[0], GOLDEN["key/loss"], cfg=CFG)
    logged = dict(policy="policy_loss", critic="q_loss", value="v_loss")[name]
    close(log[logged], GOLDEN[f"loss/{name}"])
    close(gradient[name], networks("gradient")[name])


@pytest.mark.parametrize("learner", ["policy", "critic"])
def test_golden_updates(learner, monkeypatch):
    """Three updates, each on another batch: parameters, Adam's moments, the critic's average."""
    monkeypatch.setattr(qgf, "sample_batch", lambda key, data, cfg: data)
    names = ["policy"] if learner == "policy" else ["critic", "value"]
    params, average = ({name: nets[name] for name in names} for nets in (NETS, AVERAGE))
    state = params, average, optax.adam(CFG.lr).init(params), GOLDEN["key/state"], 0
    state = qgf.State(*jax.tree.map(jnp.array, state))  # a copy, since train uses it up
    loss = qgf.LEARNERS[learner][1]
    for batch in BATCHES:
        state, _ = qgf.train(loss, 100, state, {}, batch, 1, CFG)
    adam = state.opt[0]
    for name in names:
        close(state.params[name], networks("after")[name])
        close(adam.mu[name], networks("mu")[name])
        close(adam.nu[name], networks("nu")[name])
    if learner == "critic":
        close(state.average["critic"], networks("after")["target"])


@pytest.mark.parametrize("method", part("actions"))
def test_golden_actions(method):
    name, at, samples = method.partition("@")
    a_0, w = GOLDEN[f"noise/actions{at}{samples}"], GOLDEN[f"weight/{method}"]
    s, g = BATCHES[0].observations, BATCHES[0].goals
    actions, _ = qgf.sample_actions(AVERAGE, s, g, a_0, w, qgf.ESTIMATORS[name], CFG)
    close(actions, GOLDEN[f"actions/{method}"])
