# SPDX-License-Identifier: MIT
"""Run the official code once, and write what it computes: test_golden.py compares qgf.py with it.

python .github/agree.py CLONE     writes golden.npz next to this file

CLONE is a clone of github.com/zhouzypaul/qgf; the file in the repository is from commit bc44a67.
Only this script needs flax, ml_collections and distrax. It runs on the CPU, in float32.

The official code runs as it is, but for these changes, which are made here and not in the clone:
- agents/__init__.py is not run, since it imports agents that need more packages.
- BPTTAgent.sample_actions calls a method _bc_flow_from that the repository does not have.
  bc_flow_from below stands in, by the caller's comments: all Euler steps that remain, unguided.

Names in golden.npz, where LAYER is an index and LEAF one of w, b, scale, shift, as in qgf.py:
    settings/NAME                               of qgf.Config
    batch/NAME                                  rewards and masks are those of the whole chunk
    key/state, key/loss                         the second is what the first update draws from
    noise/flow, noise/time                      a_0 and t of the policy's loss
    noise/actions, noise/actions@4              a_0 of the actions, (B, N, H*A)
    params/NETWORK/LAYER/LEAF                   target is the critic's average
    LOSS/loss, LOSS/gradient/LAYER/LEAF         by the parameters of the network that it trains
    edp/weight                                  of flow matching in EDP's loss, which a fork has
    after/NETWORK/LAYER/LEAF                    after one update
    weight/METHOD, actions/METHOD               METHOD@4 is the best of 4 samples
"""

import importlib
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

S, A, H, B = 6, 2, 3, 8
WIDTH, DEPTH = 14, 3
SEED = 21  # one whose times include both ends, 0 and 1
EDP_WEIGHT = 10.0
ASCENTS = 3  # steps of GradStep
NETWORKS = dict(policy="policy", critic="critic", target="target_critic", value="value")
# Each method in the official code: class, settings, and weight, which is a step of GradStep.
METHODS = {
    "bc": ("QGFAgent", {}, 0.0),
    "qgf": ("QGFAgent", {}, 0.3),
    "qgf@4": ("QGFAgent", {}, 0.3),
    "qgf-jacobian": ("QGFAgent", dict(apply_jacobian=True), 0.3),
    "qfql": ("QGFAgent", dict(denoised_action_approx="noisy"), 0.3),
    "bptt": ("BPTTAgent", {}, 0.1),
    "gradstep": ("GradStepAgent", dict(qgrad_steps=ASCENTS), 0.03),
}


def official_agent(name, **settings):
    """An agent of the official code with small networks."""
    files = dict(QGFAgent="qgf", BPTTAgent="bptt", GradStepAgent="grad_step", EDPAgent="edp")
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


def use(clone):
    """Let the official modules be imported, without those that agents/__init__.py imports."""
    sys.path.insert(0, clone)
    sys.modules["agents"] = types.ModuleType("agents")
    sys.modules["agents"].__path__ = [f"{clone}/agents"]


def main(clone):
    """From a clone to golden.npz."""
    jax.config.update("jax_platforms", "cpu")
    use(clone)
    golden = {}

    def add_layers(name, params):
        for i, layer in enumerate(layers(params)):
            golden.update({f"{name}/{i}/{leaf}": x for leaf, x in layer.items()})

    rng = np.random.default_rng(0)
    batch = dict(
        observations=np.float32(rng.normal(size=(B, S))),
        actions=np.float32(rng.uniform(-1, 1, (B, H, A))),
        rewards=np.float32(rng.normal(size=B)),
        masks=np.float32(np.arange(B) % 4 > 0),
        next_observations=np.float32(rng.normal(size=(B, S))),
    )
    golden |= {f"batch/{name}": x for name, x in batch.items()}
    # The official batch has these after each step of a chunk, and its losses read the last.
    for name in ("rewards", "masks", "next_observations"):
        batch[name] = np.stack([batch[name]] * H, axis=1)
    batch["valid"] = np.ones((B, H), np.float32)

    # The key of qgf.train's first update from a State with key/state, and the official agent's.
    key_state = jax.random.PRNGKey(SEED)
    key_agent = jax.random.fold_in(key_state, 0)
    key = jax.random.split(key_agent)[1]
    golden |= {"key/state": key_state, "key/loss": key}
    key_noise, key_time = jax.random.split(key)

    agent = official_agent("QGFAgent")
    params = {k: shaken(getattr(agent, k).params, rng) for k in NETWORKS.values()}

    def with_params(agent):
        return agent.replace(
            rng=key_agent, **{k: getattr(agent, k).replace(params=p) for k, p in params.items()}
        )

    agent = with_params(agent)
    config = agent.config
    assert config["bc_lr"] == config["critic_lr"] == config["value_lr"]
    T = config["denoise_steps"]
    golden |= {f"settings/{name}": config[name] for name in ("discount", "expectile")}
    golden |= {"settings/lr": config["bc_lr"], "settings/denoise_steps": T, "settings/horizon": H}
    golden["noise/flow"] = jax.random.normal(key_noise, (B, H * A))
    golden["noise/time"] = jax.random.randint(key_time, (B, 1), 0, T + 1) / np.float32(T)
    for name, network in NETWORKS.items():
        add_layers(f"params/{name}", params[network])

    edp = with_params(official_agent("EDPAgent", bc_weight=EDP_WEIGHT))
    golden["edp/weight"] = EDP_WEIGHT
    losses = dict(
        policy=("policy", lambda x: agent.policy_loss(batch, x, key)[0]),
        critic=("critic", lambda x: agent.critic_loss(batch, x)[0]),
        value=("value", lambda x: agent.value_loss(batch, x)[0]),
        edp=("policy", lambda x: edp.policy_loss(batch, x, key)[0]),
    )
    for name, (network, loss) in losses.items():
        golden[f"{name}/loss"], gradient = jax.value_and_grad(loss)(params[network])
        add_layers(f"{name}/gradient", gradient)

    after, _ = agent.update(batch)
    for name, network in NETWORKS.items():
        add_layers(f"after/{name}", getattr(after, network).params)

    for method, (name, settings, w) in METHODS.items():
        _, at, samples = method.partition("@")
        N = int(samples or 1)
        a_0 = jax.random.normal(key, (B * N, H * A))
        golden[f"noise/actions{at}{samples}"] = a_0.reshape(B, N, H * A)
        options = dict(seed=key, rejection_sampling=N)
        if name == "GradStepAgent":
            settings = dict(settings, qgrad_step_size=w)
        else:
            options["guidance_weight"] = w
        actor = with_params(official_agent(name, **settings))
        golden[f"weight/{method}"] = w
        golden[f"actions/{method}"] = actor.sample_actions(batch["observations"], **options)

    for name, x in golden.items():
        x = np.asarray(x)
        assert np.isfinite(x).all(), name
        golden[name] = np.float32(x) if x.dtype == np.float64 else x
    path = Path(__file__).with_name("golden.npz")
    np.savez_compressed(path, **golden)
    print(f"{path}: {len(golden)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
