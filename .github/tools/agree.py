# SPDX-License-Identifier: MIT
"""Run the official code once, and write what it computes: test_golden.py compares qgf.py with it.

python .github/tools/agree.py CLONE     writes golden.npz next to this file

CLONE is a clone of github.com/zhouzypaul/qgf; the file in the repository is from commit bc44a67.
Only this script needs flax, ml_collections and distrax. It runs on the CPU, in float32.

The official code runs as it is, but for these changes, which are made here and not in the clone:
- agents/__init__.py is not run, since it imports agents that need more packages.
- BPTTAgent.sample_actions calls a method _bc_flow_from that the repository does not have. So the
  inner loop of BPTT is our own: bc_flow_from, by the caller's comments all Euler steps that
  remain, unguided. For BPTT, golden.npz is official only in what surrounds this loop.
- Before each update, the agent's key is set to the one that qgf.train uses in the same update.

Names in golden.npz. A network is a vector: ravel_pytree of its layers in the form of qgf.py.
    settings/NAME                               of qgf.Config
    batch/NAME                                  (3, B, ...): a batch for each of three updates;
                                                rewards and masks are those of the whole chunk
    key/state, key/loss                         the second is what the first update draws from
    noise/flow, noise/time                      a_0 and t of the policy's loss, first update
    noise/actions, noise/actions@4              a_0 of the actions, (B, N, H*A)
    params/NETWORK                              target is the critic's average
    loss/NETWORK, gradient/NETWORK              of the loss that trains it, on the first batch
    after/NETWORK                               after three updates
    mu/NETWORK, nu/NETWORK                      the moments of Adam after three updates
    weight/METHOD, actions/METHOD               METHOD@4 is the best of 4 samples
    data/NAME                                   transitions, one a row
    chunks/first, chunks/NAME                   what is drawn from data at these first rows
"""

import importlib
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

S, A, H, B = 6, 2, 3, 8
UPDATES = 3
WIDTH, DEPTH = 14, 3
SEED = 21  # one whose times include both ends, 0 and 1
LENGTHS = (7, 9, 8)  # of trajectories to draw chunks from
SOLVED = (4, 15)  # rows that solve the task: within a trajectory, and as the last of one
ASCENTS = 3  # steps of GradStep
NETWORKS = dict(policy="policy", critic="critic", target="target_critic", value="value")
# Each method in the official code: class, settings, and the weight w of qgf.sample_actions.
METHODS = {
    "bc": ("QGFAgent", {}, 0.0),
    "qgf": ("QGFAgent", {}, 0.3),
    "qgf@4": ("QGFAgent", {}, 0.3),
    "qgf-jacobian": ("QGFAgent", dict(apply_jacobian=True), 0.3),
    "qfql": ("QGFAgent", dict(denoised_action_approx="noisy"), 0.3),
    "bptt": ("BPTTAgent", {}, 0.1),
    "gradstep": ("GradStepAgent", dict(qgrad_steps=ASCENTS), 0.09),
}


def official_agent(name, **settings):
    """An agent of the official code with small networks."""
    files = dict(QGFAgent="qgf", BPTTAgent="bptt", GradStepAgent="grad_step")
    module = importlib.import_module(f"agents.{files[name]}")
    config = module.get_config()
    config.update(actor_hidden_dims=(WIDTH,) * DEPTH, horizon_length=H, action_chunking=True)
    config.update(settings)
    config.value_network_kwargs = dict(hidden_dims=(WIDTH,) * DEPTH, layer_norm=True)
    agent = getattr(module, name)
    if name == "BPTTAgent":
        agent = type("BPTT", (agent,), dict(_bc_flow_from=bc_flow_from))
    return agent.create(0, np.zeros((2, S), np.float32), np.zeros((2, A), np.float32), config)


def bc_flow_from(agent, observations, a, first):
    """All Euler steps of the unguided flow from step `first` (B,) on: a (B, H*A) -> (B, H*A)."""
    T = agent.config["denoise_steps"]
    for i in range(T):
        moved = a + agent.policy(observations, a, jnp.full(len(a), i / T)) / T
        a = jnp.where(i >= first[:, None], moved, a)
    return a


def shaken(params, rng):
    """Parameters changed at random: no bias is 0, no scale 1, and the target is not the critic.

    What LayerNorm normalizes is made small: its epsilon matters then.
    """

    def shake(layers):
        if "kernel" not in layers and "scale" not in layers:
            return {name: shake(layer) for name, layer in layers.items()}
        return {name: x + np.float32(0.1 * rng.normal(size=x.shape)) for name, x in layers.items()}

    params = shake(params)
    for network in params.values():
        for name in [name for name in network if name.startswith("LayerNorm")]:
            dense = network[name.replace("LayerNorm", "Dense")]
            dense |= {k: x * np.float32(0.05) for k, x in dense.items()}
    return params


def layers(params):
    """The official parameters of a network in the form of qgf.py: a list of dicts."""
    network = params.get("MLP_0") or params["value_net"]
    out = []
    for i in range(sum(name.startswith("Dense") for name in network)):
        dense = network[f"Dense_{i}"]
        out.append(dict(w=dense["kernel"], b=dense["bias"]))
        if f"LayerNorm_{i}" in network:
            norm = network[f"LayerNorm_{i}"]
            out[-1] |= dict(scale=norm["scale"], shift=norm["bias"])
    if "Dense_0" in params:  # an actor's output
        out.append(dict(w=params["Dense_0"]["kernel"], b=params["Dense_0"]["bias"]))
    return out


def vector(params):
    """The official parameters of a network, its gradient or a moment as one vector."""
    return ravel_pytree(layers(params))[0]


def use(clone):
    """Let the official modules be imported, without those that agents/__init__.py imports."""
    sys.path.insert(0, clone)
    sys.modules["agents"] = types.ModuleType("agents")
    sys.modules["agents"].__path__ = [f"{clone}/agents"]


def random_batch(rng):
    """Chunks as the official losses read them: of rewards and so on, only what ends a chunk."""
    return dict(
        observations=np.float32(rng.normal(size=(B, S))),
        actions=np.float32(rng.uniform(-1, 1, (B, H, A))),
        rewards=np.float32(rng.normal(size=B)),
        masks=np.float32(np.arange(B) % 4 > 0),
        next_observations=np.float32(rng.normal(size=(B, S))),
    )


def official_batch(batch):
    """The same with a number for each step of a chunk."""
    batch = dict(batch, valid=np.ones(B, np.float32))
    for name in ("rewards", "masks", "next_observations", "valid"):
        batch[name] = np.stack([batch[name]] * H, axis=1)
    return batch


def draw_chunks(rng, discount):
    """data/NAME and chunks/NAME: what the official Dataset draws at each first row.

    Left out is where the official code differs from the paper and qgf.py: chunks that run over a
    trajectory's end or go on after a success, and chunks that end with a trajectory unsolved.
    """
    N = sum(LENGTHS)
    data = dict(
        observations=np.float32(rng.normal(size=(N, S))),
        actions=np.float32(rng.uniform(-1, 1, (N, A))),
        rewards=np.float32(rng.normal(size=N)),
        masks=np.float32(~np.isin(np.arange(N), SOLVED)),
        terminals=np.float32(np.isin(np.arange(1, N + 1), np.cumsum(LENGTHS))),
    )
    # The state after a row is the next row's; after a trajectory's last row, another.
    after = np.roll(data["observations"], -1, axis=0)
    after = np.where(data["terminals"][:, None] > 0, np.float32(rng.normal(size=(N, S))), after)
    dataset = importlib.import_module("utils.datasets").Dataset
    dataset = dataset.create(freeze=False, **data, next_observations=after)
    rows = np.arange(N - H + 1)
    with mock.patch("numpy.random.randint", lambda high, size: rows):
        chunks = dataset.sample_sequence(len(rows), H, discount)
    solved = chunks["masks"][:, -1] == 0
    good = (chunks["valid"][:, -1] == 1) & (chunks["masks"][:, -2] == 1)
    good &= solved | (chunks["terminals"][:, -1] == 0)
    golden = {f"data/{name}": x for name, x in data.items()}
    golden |= {"chunks/first": rows[good], "chunks/actions": chunks["actions"][good]}
    golden["chunks/observations"] = chunks["observations"][good]
    for name in ("rewards", "masks", "next_observations"):
        golden[f"chunks/{name}"] = chunks[name][good][:, -1]
    return golden


def main(clone):
    """From a clone to golden.npz."""
    jax.config.update("jax_platforms", "cpu")
    use(clone)
    golden = {}
    rng = np.random.default_rng(UPDATES)
    batches = [random_batch(np.random.default_rng(i)) for i in range(UPDATES)]
    golden |= {f"batch/{name}": np.stack([x[name] for x in batches]) for name in batches[0]}
    batches = [official_batch(batch) for batch in batches]

    # qgf.train splits fold_in(key/state, step) to draw a batch and a loss's noise. The official
    # agent splits its own key, and gives the second half to the loss as well.
    key_state = jax.random.PRNGKey(SEED)
    keys = [jax.random.fold_in(key_state, step) for step in range(UPDATES)]
    key = jax.random.split(keys[0])[1]
    golden |= {"key/state": key_state, "key/loss": key}
    key_noise, key_time = jax.random.split(key)

    agent = official_agent("QGFAgent")
    params = {k: shaken(getattr(agent, k).params, rng) for k in NETWORKS.values()}

    def with_params(agent):
        return agent.replace(**{k: getattr(agent, k).replace(params=p) for k, p in params.items()})

    agent = with_params(agent)
    config = agent.config
    assert config["bc_lr"] == config["critic_lr"] == config["value_lr"]
    T = config["denoise_steps"]
    golden |= {f"settings/{name}": config[name] for name in ("discount", "expectile")}
    golden |= {"settings/lr": config["bc_lr"], "settings/denoise_steps": T, "settings/horizon": H}
    golden |= {f"settings/{name}_width": WIDTH for name in ("policy", "critic")}
    golden["settings/depth"] = DEPTH
    golden["noise/flow"] = jax.random.normal(key_noise, (B, H * A))
    golden["noise/time"] = jax.random.randint(key_time, (B, 1), 0, T + 1) / np.float32(T)
    golden |= {f"params/{name}": vector(params[network]) for name, network in NETWORKS.items()}

    losses = dict(
        policy=lambda x: agent.policy_loss(batches[0], x, key)[0],
        critic=lambda x: agent.critic_loss(batches[0], x)[0],
        value=lambda x: agent.value_loss(batches[0], x)[0],
    )
    for name, loss in losses.items():
        golden[f"loss/{name}"], gradient = jax.value_and_grad(loss)(params[name])
        golden[f"gradient/{name}"] = vector(gradient)

    after = agent
    for key_agent, batch in zip(keys, batches, strict=True):
        after, _ = after.replace(rng=key_agent).update(batch)
    for name, network in NETWORKS.items():
        golden[f"after/{name}"] = vector(getattr(after, network).params)
    for name in losses:
        adam = getattr(after, name).opt_state[0]
        golden |= {f"mu/{name}": vector(adam.mu), f"nu/{name}": vector(adam.nu)}

    for method, (name, settings, w) in METHODS.items():
        _, at, samples = method.partition("@")
        N = int(samples or 1)
        a_0 = jax.random.normal(key, (B * N, H * A))
        golden[f"noise/actions{at}{samples}"] = a_0.reshape(B, N, H * A)
        options = dict(seed=key, rejection_sampling=N)
        if name == "GradStepAgent":
            settings = dict(settings, qgrad_step_size=w / ASCENTS)
        else:
            options["guidance_weight"] = w
        actor = with_params(official_agent(name, **settings))
        golden[f"weight/{method}"] = w
        golden[f"actions/{method}"] = actor.sample_actions(batches[0]["observations"], **options)
    golden |= draw_chunks(rng, config["discount"])

    for name, x in golden.items():
        x = np.asarray(x)
        assert np.isfinite(x).all(), name
        golden[name] = np.float32(x) if x.dtype == np.float64 else x
    path = Path(__file__).with_name("golden.npz")
    np.savez_compressed(path, **golden)
    print(f"{path}: {len(golden)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
