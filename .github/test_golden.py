# SPDX-License-Identifier: MIT
"""qgf.py next to the official code, whose results are in golden.npz.

python -m pytest -k golden     agree.py writes that file, and says what is in it
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qgf

GOLDEN = dict(np.load(Path(__file__).parent / "golden.npz"))


def part(name):
    """What golden.npz has under a name."""
    return {k.removeprefix(f"{name}/"): x for k, x in GOLDEN.items() if k.startswith(f"{name}/")}


def layers(name):
    """The layers of a network or of its gradient: a list of dicts."""
    out = {}
    for key, x in part(name).items():
        i, leaf = key.split("/")
        out.setdefault(i, {})[leaf] = x
    return list(out.values())


def close(ours, official):
    """Equal to 1e-5 of an array's largest entry, in each array of a pytree."""
    assert jax.tree.structure(ours) == jax.tree.structure(official)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(official), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


CFG = qgf.Config(**{k: x.item() for k, x in part("settings").items()}, fade=False)  # the paper's
NETS = {name: layers(f"params/{name}") for name in ("policy", "critic", "value")}
AVERAGE = NETS | dict(critic=layers("params/target"))  # the official code averages nothing else
BATCH = qgf.Batch(
    observations=GOLDEN["batch/observations"],
    goals=GOLDEN["batch/observations"][:, :0],  # none
    actions=GOLDEN["batch/actions"].reshape(len(GOLDEN["batch/actions"]), -1),
    returns=GOLDEN["batch/rewards"],
    discounts=CFG.discount**CFG.horizon * GOLDEN["batch/masks"],
    next_observations=GOLDEN["batch/next_observations"],
)


def test_golden_noise():
    """What the policy's loss draws from its key; if only jax has changed, this fails too."""
    key_noise, key_time = jax.random.split(GOLDEN["key/loss"])
    close(jax.random.normal(key_noise, BATCH.actions.shape), GOLDEN["noise/flow"])
    steps = jax.random.randint(key_time, GOLDEN["noise/time"].shape, 0, CFG.denoise_steps + 1)
    close(steps / CFG.denoise_steps, GOLDEN["noise/time"])


@pytest.mark.parametrize("name", ["policy", "critic", "value"])
def test_golden_loss(name):
    loss = qgf.policy_loss if name == "policy" else qgf.critic_loss
    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=4)
    gradient, log = differentiate(NETS, AVERAGE, BATCH, GOLDEN["key/loss"], CFG)
    logged = dict(policy="policy_loss", critic="q_loss", value="v_loss")[name]
    close(log[logged], GOLDEN[f"{name}/loss"])
    close(gradient[name], layers(f"{name}/gradient"))


@pytest.mark.parametrize("learner", ["policy", "critic"])
def test_golden_update(learner, monkeypatch):
    monkeypatch.setattr(qgf, "sample_batch", lambda key, data, cfg: data)
    names = ["policy"] if learner == "policy" else ["critic", "value"]
    params, average = ({name: nets[name] for name in names} for nets in (NETS, AVERAGE))
    state = params, average, optax.adam(CFG.lr).init(params), GOLDEN["key/state"], 0
    state = qgf.State(*jax.tree.map(jnp.array, state))  # a copy, since train uses it up
    state, _ = qgf.train(learner, state, BATCH, 1, CFG)
    close(state.params, {name: layers(f"after/{name}") for name in names})
    if learner == "critic":
        close(state.average["critic"], layers("after/target"))


@pytest.mark.parametrize("method", part("actions"))
def test_golden_actions(method):
    name, at, samples = method.partition("@")
    a_0, w = GOLDEN[f"noise/actions{at}{samples}"], GOLDEN[f"weight/{method}"]
    actions, _ = qgf.sample_actions(AVERAGE, BATCH.observations, BATCH.goals, a_0, w, name, CFG)
    close(actions, GOLDEN[f"actions/{method}"])
