# SPDX-License-Identifier: MIT
"""How far this code and the official one are apart on the same parameters, batch and noise.

PYTHONPATH=. python .github/agree.py CLONE      CLONE: of the official code; needs flax, ml_collections and distrax
"""

import sys

import jax
import numpy as np
from bench import A, B, H, S, official_agent

import qgf


def layers(params):
    """The official code's parameters of a network in the form of ours."""
    mlp = params.get("MLP_0") or params["value_net"]
    out = []
    for i in range(sum(name.startswith("Dense") for name in mlp)):
        norm = mlp.get(f"LayerNorm_{i}")
        out.append(dict(w=mlp[f"Dense_{i}"]["kernel"], b=mlp[f"Dense_{i}"]["bias"]))
        out[-1] |= dict(scale=norm["scale"], shift=norm["bias"]) if norm else {}
    last = params.get("Dense_0")  # an actor's
    return out + ([dict(w=last["kernel"], b=last["bias"])] if last else [])


def shaken(tree, seed):
    """All parameters changed a little, so that no bias is 0 and the target is not the critic."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), tree)


def apart(a, b, relative=True):
    """The largest difference of two pytrees, by the largest entry of each array if `relative`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(abs(x - y).max() / (abs(x).max() if relative else 1)) for x, y in pairs)


def main(clone):
    rng = np.random.default_rng(0)
    s, next_s, key = *np.float32(rng.normal(size=(2, B, S))), jax.random.PRNGKey(1)
    actions, rewards = np.float32(rng.uniform(-1, 1, (B, H, A))), np.float32(rng.normal(size=(B, H)))
    a_1, masks = actions.reshape(B, -1), np.float32(rng.random((B, H)) < 0.8)
    ours = dict(observations=s, actions=a_1, next_observations=next_s)
    ours |= dict(returns=rewards[:, -1], discounts=np.float32(0.99**H) * masks[:, -1])
    theirs = dict(observations=s, actions=actions, rewards=rewards, masks=masks, valid=np.ones((B, H)))
    theirs |= dict(next_observations=np.repeat(next_s[:, None], H, axis=1))

    for width, depth in ((64, 3), (256, 4)):
        fresh = official_agent(clone, width, depth)
        networks = ("policy", "critic", "target_critic", "value")
        params = {k: shaken(getattr(fresh, k).params, i) for i, k in enumerate(networks)}

        def put(agent, params=params):
            return agent.replace(**{k: getattr(agent, k).replace(params=p) for k, p in params.items()})

        def report(what, difference, size=f"{width}x{depth}"):
            print(f"{size:6} {what:44} {difference:.1e}")

        agent, cfg = put(fresh), qgf.Config(width=width, depth=depth, lr=fresh.config["bc_lr"], edp=100.0)
        p = {k: layers(params[k]) for k in networks}
        losses = dict(
            policy=lambda x: qgf.flow_matching_loss(x, ours, key, cfg),
            critic=lambda x: qgf.critic_loss(x, p["value"], ours),
            value=lambda x: qgf.value_loss(x, p["target_critic"], ours, cfg),
            edp=lambda x: qgf.edp_loss(x, p["target_critic"], ours, key, cfg),
        )
        edp = put(official_agent(clone, width, depth, "EDPAgent", "edp", bc_weight=cfg.edp))
        references = dict(
            policy=lambda x: agent.policy_loss(theirs, x, key)[0],
            critic=lambda x: agent.critic_loss(theirs, x)[0],
            value=lambda x: agent.value_loss(theirs, x)[0],
            edp=lambda x: edp.policy_loss(theirs, policy_params=x, rng=key)[0],
        )
        for k, loss in losses.items():
            network = "policy" if k == "edp" else k
            mine, my_gradient = jax.value_and_grad(loss)(p[network])
            other, gradient = jax.value_and_grad(references[k])(params[network])
            report(f"{k} loss, relative", apart(other, mine))
            report(f"{k} loss, gradient, relative", apart(layers(gradient), my_gradient))

        state = jax.tree.map(lambda x: x[0], qgf.init_states((S, 0, A), qgf.Config(width=width, depth=depth)))
        averages = dict(policy=p["policy"], critic=p["target_critic"])  # the official code averages Q alone
        state = state._replace(params={k: p[k] for k in state.params}, target=averages)
        cfg = qgf.Config(width=width, depth=depth, lr=cfg.lr)
        for n in range(5):
            noise = jax.random.split(agent.rng)[1]
            agent, state = agent.update(theirs)[0], qgf.update(state, ours, noise, cfg)[0]
            if n in (0, 4):
                other = {k: layers(getattr(agent, k).params) for k in networks}
                report(
                    f"target after {n + 1} update(s)",
                    apart(other.pop("target_critic"), state.target["critic"], False),
                )
                report(f"parameters after {n + 1} update(s)", apart(other, state.params, False))

        nets = dict(policy=p["policy"], critic=p["target_critic"])
        for method, settings in {
            "qgf": {},
            "qgf-jacobian": dict(apply_jacobian=True),
            "qfql": dict(denoised_action_approx="noisy"),
        }.items():
            agent = put(official_agent(clone, width, depth, **settings))
            for N in (1, 4):
                a_0 = jax.random.normal(key, (B * N, H * A)).reshape(B, N, H * A)
                other = agent.sample_actions(s, seed=key, guidance_weight=0.05, rejection_sampling=N)
                mine, _ = qgf.sample_actions(nets, s, a_0, 0.05, method, 10)
                report(f"{method} actions, best of {N}", apart(other, mine, False))
        steps = dict(qgrad_step_size=0.01, qgrad_steps=qgf.ASCENTS)
        agent = put(official_agent(clone, width, depth, "GradStepAgent", "grad_step", **steps))
        a_0 = jax.random.normal(key, (B, 1, H * A))
        mine, _ = qgf.sample_actions(nets, s, a_0, 0.01, "gradstep", 10)
        report("gradstep actions", apart(agent.sample_actions(s, seed=key), mine, False))


if __name__ == "__main__":
    main(sys.argv[1])
