# SPDX-License-Identifier: MIT
"""Q-Guided Flow (QGF) in one file: a flow policy and a critic, trained apart; when acting, Q steers the flow.

Zhou, Peng, Xu, Li, Springenberg, Frans, Levine, "Test-Time Gradient Guidance of Flow Policies in
Reinforcement Learning", arXiv 2606.11087. Let s be a state, s_i and r_i the state and the reward i steps
later, a_1 an action chunk (H consecutive actions, flattened), a_0 ~ N(0, I) noise, t a flow time in [0, 1]
and a_t = (1-t) a_0 + t a_1. The policy aimed at is the data's own, times exp(Q/β).

    train  policy  v_θ(s, a_t, t)  towards  a_1 - a_0                      behaviour cloning (BC), by a flow
           critic  Q_φ(s, a_1)  towards  Σ_{i<H} γ^i r_i + γ^H V(s_H)      implicit Q-learning (IQL)
           value   V(s)  towards  the τ-expectile of min_k Q̄_k(s, a_1)     Q̄: Polyak average of Q
    act    for t = 0, 1/T, ..., (T-1)/T, from noise a_0 on, in T Euler steps:
               â_1 = clip(a_t + (1-t) v_θ(s, a_t, t), -1, 1)               one-step clean estimate
               a_t += 1/T (v_θ(s, a_t, t) + w ∇_{â_1} min_k Q̄_k(s, â_1))   w = 1/β; w = 0 is BC
           the action is clip(a_1, -1, 1)

    python qgf.py --env cube-single      from nothing to a table that answers "did guidance help?"
    python qgf.py --help                 all options; each is a field of Config

Sections 1 to 5 are the algorithm: pure functions on arrays and pytrees. Sections 6 to 9 feed it, evaluate it
and save it. Left out, because they would hide it: RobustQ, CFGRL, pixels, online fine-tuning, trackers.
"""
import argparse, csv, difflib, errno, hashlib, http.client, json, math, os, platform, re  # noqa: E401
import shutil, signal, sys, threading, time, timeit, urllib.request, warnings  # noqa: E401
from collections import namedtuple
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageDraw
from scipy.stats import binomtest
from tqdm import tqdm

# ---- 1 Config ----------------------------------------------------------------------------------------------
def option(default, help):
    """A field of Config: its default and its line in --help."""
    return field(default=default, metadata=dict(help=help))

@dataclass(frozen=True)
class Config:
    """The settings of a run, one option each; frozen, so that jit takes it as a static argument."""

    # what to run
    env: str = option("cube-single", "OGBench task: cube-double, cube-double-task3, or a full OGBench name")
    preset: str = option("", "`paper`: its settings for this environment, where no option says otherwise")
    seed: int = option(0, "seed of parameters, batches and noise")
    seeds: int = option(1, "train so many at once, with seeds SEED, SEED + 1, ...")
    out: str = option("runs", "folder of runs; this one is OUT/<env>-s<seed>")
    eval: bool = option(False, "evaluate the saved run again, without training")
    gif: str = option("", "film the saved run into this file: an episode that QGF solves beside BC's try")
    table: str = option("", "print the results of all runs in this folder, pooled, as Markdown; no more")
    data: str = option("", "an .npz in OGBench's format, with `rewards` and `masks` of its own if there, or "
                       "a folder of such slices")
    swap: int = option(1000, "updates on a slice of --data FOLDER, while the next one is read")
    collect: int = option(0, "collect so many transitions with OGBench's play policies, do not download")
    # the algorithm
    horizon: int = option(5, "H, actions in a chunk, which is judged and executed as one")
    denoise_steps: int = option(10, "T, Euler steps from noise to action")
    discount: float = option(0.99, "γ, per environment step")
    expectile: float = option(0.9, "τ of V: .5 is the mean over the data's actions, 1 the maximum")
    target_rate: float = option(0.005, "rate of the critic's Polyak average, per update")
    goal: str = option("", "reach goals, given in OGBench's `oracle` representation, or as a whole `state`")
    goal_flow: bool = option(False, "with --goal, let the flow see the goal, too, not the critic alone")
    long_horizon: int = option(0, "h_c of DQC; above 0, a critic of chunks that long teaches Q")
    kappa: float = option(0.8, "κ of DQC: Q is the κ-expectile of that critic over the actions after H")
    edp: float = option(0.0, "α of EDP, QGF's train-time twin; above 0, it trains a second policy")
    # networks and optimiser
    width: int = option(256, "units in a hidden layer")
    critic_width: int = option(0, "the same of critic and value, which may need fewer than the flow [WIDTH]")
    depth: int = option(3, "hidden layers in a network")
    lr: float = option(1e-3, "learning rate of Adam")
    batch_size: int = option(256, "chunks in a batch")
    updates: int = option(10_000, "gradient updates in all; a finished run goes on if given more")
    # evaluation
    methods: tuple = option(("bc", "qgf"), "of bc qgf qgf-jacobian qgf-chain bptt qfql gradstep; NAME@4 is "
                            "best of 4, NAME+score scales w by (1-t)/t")
    weights: tuple = option((0.01, 0.03, 0.06, 0.1), "guidance weights w to try; each method gets its best")
    choose: int = option(20, "episodes per weight to choose it by, which are not reported")
    episodes: int = option(50, "fresh episodes in a reported row")
    watch: float = option(10.0, "minutes of training between two looks at a few episodes")

    @property
    def reach(self):
        """R, steps from a state to the one that its critic's target is bootstrapped from: H, or h_c."""
        return self.long_horizon or self.horizon


# ---- 2 Networks: parameters are plain pytrees, networks pure functions of them -----------------------------
# Dense -> LayerNorm -> GELU, as in the official code. Sizes: B batch, S state, A action, H*A chunk.

def init_mlp(key, sizes, actor=False):
    """Layers of an MLP with these sizes (input, hidden ..., output): a list of dicts of arrays.

    An actor has no LayerNorm after its last hidden layer and a LeCun normal output, as in the official code.
    """
    keys, glorot = jax.random.split(key, len(sizes) - 1), jax.nn.initializers.glorot_uniform()
    layers = [dict(w=glorot(k, (m, n)), b=jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])]
    if actor:
        layers[-1]["w"] = jax.nn.initializers.lecun_normal()(keys[-1], sizes[-2:])
    for layer in layers[: -2 if actor else -1]:
        layer |= dict(scale=jnp.ones_like(layer["b"]), shift=jnp.zeros_like(layer["b"]))
    return layers

def mlp(layers, x):
    """Apply the layers of `init_mlp`: x (B, in) -> (B, out)."""
    for layer in layers[:-1]:
        x = x @ layer["w"] + layer["b"]
        if "scale" in layer:
            x = jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["shift"]  # LayerNorm
        x = jax.nn.gelu(x)
    return x @ layers[-1]["w"] + layers[-1]["b"]

def time_embedding(t):
    """Eight cosines, then eight sines, of the flow time: t (B, 1) in [0, 1] -> (B, 16)."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(8) / 8)
    angles = 10_000 * t * frequencies  # (B, 1) * (8,) -> (B, 8)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

def velocity(policy, s, a_t, t):
    """The flow v_θ(s, a_t, t): s (B, S), a_t (B, H*A), t (B, 1) -> (B, H*A)."""
    s = s[:, : len(policy[0]["w"]) - a_t.shape[-1] - 16]  # all of s, or without the goal at its end
    return mlp(policy, jnp.concatenate([s, a_t, time_embedding(t)], axis=-1))

def clean_estimate(a_t, t, v):
    """â_1, where a_t (B, H*A) at t (B, 1) would end if it kept its velocity v (B, H*A) -> (B, H*A)."""
    return jnp.clip(a_t + (1 - t) * v, -1, 1)

def q_values(critic, s, a):
    """Both critics Q_k(s, a), their parameters stacked on axis 0: s (B, S), a (B, H*A) -> (2, B)."""
    return jax.vmap(mlp, in_axes=(0, None))(critic, jnp.concatenate([s, a], axis=-1))[..., 0]

def q_min(critic, s, a):
    """min_k Q_k(s, a): s (B, S), a (B, H*A) -> (B,)."""
    return q_values(critic, s, a).min(axis=0)

def value(layers, s):
    """V(s): s (B, S) -> (B,)."""
    return mlp(layers, s)[..., 0]

def init_params(key, s_dim, a_dim, cfg, unseen=0):
    """Fresh parameters for states of size s_dim and actions of size a_dim: dict(policy, critic, value, ...).

    The policy does not see the last `unseen` numbers of a state, its goal; that of EDP, unguided, has to.
    """
    key_policy, key_critic, key_value = jax.random.split(key, 3)
    chunk, hidden = cfg.horizon * a_dim, [cfg.width] * cfg.depth
    critic_hidden = [cfg.critic_width or cfg.width] * cfg.depth

    def flow(seen):
        return init_mlp(key_policy, [seen + chunk + 16, *hidden, chunk], actor=True)

    def two_critics(key, chunk):
        return jax.vmap(lambda k: init_mlp(k, [s_dim + chunk, *critic_hidden, 1]))(jax.random.split(key, 2))

    params = dict(
        policy=flow(s_dim - unseen),
        critic=two_critics(key_critic, chunk),
        value=init_mlp(key_value, [s_dim, *critic_hidden, 1]),
    )
    if cfg.long_horizon:
        params["long_critic"] = two_critics(jax.random.fold_in(key_critic, 0), cfg.long_horizon * a_dim)
    if cfg.edp:
        params["edp"] = flow(s_dim)
    return params


# ---- 3 Losses ----------------------------------------------------------------------------------------------
def noisy_actions(a_1, key, cfg):
    """Noise a_0, a_t between it and a_1 (B, H*A), and t: -> a_0 (B, H*A), a_t (B, H*A), t (B, 1).

    t is drawn from the grid {0, 1/T, ..., 1}, as in the official code: acting asks for no other.
    """
    key_noise, key_time = jax.random.split(key)
    a_0 = jax.random.normal(key_noise, a_1.shape)
    t = jax.random.randint(key_time, (len(a_1), 1), 0, cfg.denoise_steps + 1) / cfg.denoise_steps  # (B, 1)
    return a_0, (1 - t) * a_0 + t * a_1, t

def flow_matching_loss(policy, s, a_1, key, cfg):
    """Behaviour cloning: (v_θ(s, a_t, t) - (a_1 - a_0))², mean over B and H*A: s (B, S), a_1 (B, H*A)."""
    a_0, a_t, t = noisy_actions(a_1, key, cfg)
    return jnp.mean((velocity(policy, s, a_t, t) - (a_1 - a_0)) ** 2)

def critic_loss(critic, value_layers, batch, cfg):
    """(Q_k(s, a) - y)², mean over k and B; y = Σ_{i<R} γ^i r_i + γ^R mask V(s_R), R = cfg.reach.

    -> loss, Q (2, B)
    """
    v_next = jax.lax.stop_gradient(value(value_layers, batch["next_observations"]))  # (B,)
    y = batch["returns"] + cfg.discount**cfg.reach * batch["masks"] * v_next
    q = q_values(critic, batch["observations"], batch["actions"])
    return jnp.mean((q - y) ** 2), q

def expectile_loss(u, tau):
    """|τ - 1[u<0]| u², elementwise. With u = Q - V, its mean is least where V is the τ-expectile of Q."""
    return jnp.abs(tau - (u < 0)) * u**2

def value_loss(layers, target_critic, batch, cfg):
    """E L2^τ(min_k Q̄_k(s, a) - V(s)); the target critic gets no gradient. -> loss, V (B,)"""
    q = jax.lax.stop_gradient(q_min(target_critic, batch["observations"], batch["actions"]))  # (B,)
    v = value(layers, batch["observations"])
    return jnp.mean(expectile_loss(q - v, cfg.expectile)), v

def dqc_loss(params, batch, cfg):
    """DQC: Q_c, of h_c actions, learns by `critic_loss`; Q, of the first H of these, learns from Q_c.

    E L2^κ(Q_c(s, a_c) - Q(s, a)): values travel h_c steps in an update, and Q expects good actions after a.
    -> loss, Q (2, B)
    """
    long = batch | dict(actions=batch["long_actions"])
    loss, q_long = critic_loss(params["long_critic"], params["value"], long, cfg)
    q = q_values(params["critic"], batch["observations"], batch["actions"])
    return loss + jnp.mean(expectile_loss(jax.lax.stop_gradient(q_long) - q, cfg.kappa)), q

def edp_loss(policy, target_critic, s, a_1, key, cfg):
    """EDP, QGF's train-time twin: α (flow matching) - E min_k Q̄_k(s, â_1), differentiated through â_1."""
    a_0, a_t, t = noisy_actions(a_1, key, cfg)
    v = velocity(policy, s, a_t, t)  # for both terms, so that `flow_matching_loss` need not ask again
    q = q_min(target_critic, s, clean_estimate(a_t, t, v))  # (B,)
    return cfg.edp * jnp.mean((v - (a_1 - a_0)) ** 2) - q.mean()


# ---- 4 Training --------------------------------------------------------------------------------------------
class State(NamedTuple):
    """All that training changes: from it and the data, a run continues bit for bit."""

    params: dict  # policy, critic, value; long_critic and edp if asked for
    target: list  # Q̄, the Polyak average of the critic
    opt: tuple  # Adam's moments
    key: jax.Array  # the run's; update i uses fold_in(key, i), however updates are grouped into calls
    step: jax.Array  # updates made

@partial(jax.jit, static_argnames=("s_dim", "a_dim", "cfg", "unseen"))
def init_state(key, s_dim, a_dim, cfg, unseen=0):
    """The State before the first update."""
    key_params, key_run = jax.random.split(key)
    params = init_params(key_params, s_dim, a_dim, cfg, unseen)
    target = jax.tree.map(jnp.copy, params["critic"])  # a copy, since `train` gives away its input's memory
    return State(params, target, optax.adam(cfg.lr).init(params), key_run, jnp.int32(0))

def sample_batch(key, data, cfg):
    """Draw B chunks from dict(observations (N, S), actions (N, A), rewards, masks, starts (N,), n_starts ()).

    The first `n_starts` of `starts` are the rows whose whole chunk lies in one trajectory, with the state
    after it unless the task is solved by then. `masks` is 0 where the task is solved: rewards count up to
    that row, and nothing is bootstrapped beyond it. With cfg.goal, `data` has goals (N, G) and ends (N,) for
    `hindsight`, and states are (s, g).
    """
    i = data["starts"][jax.random.randint(key, (cfg.batch_size,), 0, data["n_starts"])]  # (B,)
    window = i[:, None] + jnp.arange(cfg.reach)  # (B, 1) + (R,) -> (B, R)
    s, s_next = data["observations"][i], data["observations"][i + cfg.reach]  # (B, S)
    if cfg.goal:
        g, rewards, masks = hindsight(key, data, window)
        s, s_next = jnp.concatenate([s, g], axis=1), jnp.concatenate([s_next, g], axis=1)  # (B, S+G)
    else:
        rewards, masks = data["rewards"][window], data["masks"][window]  # (B, R)
    alive = jnp.cumprod(masks, axis=1)  # (B, R), 0 from the first success on
    counts = jnp.pad(alive[:, :-1], ((0, 0), (1, 0)), constant_values=1)  # (B, R), 0 after the first success
    actions = data["actions"][window]  # (B, R, A)
    return dict(
        observations=s,
        actions=actions[:, : cfg.horizon].reshape(cfg.batch_size, -1),  # (B, R, A) -> (B, H*A)
        long_actions=actions.reshape(cfg.batch_size, -1),  # (B, R, A) -> (B, R*A), for DQC's long critic
        returns=(counts * rewards) @ cfg.discount ** jnp.arange(cfg.reach),  # (B,)
        masks=alive[:, -1],  # (B,)
        next_observations=s_next,
    )

def hindsight(key, data, window):
    """Goals that were reached: window (B, R) of rows -> goals (B, G), rewards (B, R), masks (B, R).

    A goal is the state at row k, by `data["goals"]` (N, G): the present one (.2), a later one of the same
    trajectory (.5), or any (.3), as in DQC. The reward is -1, and the mask 1, until each number is within
    0.4 of the goal's: for a cube, 4 cm along each axis (OGBench: 4 cm in all); for a button, the same state.
    """
    i, (key_kind, key_later, key_any) = window[:, 0], jax.random.split(jax.random.fold_in(key, 1), 3)
    later = jax.random.randint(key_later, i.shape, i + 1, data["ends"][i] + 1)
    anywhere = jax.random.randint(key_any, i.shape, 0, len(data["goals"]))
    kind = jax.random.uniform(key_kind, i.shape)
    k = jnp.where(kind < 0.2, i, jnp.where(kind < 0.7, later, anywhere))  # (B,)
    g = data["goals"][k]  # (B, G)
    masks = jnp.float32(abs(data["goals"][window] - g[:, None]).max(axis=-1) > 0.4)  # (B, R, G) -> (B, R)
    return g, -masks, masks

def update(state, batch, key, cfg):
    """One update of policy, critic, value and target from a `sample_batch`. -> State, dict of scalars

    The losses are added only to take one gradient: each reaches its own network alone. All gradients are
    taken at the old parameters, and the target averages the old critic.
    """
    s, a_1 = batch["observations"], batch["actions"]

    def loss(params):
        flow = flow_matching_loss(params["policy"], s, a_1, key, cfg)
        if cfg.long_horizon:
            critic, q = dqc_loss(params, batch, cfg)
        else:
            critic, q = critic_loss(params["critic"], params["value"], batch, cfg)
        val, v = value_loss(params["value"], state.target, batch, cfg)
        edp = edp_loss(params["edp"], state.target, s, a_1, key, cfg) if cfg.edp else 0.0
        info = dict(flow_loss=flow, critic_loss=critic, value_loss=val, edp_loss=edp, q=q.mean(), v=v.mean())
        return flow + critic + val + edp, info

    grads, info = jax.grad(loss, has_aux=True)(state.params)
    steps, opt = optax.adam(cfg.lr).update(grads, state.opt)
    target = optax.incremental_update(state.params["critic"], state.target, cfg.target_rate)
    return State(optax.apply_updates(state.params, steps), target, opt, state.key, state.step + 1), info

@partial(jax.jit, static_argnames=("n", "cfg"), donate_argnames="state")
def train(state, data, n, cfg):
    """`n` updates in one compiled scan that draws its batches itself. -> State, dict of (n,) arrays"""

    def one(state, _):
        key_batch, key_update = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample_batch(key_batch, data, cfg)
        if "batch" in jax.sharding.get_abstract_mesh().axis_names:  # devices share it, see `device_mesh`
            batch = jax.lax.with_sharding_constraint(batch, PartitionSpec("batch"))
        return update(state, batch, key_update, cfg)

    return jax.lax.scan(one, state, length=n)

@partial(jax.jit, static_argnames=("n", "cfg"), donate_argnames="states")
def train_seeds(states, data, n, cfg):
    """`train` for a State of each seed (axis 0 of all arrays), on the same data. -> States, dict of (K, n)"""
    one = partial(train, data=data, n=n, cfg=cfg)
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        return jax.lax.map(one, states)  # one after the other: one seed keeps a CPU busy
    return jax.vmap(one)(states)


# ---- 5 Guidance: each step of the flow is nudged by the critic ---------------------------------------------
# An estimator says where to push a_t: (nets, s (B, S), a_t (B, H*A), t (B, 1), v (B, H*A), T) -> (B, H*A),
# with nets = dict(policy, critic), v = v_θ(s, a_t, t), T Euler steps in all. A new one is a function and its
# name in GUIDANCE. They differ in the action at which the critic is asked, and in what is differentiated.

def acting_nets(state):
    """The networks that act: the policies, and the target critic as their guide."""
    return {k: state.params[k] for k in ("policy", "edp") if k in state.params} | dict(critic=state.target)

def grad_q(nets, s, a, clean=lambda a: a):
    """∇_a min_k Q̄_k(s, clean(a)): s (B, S), a (B, H*A) -> (B, H*A)."""
    return jax.grad(lambda a: q_min(nets["critic"], s, clean(a)).sum())(a)  # each row has its own term

def integrate(nets, s, a_t, t, T):
    """ODE(a_t): where the unguided flow ends from a_t (B, H*A) at t (B, 1), after the steps that remain."""

    def euler(a, i):
        now = t + i / T  # (B, 1)
        go_on = now[0, 0] < 1 - 0.5 / T  # the same for all rows; steps past the end are not run
        return jax.lax.cond(go_on, lambda: a + velocity(nets["policy"], s, a, now) / T, lambda: a), None

    return jnp.clip(jax.lax.scan(euler, a_t, jnp.arange(T))[0], -1, 1)

def bc(nets, s, a_t, t, v, T):
    """No guidance: plain behaviour cloning."""
    return jnp.zeros_like(a_t)

def qgf(nets, s, a_t, t, v, T):
    """∇Q̄(s, â_1) at the clean estimate â_1, with the Jacobian ∂â_1/∂a_t replaced by 1."""
    return grad_q(nets, s, clean_estimate(a_t, t, v))

def qgf_jacobian(nets, s, a_t, t, v, T):
    """Jᵀ ∇Q̄(s, â_1), J = ∂â_1/∂a_t: the gradient of Q̄(s, â_1(a_t))."""
    return grad_q(nets, s, a_t, lambda a: clean_estimate(a, t, velocity(nets["policy"], s, a, t)))

def qgf_chain(nets, s, a_t, t, v, T):
    """∇Q̄ at the flow's own end ODE(a_t), with its Jacobian replaced by 1."""
    return grad_q(nets, s, integrate(nets, s, a_t, t, T))

def bptt(nets, s, a_t, t, v, T):
    """∇_{a_t} Q̄(s, ODE(a_t)), back through every Euler step that remains."""
    return grad_q(nets, s, a_t, lambda a: integrate(nets, s, a, t, T))

def qfql(nets, s, a_t, t, v, T):
    """∇Q̄(s, a_t) at the noisy action, where Q̄ was never trained."""
    return grad_q(nets, s, a_t)

GUIDANCE = {"bc": bc, "qgf": qgf, "qgf-jacobian": qgf_jacobian, "qgf-chain": qgf_chain, "bptt": bptt,
            "qfql": qfql, "gradstep": bc, "edp": bc}  # the last two act elsewhere: see `sample_actions`
SCHEDULE = dict(constant=lambda t: 1.0, score=lambda t: (1 - t) / t)  # what w is multiplied by at t
ASCENTS = 3  # steps of gradstep; the paper takes 3 to 5

@partial(jax.jit, static_argnames=("method", "schedule", "denoise_steps"))
def sample_actions(nets, s, a_0, w, method="qgf", schedule="constant", denoise_steps=10):
    """Integrate the guided flow from noise to actions: s (B, S), a_0 (B, N, H*A), w () or (B,) -> (B, H*A).

    Best of N: a state has N candidates, one for each row of noise; the one with the largest Q̄ is returned.
    The weight is traced, so that another one, or one for each row, compiles nothing new. `score` scales it
    by (1-t)/t: as v = (a_t + (1-t) ∇log p_t)/t, adding g to the score ∇log p_t adds (1-t)/t g to v. It is
    taken in the middle of a step, and so is finite in the first. `gradstep` climbs Q̄ after the flow has
    ended, in ASCENTS steps of size w; `edp` is the unguided flow of the policy that `edp_loss` trains.
    """
    (B, N, D), T = a_0.shape, denoise_steps
    s = jnp.repeat(s, N, axis=0)  # (B, S) -> (B*N, S)
    w = jnp.repeat(jnp.broadcast_to(w, B), N)[:, None]  # (B,) -> (B*N, 1)
    if method == "edp":
        nets = nets | dict(policy=nets["edp"])

    def euler(a_t, i):
        t = jnp.full((B * N, 1), i / T)
        v = velocity(nets["policy"], s, a_t, t)
        g = SCHEDULE[schedule](t + 0.5 / T) * GUIDANCE[method](nets, s, a_t, t, v, T)
        return a_t + (v + w * g) / T, None

    a, _ = jax.lax.scan(euler, a_0.reshape(B * N, D), jnp.arange(T))
    a = jnp.clip(a, -1, 1)
    for _ in range(ASCENTS if method == "gradstep" else 0):
        a = jnp.clip(a + w * grad_q(nets, s, a), -1, 1)
    if N == 1:
        return a
    best = q_min(nets["critic"], s, a).reshape(B, N).argmax(axis=1)  # (B*N,) -> (B, N) -> (B,)
    return a.reshape(B, N, D)[jnp.arange(B), best]


# ============================================================================================================
# The algorithm ends here; the rest feeds it, evaluates it and saves it.
# ---- 6 Data: a file of one's own, OGBench's download, or OGBench's scripted play policies ------------------
DATA_DIR = Path("~/.ogbench/data").expanduser()
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"
KINDS = ("play", "noisy", "navigate", "stitch", "explore")  # of OGBench datasets
# transitions to collect where there is no download; elsewhere 1M
COLLECT = {"cube-single": 200_000, "puzzle-3x3": 300_000, "scene": 300_000}
STACKING = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
progress = partial(tqdm, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)
warnings.filterwarnings("ignore", message=".*DISPLAY|.*precision lowered")  # no window is wanted, nor float64

class UserError(Exception):
    """What a user can mend, in one line that says what is wrong and what to do."""

def find_task(name, goal=""):
    """-> base, run, environment id, dataset, goal. For cube-double-task3: cube-double, cube-double-task3,
    cube-double-singletask-task3-v0, cube-double-play-v0, "". With a goal, or for a full name without
    `singletask`: cube-double, cube-double-goal, cube-double-v0, cube-double-play-v0, "oracle".
    """
    form = rf"(.+?)(?:-({'|'.join(KINDS)}))?(?:-singletask|-oraclerep)?(-task\d)?(?:-v0)?"
    base, kind, task = re.fullmatch(form, name or "?", re.DOTALL).groups()
    usual = "navigate" if "maze" in name or "soccer" in name else "play"
    goal = goal or ("oracle" if name.endswith("-v0") and "-singletask" not in name else "")
    known = [i for i in gymnasium.registry if "-singletask" in i and not i.startswith("visual")]
    env_id = f"{base}-singletask{task or ''}-v0"
    if env_id not in known:
        names = sorted(i.replace("-singletask", "").removesuffix("-v0") for i in known)
        near = difflib.get_close_matches(name, names, cutoff=0.4) or [i for i in names if "-task" not in i]
        raise UserError(f"unknown environment {name!r}; did you mean {', '.join(near)}?")
    if goal and task:
        raise UserError(f"{name} has its one task: with --goal, which has all of them, give --env {base}")
    short = base + (f"-{kind}" if kind not in (None, usual) else "") + ("-goal" if goal else task or "")
    return base, short, f"{base}-v0" if goal else env_id, f"{base}-{kind or usual}-v0", goal

def make_env(env_id, goal, **options):
    """The environment; `goal`, if any, is how it gives its goals."""
    options |= dict(use_oracle_rep=goal == "oracle") if goal else {}
    return gymnasium.make(env_id, disable_env_checker=True, **options)

@contextmanager
def atomic_write(path, mode="wb"):
    """Open a file beside `path` that takes its name once it is whole and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        if e.errno:
            e.filename = str(path)  # a full disk does not say where
        raise
    finally:
        part.unlink(missing_ok=True)

def download(dataset, path):
    """Fetch OGBench's file from the first host that has it, whole. -> whether one had; says why not."""
    for url in (f"{host}/{dataset}.npz" for host in (ogbench.utils.DATASET_URL, MIRROR)):
        try:
            with urllib.request.urlopen(url, timeout=20) as response, atomic_write(path) as file:
                with tqdm.wrapattr(response, "read", total=response.length, desc=url) as blocks:
                    shutil.copyfileobj(blocks, file, 1 << 20)
                if response.length:  # what is still to come
                    raise ConnectionError("the connection broke off")
            return True
        except (OSError, http.client.HTTPException) as e:
            disk = errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR
            if getattr(e, "errno", None) in disk:
                raise
            print(f"cannot download {url}: {getattr(e, 'reason', e)}")
    return False

def start_worker():
    """In a worker process: end when the parent has gone, however it went."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()

@contextmanager
def workers(n, size):
    """Yields n pools of `size` worker processes, which leave Ctrl-C to this one, and ends them."""
    pools = [ProcessPoolExecutor(size, get_context("spawn"), start_worker) for _ in range(n)]
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # a new process inherits it
        for pool in pools:
            pool.submit(int)  # starts its processes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
        yield pools
    finally:
        with ThreadPoolExecutor() as threads:  # all at once; their end would slow what `cost` times next
            list(threads.map(lambda pool: pool.shutdown(cancel_futures=True), pools))

@cache
def playground(base):
    """In a worker process: OGBench's environment and oracles to collect data with, set as it sets them."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
    collecting = dict(terminate_at_goal=False, mode="data_collection", max_episode_steps=1001)
    env = gymnasium.make(f"{base}-v0", **collecting)
    settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    return env, dict(
        cube=cube_plan.CubePlanOracle(**settings),
        button=button_plan.ButtonPlanOracle(**settings, gripper_always_closed="puzzle" in base),
        drawer=drawer_plan.DrawerPlanOracle(**settings),
        window=window_plan.WindowPlanOracle(**settings),
    )

def play(base, episode, attempt=0):
    """In a worker process: a play episode of 1001 rows in OGBench's format, determined by the arguments."""
    env, oracles = playground(base)
    seed_oracle, seed_env = np.random.SeedSequence((0, episode, attempt)).generate_state(2)
    np.random.seed(seed_oracle)  # the oracles draw from numpy's global generator
    ob, info = env.reset(seed=int(seed_env))
    p_stack = np.random.uniform(*STACKING.get(base.split("-")[-1], (0.5, 0.5)))
    oracle, rows, done = oracles[info["privileged/target_task"]], [], False
    oracle.reset(ob, info)
    while not done:
        action = np.clip(oracle.select_action(ob, info), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        row = dict(observations=ob, actions=action, terminals=done, qpos=info["prev_qpos"])
        rows.append(row | {k: info[f"prev_{k}"] for k in ["button_states"] if f"prev_{k}" in info})
        if oracle.done:
            target_ob, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)
        ob = next_ob
    types = dict(terminals=bool, button_states=np.int64)
    data = {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}
    y, z = data["qpos"][:, 15:17].T  # of the first cube
    if base == "scene" and ((y >= 0.29) | (y <= -0.3) & ((z < 0.06) | (z > 0.08))).any():
        return play(base, episode, attempt + 1)  # the cube left the reachable area: OGBench tries again, too
    return data

def find_dataset(cfg, base, dataset):
    """-> paths of the dataset and words on where it comes from; it is downloaded or collected if need be."""
    official, amount = DATA_DIR / f"{dataset}.npz", cfg.collect or COLLECT.get(base, 1_000_000)
    collected, n = DATA_DIR / f"{dataset}-collected-{amount}.npz", math.ceil(amount / 1000)
    if cfg.data and Path(cfg.data).is_dir():
        slices = sorted(path for path in Path(cfg.data).glob("*.npz") if not path.stem.endswith("-val"))
        if not slices:
            raise UserError(f"{cfg.data} has no .npz in it: --data takes a file, or a folder of slices")
        return slices, f"{len(slices)} slices given with --data"
    if cfg.data:
        return [Path(cfg.data)], "given with --data"
    if not cfg.collect and (official.exists() or not collected.exists() and download(dataset, official)):
        return [official], "OGBench's own"
    if not collected.exists():
        if not (dataset.endswith("-play-v0") and base.startswith(("cube", "scene", "puzzle"))):
            raise UserError(f"no scripted policy makes {dataset}: give --data FILE, or put it at {official}")
        print(f"collecting {n} episodes of 1000 transitions with OGBench's play policies", flush=True)
        with workers(1, CORES) as [pool]:
            episodes = list(progress(pool.map(partial(play, base), range(n)), "collecting", n, unit="k"))
        with atomic_write(collected) as file:
            np.savez(file, **{k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]})
    return [collected], "collected with OGBench's play policies"

def load_dataset(path, env, goal=""):
    """Read a dataset for `env`. -> dict of numpy arrays: observations, actions, rewards, masks, ends, goals

    `ends` (N,) is the last row of each row's trajectory. Where the file has no rewards, OGBench computes them
    (and the masks) for the task of `env`. With a `goal`, `goals` (N, G) are the states as goals, as OGBench
    gives them, and there are no rewards. UserError where training on the file would fail or mislead.
    """
    wanted = ("observations", "actions", "terminals", "qpos", "button_states", "rewards", "masks")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files if k in wanted}
        n, s_dim, a_dim = len(data["actions"]), env.observation_space.shape[0], env.action_space.shape[0]
        if goal:
            data |= dict(rewards=np.zeros(n), masks=np.ones(n), goals=data["observations"])
            if goal == "oracle" and "qpos" in data:
                ogbench.relabel_utils.add_oracle_reps(env.spec.id, env, data)
                data["goals"] = data["oracle_reps"]
        elif "rewards" not in data and "qpos" in data:
            ogbench.relabel_utils.relabel_dataset(env.spec.id, env, data)
        data = {k: np.asarray(v, np.float32) for k, v in (dict(masks=np.ones(n)) | data).items()}
    except Exception as e:  # whatever numpy, zipfile or OGBench say of a file that is not theirs
        name = f".npz dataset of {env.spec.id}"
        raise UserError(f"{path} is missing, truncated or no {name} ({e!r:.70})") from None
    shapes = dict(observations=(n, s_dim), actions=(n, a_dim), terminals=(n,), rewards=(n,), masks=(n,))
    if goal:
        shapes["goals"] = n, env.reset(options=dict(task_id=1))[1]["goal"].size
    for key, shape in shapes.items():
        found = data[key].shape if key in data else "missing"
        if n == 0 or found != shape:
            expected = shape if n else "some rows"
            raise UserError(f"{path} is no dataset of {env.spec.id}: `{key}` is {found}, expected {expected}")
        finite = np.isfinite(data[key].reshape(n, -1)).all(axis=1)
        if not finite.all():
            raise UserError(f"{path}: `{key}` has NaN or Inf in row {finite.argmin()}: drop its trajectory")
    if abs(data["actions"]).max() > 1.001:
        raise UserError(f"{path}: actions reach {abs(data['actions']).max():.3g}: scale them into [-1, 1]")
    last = np.append(np.flatnonzero(data["terminals"][:-1]), n - 1)  # the file's end is a trajectory's end
    data["ends"] = np.int32(last[np.searchsorted(last, np.arange(n))])
    return {k: data[k] for k in ("ends", *shapes) if k != "terminals"}

def to_device(data, reach, sharding=None):
    """What `load_dataset` gives -> what `sample_batch` takes with `reach` steps to a chunk, on the device."""
    solved = data["masks"][data["ends"]] == 0  # at the trajectory's last row: no state need follow that
    starts = np.flatnonzero(np.arange(len(data["ends"])) + reach <= data["ends"] + solved)
    if len(starts) == 0:
        raise UserError(f"no trajectory is longer than {reach} actions: lower --horizon or --long-horizon")
    room = np.resize(starts, len(data["ends"]))  # of one size in all slices, so that none compiles anew
    return jax.device_put(data | dict(starts=np.int32(room), n_starts=np.int32(len(starts))), sharding)

def stream(paths, load, cfg, step):
    """From update `step` on, yield the slice for each cfg.swap updates, forever. -> path, load(path)

    While one is trained on, a thread loads the next: at most two are in memory. Each pass over them has its
    own order, from the seed alone, so that a run that goes on does so in the same slice.
    """
    def slice_at(step):
        turn, i = divmod(step // cfg.swap, len(paths))
        return paths[np.random.default_rng((cfg.seed, turn)).permutation(len(paths))[i]]

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(load, slice_at(step))
        while True:
            data = coming.result()
            if len(paths) > 1:
                coming = thread.submit(load, slice_at(step + cfg.swap))
            yield slice_at(step), data
            step += cfg.swap


# ---- 7 Evaluation: a process a core, each with several environments that share a policy call --------------
SLOTS = 8  # environments in a worker process
CHOOSE, REPORT, LOOK = 1_000_000, 2_000_000, 3_000_000  # the first episode seed for each purpose

Job = namedtuple("Job", "run method weight seed")  # the run is <env>-s<seed>, the method as in `method_of`
Episode = namedtuple("Episode", (*Job._fields, "success", "ret", "length"))  # ret: sum of rewards

def method_of(name):
    """qgf-jacobian+score@4 -> its arguments for `sample_actions`, and N."""
    parts = re.fullmatch(r"(?P<method>[a-z-]+)(\+(?P<schedule>score))?(@(?P<n>[1-9]\d*))?", name)
    if not parts or parts["method"] not in GUIDANCE or parts["schedule"] and GUIDANCE[parts["method"]] is bc:
        usage = f"NAME, NAME@4 or (not of bc, gradstep, edp) NAME+score, with NAME in {', '.join(GUIDANCE)}"
        raise UserError(f"unknown method {name!r}: give {usage}")
    return dict(method=parts["method"], schedule=parts["schedule"] or "constant"), int(parts["n"] or 1)

def goal_of(seed):
    """Which of OGBench's five goals, 1 to 5, an episode has; an environment of one task has its own."""
    return 1 + seed % 5

@cache
def slot(env_id, goal, i):
    """In a worker process: its i-th environment, and the goal that its episode has."""
    return dict(env=make_env(env_id, goal), goal=np.zeros(0))

def act(env_id, goal, commands):
    """In a worker process: commands by slot, each a seed to reset with or a chunk (H, A).

    -> by slot, (observation, rewards, done, success); a chunk stops where its episode ends. A goal, that of
    number `goal_of(seed)`, is appended to the observation.
    """
    replies = {}
    for i, command in commands.items():
        now, rewards, done, info = slot(env_id, goal, i), [], False, {}
        if isinstance(command, int):
            np.random.seed(command)
            now["env"].unwrapped.action_space.seed(command)  # from which OGBench's reset draws, too
            ob, info = now["env"].reset(seed=command, options=dict(task_id=goal_of(command)))
            now["goal"] = info["goal"] if goal else now["goal"]
        else:
            while len(rewards) < len(command) and not done:
                ob, reward, terminated, truncated, info = now["env"].step(command[len(rewards)])
                rewards, done = [*rewards, float(reward)], terminated or truncated
        replies[i] = np.append(ob, now["goal"]), rewards, done, bool(info.get("success"))
    return replies

@contextmanager
def simulators(env_id, goal):
    """Start a process a core. -> for each a function: commands for its slots to a future of their replies"""
    with workers(CORES, 1) as pools:
        yield [partial(pool.submit, act, env_id, goal) for pool in pools]

def sizes(nets):
    """-> S and H*A of `acting_nets`."""
    chunk = nets["policy"][-1]["b"].size
    return nets["critic"][0]["w"].shape[1] - chunk, chunk

def rollout(nets, processes, jobs, cfg, label):
    """Run an episode for each Job, with nets[job.run], in the processes of `simulators`. -> Episodes

    A free slot takes the next job at once, and no process waits for another. An episode's start and noise
    depend on its seed alone, so that rows of a table with the same seeds are paired.
    """
    queue, results = list(enumerate(jobs))[::-1], [None] * len(jobs)
    s_dim, chunk = sizes(next(iter(nets.values())))
    slots = min(SLOTS, -(-len(jobs) // len(processes)))  # few jobs are spread over all processes

    def drive():  # yields commands, and is sent the replies to them
        obs, running, commands = np.zeros((SLOTS, s_dim), np.float32), {}, {}
        while True:
            for run, method in {job[:2] for _, job, *_ in running.values()}:
                rows = [i for i, (_, job, *_) in running.items() if job[:2] == (run, method)]
                how, n = method_of(method)
                noise, w = np.zeros((SLOTS, n, chunk), np.float32), np.zeros(SLOTS, np.float32)
                for i in rows:
                    noise[i], w[i] = running[i][2].standard_normal((n, chunk)), running[i][1].weight
                actions = sample_actions(nets[run], obs, noise, w, **how, denoise_steps=cfg.denoise_steps)
                actions = np.asarray(actions).reshape(SLOTS, cfg.horizon, -1)  # (SLOTS, H*A) -> (SLOTS, H, A)
                commands |= {i: actions[i] for i in rows}
            for i in range(slots):
                if i not in running and queue:
                    number, job = queue.pop()
                    commands[i], running[i] = job.seed, (number, job, np.random.default_rng(job.seed), [])
            if not commands:
                return
            replies, commands = (yield commands), {}
            for i, reply in replies.items():
                obs[i], rewards, done, success = reply
                number, job, _, so_far = running[i]
                so_far += rewards
                if done:
                    results[number] = Episode(*job, success, sum(so_far), len(so_far))
                    del running[i]
                    bar.update()

    with progress(total=len(jobs), desc=label, unit=" episodes") as bar:
        work = {process(next(c)): (process, c) for process in processes if queue for c in [drive()]}
        while work:
            for future in wait(work, return_when=FIRST_COMPLETED).done:
                process, c = work.pop(future)
                try:
                    work[process(c.send(future.result()))] = process, c
                except StopIteration:
                    pass
    return results

def operations(jaxpr, T):
    """Floating-point operations of a jaxpr's matrix products, in loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [operations(j, T) for j in jax.tree.leaves(list(eqn.params.values())) if hasattr(j, "eqns")]
        if eqn.primitive.name == "dot_general":
            (dims, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in dims)
        elif eqn.primitive.name == "cond":  # in `integrate`: (T + 1) / 2 steps of T remain on average
            total += max(inner) * (T + 1) / (2 * T)
        else:
            total += sum(inner) * eqn.params.get("length", 1)  # of a scan
    return total

def cost(nets, method, cfg):
    """What a chunk costs. -> ms at batch 1, µs in a batch of 256 (medians), MFLOP (its matrix products)"""
    how, n = method_of(method)
    (s_dim, chunk), result = sizes(nets), {}
    sample = partial(sample_actions, **how, denoise_steps=cfg.denoise_steps)
    for B, unit in ((1, "ms_1"), (256, "us_256")):
        s, a_0 = jnp.zeros((B, s_dim)), jnp.ones((B, n, chunk))
        seconds = timeit.repeat(lambda: sample(nets, s, a_0, 0.01).block_until_ready(), number=1, repeat=22)
        result[unit] = np.median(seconds[2:]) / B * (1e3 if B == 1 else 1e6)  # the first two compile and warm
    result["mflop"] = operations(jax.make_jaxpr(sample)(nets, s, a_0, 0.01), cfg.denoise_steps) / B / 1e6
    return result

def bootstrap(runs):
    """95 % interval of a mean over runs, each an array over episodes: draws runs, then episodes of each.

    It draws n - 1 runs, with replacement: n would give (n - 1)/n of the variance between runs.
    """
    rng, n = np.random.default_rng(0), len(runs)
    means = np.array([rng.choice(run, (2000, len(run))).mean(axis=1) for run in runs])  # (n, 2000)
    drawn = rng.integers(n, size=(2000, max(n - 1, 1)))
    return np.percentile(means[drawn, rng.integers(2000, size=drawn.shape)].mean(axis=1), (2.5, 97.5))

def summary(episodes, costs={}):
    """Episodes -> a dict for each method and weight: success and its interval, means, gain over BC.

    The interval is Wilson's; with several runs (environments, seeds of training), which count the same and
    whose success may differ more than episodes do, it is widened to the bootstrap's. The gain is paired by
    run and episode seed.
    """
    rows, base = [], {(e.run, e.seed): e.success for e in episodes if e.method == "bc"}
    for how in dict.fromkeys((e.method, e.weight) for e in episodes):
        ours = [e for e in episodes if (e.method, e.weight) == how]
        runs = [[e for e in ours if e.run == run] for run in dict.fromkeys(e.run for e in ours)]
        n, wins = len(ours), [np.array([e.success for e in run]) for run in runs]
        low, high = binomtest(sum(e.success for e in ours), n).proportion_ci(method="wilson")
        if len(runs) > 1:
            ends = bootstrap(wins)
            low, high = min(low, ends[0]), max(high, ends[1])
        success = np.mean([w.mean() for w in wins])
        row = dict(zip(("method", "weight"), how)) | dict(n=n, success=success, low=low, high=high)
        row |= dict(ret=sum(e.ret for e in ours) / n, length=sum(e.length for e in ours) / n)
        if how[0] != "bc" and all((e.run, e.seed) in base for e in ours):
            gains = [np.array([e.success - base[e.run, e.seed] for e in run]) for run in runs]
            ends = bootstrap(gains)
            row |= dict(gain=np.mean([g.mean() for g in gains]), gain_low=ends[0], gain_high=ends[1])
        rows.append(row | costs.get(how[0], {}))
    return rows

def table(rows):
    """Lines of text for the rows of `summary`, with a bar."""
    lines = ["method               weight    n  success  95 % interval                return   length"]
    lines[0] += "   - BC, paired       " * any("gain" in r for r in rows)
    lines[0] += "   ms at 1  µs at 256    MFLOP" * any("mflop" in r for r in rows)
    for r in rows:
        bar = f"{'█' * round(10 * r['success']):░<10}"
        line = "{method:19} {weight:7g} {n:4} {success:8.2f}  [{low:.2f}, {high:.2f}] {bar}"
        line += " {ret:9.1f} {length:8.1f}"
        line += "   {gain:+.2f} [{gain_low:+.2f}, {gain_high:+.2f}]" if "gain" in r else " " * 23
        line += " {ms_1:9.2f} {us_256:10.1f} {mflop:8.1f}" if "mflop" in r else ""
        lines.append(line.format(bar=bar, **r).rstrip())
    return lines

def verdict(row):
    """Whether a row of `summary` is better than BC, by the interval of its paired gain."""
    sign = (int(row["gain_low"] > 0) - int(row["gain_high"] < 0)) * (row["n"] >= 10)  # a few show nothing
    shown = {1: "yes", 0: "not shown", -1: "no, it harmed"}[sign]
    return "{}, {method} by {gain:+.2f} [{gain_low:+.2f}, {gain_high:+.2f}]".format(shown, **row)

def best_weight(episodes):
    """The weight with the most successes; among equals that with the largest return, then the smallest."""
    return max(summary(episodes), key=lambda r: (r["success"], r["ret"], -r["weight"]))["weight"]

def evaluate(nets, env_id, cfg):
    """For each method choose w, then run fresh episodes, the same for all. -> the Episodes of both

    nets: `acting_nets` by run; one weight serves all of them.
    """
    best = dict.fromkeys(("bc", *cfg.methods, *(["edp"] if cfg.edp else [])), 0.0)
    guided = [m for m in best if method_of(m)[0]["method"] not in ("bc", "edp")]
    with simulators(env_id, cfg.goal) as processes:
        seeds = range(CHOOSE, CHOOSE + cfg.choose)
        jobs = [Job(run, m, w, i) for run in nets for m in guided for w in cfg.weights for i in seeds]
        choice = rollout(nets, processes, jobs, cfg, "choosing w")
        best |= {m: best_weight([e for e in choice if e.method == m]) for m in guided}
        seeds = range(REPORT, REPORT + cfg.episodes)
        jobs = [Job(run, m, w, i) for run in nets for m, w in best.items() for i in seeds]
        return choice, rollout(nets, processes, jobs, cfg, "reporting")


# ---- 8 Runs: a folder with config.json, checkpoint.npz, metrics.csv, episodes.csv and table.csv ------------
CALL = 100  # updates in a compiled call
LOSSES = ("flow_loss", "critic_loss", "value_loss", "edp_loss", "q", "v")
# the settings that may change when a run goes on
FREE = "preset out eval gif table data collect updates methods weights choose episodes watch".split()

def init_seeds(s_dim, a_dim, unseen, cfg):
    """The State of each of cfg.seeds seeds, as `init_state` gives it: all arrays stacked on axis 0."""
    keys = [jax.random.PRNGKey(cfg.seed + k) for k in range(cfg.seeds)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[init_state(k, s_dim, a_dim, cfg, unseen) for k in keys])

def device_mesh(seeds, batch_size, devices):
    """A mesh (seed, batch) of devices: they share the seeds or, if there are too few, the batch of each."""
    n = math.gcd(seeds, len(devices))
    m = math.gcd(batch_size, len(devices) // n)
    return jax.make_mesh((n, m), ("seed", "batch"), (AxisType.Auto, AxisType.Auto), devices=devices[: n * m])

def named_leaves(state):
    """The arrays of a State by names such as params/critic/0/w."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

def write_csv(path, rows):
    """Write a whole CSV file, atomically."""
    with atomic_write(path, "w") as file:
        csv.writer(file).writerows(rows)

def save_run(folder, states, metrics, record):
    """Write checkpoint.npz (states and record, no pickle) and two files to read; refuses NaN and Inf."""
    arrays = {k: np.asarray(v) for k, v in named_leaves(states).items()}
    if bad := [k for k, v in arrays.items() if not np.isfinite(v).all()]:
        raise UserError(f"{bad[0]} is NaN at update {states.step[0]}; {folder} keeps what was saved before")
    write_csv(folder / "metrics.csv", [("step", "seed", *LOSSES), *metrics])
    with atomic_write(folder / "checkpoint.npz") as file:
        np.savez(file, record=json.dumps(record), **arrays)
    with atomic_write(folder / "config.json", "w") as file:
        json.dump(record, file, indent=1)

def load_run(folder, given):
    """-> States (numpy arrays), record; UserError if they are not whole, or not of the settings `given`."""
    path = folder / "checkpoint.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        record = json.loads(str(arrays["record"]))
        cfg = Config(**record["config"] | dict(weights=(), methods=()))  # lists in JSON
        states = jax.eval_shape(lambda: init_seeds(*record["sizes"], cfg))
        for name, leaf in named_leaves(states).items():
            if arrays[name].shape != leaf.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, expected {leaf.shape}")
    except FileNotFoundError:
        raise UserError(f"there is no {path} to evaluate: train first, without --eval or --gif") from None
    except Exception as e:
        raise UserError(f"{path} is no whole checkpoint ({e!r}): move it away to start again") from None
    fixed = {k: v for k, v in record["config"].items() if k not in FREE}
    differ = {k.replace("_", "-"): v for k, v in fixed.items() if v != given.get(k, v)}
    differ = [f"no --{k}" if v is False else f"--{k} {v}".removesuffix(" True") for k, v in differ.items()]
    if differ:
        raise UserError(f"{folder} holds a run with {' '.join(differ)}: ask for that, or another --out")
    return jax.tree.unflatten(jax.tree.structure(states), [arrays[k] for k in named_leaves(states)]), record

@contextmanager
def gentle_stop():
    """Yields a list that the first Ctrl-C (or SIGTERM) fills, for a loop to end at; the second interrupts."""
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)
    def stopping(*args):
        return signal.default_int_handler(*args) if stop else stop.append(1)
    old = [signal.signal(s, stopping) for s in signals]
    try:
        yield stop
    finally:
        for s, handler in zip(signals, old):
            signal.signal(s, handler)

def nets_by_run(states, short, cfg):
    """`acting_nets` of each seed, by the name of its run, <env>-s<seed>."""
    nets = jax.device_get(acting_nets(states))
    return {f"{short}-s{cfg.seed + k}": jax.device_put(jax.tree.map(lambda x: x[k], nets))
            for k in range(cfg.seeds)}

def look(nets, env_id, cfg):
    """A few episodes of the first run, as lines of a table, to watch a long training."""
    run = next(iter(nets))
    with simulators(env_id, cfg.goal) as processes:
        tried = [("bc", 0.0), *(("qgf", w) for w in cfg.weights)]
        jobs = [Job(run, *how, LOOK + i) for how in tried for i in range(5)]
        return table(summary(rollout(nets, processes, jobs, cfg, "a look")))

def fit(states, slices, folder, record, cfg, short, env_id):
    """Train to cfg.updates, or a `gentle_stop`, on what `stream` yields; save each minute. -> States"""
    metrics, step = [], int(states.step[0])
    if step:  # after a kill, metrics.csv can be ahead of the checkpoint
        with open(folder / "metrics.csv") as file:
            metrics = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
    if step < cfg.updates:
        (folder / "episodes.csv").unlink(missing_ok=True)  # of fewer updates; with it, a run counts as done
    path, data = next(slices)
    describe(record["data"], data, cfg.goal)
    record["seen"][path.name] = len(data["ends"])
    print(f"plan    updates {step} to {cfg.updates}", flush=True)
    saved = looked = time.monotonic()
    bar = progress(total=cfg.updates, initial=step, desc="training", unit=" updates")
    with gentle_stop() as stop, bar:
        while step < cfg.updates and not stop:
            n = min(CALL, cfg.updates - step, cfg.swap - step % cfg.swap)
            states, info = train_seeds(states, data, n, cfg)
            losses = np.array([info[k] for k in LOSSES])  # (6, K, n): the one wait for the device
            finite = np.isfinite(losses).all(axis=(0, 1))
            if not finite.all():
                where = f"at update {step + 1 + finite.argmin()}; {folder} keeps what was saved before"
                raise UserError(f"a loss is NaN or Inf {where}. Try a smaller --lr, and another --out")
            if step == bar.initial:
                bar.start_t = bar.last_print_t = time.time()  # the first call compiled: time from its end
            step += n
            for k, means in enumerate(losses.mean(axis=2).T):  # (6, K, n) -> (K, 6)
                metrics.append([step, cfg.seed + k, *(f"{x:.6g}" for x in means)])
            bar.update(n)
            if step % cfg.swap == 0 and step < cfg.updates:
                data = None  # lets go of its memory
                try:
                    path, data = next(slices)
                except UserError:
                    save_run(folder, states, metrics, record)
                    raise
                record["seen"][path.name] = len(data["ends"])
            if time.monotonic() - saved > 60:
                save_run(folder, states, metrics, record)
                saved = time.monotonic()
            if time.monotonic() - looked > 60 * cfg.watch and step < cfg.updates:
                lines = look(nets_by_run(states, short, cfg), env_id, cfg)
                bar.write("\n".join([f"after {step} updates", *lines]))
                looked = time.monotonic()
        save_run(folder, states, metrics, record)
    if stop:
        raise UserError(f"stopped at update {step}, saved in {folder}; the same command goes on")
    return states

def read_episodes(folder):
    """episodes.csv of a run. -> Episodes that chose a weight, Episodes that are reported"""
    kinds = dict(weight=float, seed=int, success="True".__eq__, ret=float, length=int)
    try:
        with open(folder / "episodes.csv") as file:
            rows = [(r["purpose"], Episode(*(kinds.get(k, str)(r[k]) for k in Episode._fields)))
                    for r in csv.DictReader(file)]
    except (FileNotFoundError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder} has no episodes.csv of this version ({e!r}): evaluate it again") from None
    return tuple([e for p, e in rows if p == purpose] for purpose in ("choose", "report"))

def pooled(folder):
    """All finished runs in a folder. -> lines of a Markdown table, with the paper's figures

    A row is a method; a column is a family of environments, its runs being tasks and seeds of training.
    """
    fresh, costs, families = [], {}, {}
    for path in sorted(Path(folder).glob("**/episodes.csv")):
        here = path.parent.relative_to(folder)  # runs of several folders are told apart
        fresh += [e._replace(run=str(here / e.run)) for e in read_episodes(path.parent)[1]]
        with open(path.with_name("table.csv")) as file:
            for r in csv.DictReader(file):
                costs.setdefault(r["method"], []).append([float(r[k]) for k in ("ms_1", "us_256", "mflop")])
    if not fresh:
        raise UserError(f"no finished run in {folder}: a run's folder has an episodes.csv then")
    for e in fresh:
        families.setdefault(re.sub(r"(-task\d)?-s\d+(/[^/]*)?$", "", e.run), []).append(e._replace(weight=0))
    columns = {f: {r["method"]: r for r in summary(episodes)} for f, episodes in families.items()}
    if len(families) > 1:
        columns["all"] = {r["method"]: r for r in summary(sum(families.values(), []))}
    lines = [["method", "w", *columns, "− bc, paired", "ms, batch 1", "µs, batch 256", "MFLOP", "paper"]]
    lines.append(["---"] * len(lines[0]))
    for method in costs:
        weights = sorted({e.weight for e in fresh if e.method == method and e.weight})
        ends = dict.fromkeys(f"{w:g}" for w in weights[:1] + weights[-1:])
        paper = dict(zip(PAPER_FAMILIES, PAPER_RESULTS.get(method, ())))
        lines.append([f"`{method}`", " to ".join(ends)])
        for family, rows in columns.items():
            r = rows.get(method)  # at last that of all families
            lines[-1].append("{success:.2f} [{low:.2f}, {high:.2f}]".format(**r) if r else "")
            lines[-1][-1] += f", paper {paper[family] / 100:.2f}" if family in paper else ""
        gain = "{gain:.2f} [{gain_low:.2f}, {gain_high:.2f}]" if r and "gain" in r else ""
        mean = paper.get("all-goal" if all(f.endswith("-goal") for f in families) else "all-single")
        cost = [f"{float(f'{x:.3g}'):g}" for x in np.median(costs[method], axis=0)]
        lines[-1] += [gain.format(**r or {}), *cost, f"{mean / 100:.2f}" if mean else ""]
    runs, n = len({e.run for e in fresh}), sum(e.method == "bc" for e in fresh)
    return [*(f"| {' | '.join(cells)} |" for cells in lines), f"\nruns: {runs}; episodes per method: {n}"]

def film(nets, folder, env_id, cfg):
    """Film an episode that the first run's QGF solved beside BC's try, from the same start, into cfg.gif."""
    run, fresh = next(iter(nets)), read_episodes(folder)[1]
    failed = {e.seed for e in fresh if e.run == run and e.method == "bc" and not e.success}
    solved = [e for e in fresh if e.run == run and e.method == "qgf" and e.success and e.seed in failed]
    if not solved:
        raise UserError(f"{folder} has no episode that QGF solved and BC did not: evaluate more, or retrain")
    frames = []

    class Camera(gymnasium.Wrapper):
        def step(self, action):
            frames.append(self.unwrapped.render())
            return super().step(action)

    slot(env_id, cfg.goal, 0)["env"] = env = Camera(make_env(env_id, cfg.goal, width=320, height=320))
    env.reset()
    try:
        env.unwrapped.render()
    except Exception as e:
        raise UserError(f"cannot render here ({e!r}): put MUJOCO_GL=egl or MUJOCO_GL=osmesa before the "
                        "command, with Mesa's libegl1 or libosmesa6 installed") from None
    def process(commands):  # as those of `simulators`, but here, in front of the camera
        done = Future()
        done.set_result(act(env_id, cfg.goal, commands))
        return done
    clips = []
    for method, w in (("bc", 0.0), ("qgf", solved[0].weight)):
        [e] = rollout(nets, [process], [Job(run, method, w, solved[0].seed)], cfg, f"filming {method}")
        words = f"{method}, w = {w:g}: {'solved' if e.success else 'not solved'} in {e.length} steps"
        clips.append((words, frames[::3]))
        frames.clear()
    images = []
    for i in range(max(len(frames) for _, frames in clips) + 15):  # the last frame stays a while
        pair = [Image.fromarray(frames[min(i, len(frames) - 1)]) for _, frames in clips]
        for image, (words, _) in zip(pair, clips):
            at = 6, image.height - 22
            ImageDraw.Draw(image).text(at, words, "white", font_size=15, stroke_width=1, stroke_fill="black")
        images.append(Image.fromarray(np.concatenate(pair, axis=1)).quantize(64))
    with atomic_write(Path(cfg.gif)) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=80, loop=0)
    print(f"saved in {cfg.gif}")


# ---- 9 main ------------------------------------------------------------------------------------------------
FAMILY = {  # where the defaults of Config do not serve
    # a wide flow, since a narrow one grips beside the cubes; with a narrower critic there is time for it
    "cube-double": dict(
        updates=300_000, lr=3e-4, width=512, depth=4, critic_width=256,
        weights=(0.03, 0.06, 0.1, 0.2), episodes=100),
    "scene": dict(updates=40_000, lr=5e-4),
    "cube-single-goal": dict(updates=20_000, episodes=100),
    "puzzle-3x3-goal": dict(
        updates=40_000, lr=5e-4, episodes=100, long_horizon=25, weights=(0.01, 0.03, 0.1, 0.3)),
}
# to the table, on two CPU cores
MINUTES = {"cube-single": 6, "cube-double": 70, "scene": 10, "cube-single-goal": 8, "puzzle-3x3-goal": 20}
PAPER = dict(updates=500_000, batch_size=1024, width=1024, depth=4, lr=3e-4, discount=0.999)
# goals: the paper's w of 1 to 10 are for DQC's γ^k in [0, 1]; that is 1 + (1-γ) Q with rewards of -1 as here
PAPER_GOAL = PAPER | dict(
    updates=1_000_000, batch_size=4096, weights=(0.001, 0.002, 0.005, 0.01), long_horizon=25)
PAPER_EXPECTILES = {  # τ and κ for goals, from DQC's release
    "cube-triple": (0.93, 0.8), "cube-quadruple": (0.93, 0.8), "cube-octuple": (0.93, 0.5),
    "puzzle-4x5": (0.9, 0.5), "puzzle-4x6": (0.7, 0.5),
}
PAPER_WEIGHTS = {  # around the peaks of the paper's sweep
    "cube-triple": (0.02, 0.04, 0.06, 0.08), "cube-quadruple": (0.01, 0.02, 0.04, 0.06),
    "puzzle-4x4": (0.004, 0.008, 0.01, 0.02), "scene": (0.04, 0.06, 0.08, 0.1),
}
PAPER_FAMILIES = ("cube-triple", "cube-quadruple", "puzzle-4x4", "scene", "all-single", "puzzle-4x5-goal",
                  "cube-triple-goal", "cube-quadruple-goal", "puzzle-4x6-goal", "cube-octuple-goal",
                  "all-goal")
PAPER_RESULTS = {  # success in %, measured off its figures, ± 0.2
    "qgf": (70.1, 6.9, 47.6, 87.0, 52.9, 55.4, 67.3, 54.1, 83.0, 12.9, 54.5),
    "qgf-jacobian": (62.1, 9.9, 33.1, 88.4, 48.4, 19.5, 33.6, 35.1, 73.8, 7.9, 34.0),
    "qfql": (50.3, 3.9, 33.9, 86.9, 43.8, 81.5, 36.2, 18.2, 81.1, 0.3, 43.5),
    "bptt": (60.7, 8.2, 18.3, 68.3, 38.9, 18.0, 17.9, 23.1, 72.2, 5.0, 27.2),
    "gradstep": (18.5, 0.4, 7.2, 20.9, 11.7), "edp": (74.3, 13.8, 38.2, 78.1, 51.1),
    "bc@4": (56.9, 3.5, 17.8, 96.5, 43.7), "bc@16": (76.3, 11.1, 45.5, 98.1, 57.8),
    "qgf@4": (79.1, 12.5, 45.3, 96.6, 58.4),
}

def parse(argv):
    """The options given on the command line, by field of Config."""
    own = f"In brackets: the default. {', '.join(FAMILY)} have some of their own, which a run prints first."
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=own, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar="X")
        if f.type is tuple:
            kind = dict(type=type(f.default[0]), nargs="+", metavar="X")
        if f.name == "goal":
            kind = dict(nargs="?", choices=("oracle", "state"), const="oracle")
        if f.name == "preset":
            kind = dict(choices=("paper",))
        default = " ".join(map(str, f.default)) if f.type is tuple else f.default
        help = f.metadata["help"] + f" [{default}]" * bool(default)
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help, **kind)
    given = vars(parser.parse_args(argv))
    for name, v in given.items():
        low = 0 if getattr(Config, name) == 0 else 1e-9  # 0 is in range where it is the default
        high = 1 if name in ("discount", "expectile", "target_rate", "kappa") else math.inf
        text = isinstance(v, str) or name == "methods"
        if v == "" or not text and not low <= np.min(v) <= np.max(v) <= high:
            raise UserError(f"--{name.replace('_', '-')} {v!r} is out of range")
    return given

def defaults(base, goal, preset):
    """The settings of an environment's family: Config's own, or FAMILY's, or the paper's."""
    family = f"{base}-goal" if goal else base
    paper = PAPER | dict(weights=PAPER_WEIGHTS.get(base, Config.weights))
    if goal:
        paper = PAPER_GOAL | dict(zip(("expectile", "kappa"), PAPER_EXPECTILES.get(base, ())))
        paper |= dict(horizon=1) if base == "puzzle-4x6" else {}
    return asdict(Config()) | (paper if preset else FAMILY.get(family, {}))

def describe(source, data, goal):
    """Print what a dataset, as `to_device` gives it, is."""
    r, ends, masks = (np.asarray(data[k]) for k in ("rewards", "ends", "masks"))
    shapes = ", ".join(f"{k} {v.shape[1]}" for k, v in data.items() if v.ndim == 2)
    n, solved = len(np.unique(ends)), masks == 0
    print(f"data    {source}\n        {len(r) - n:,} transitions in {n:,} trajectories; {shapes}")
    if not goal:
        print(f"        rewards {r.min():g} to {r.max():g}; solved in {solved.mean():.2%} of the states, "
              f"{len(set(ends[solved]))} of the trajectories")

def report(folder, title, nets, env_id, cfg):
    """Evaluate `acting_nets` by run; write episodes.csv and table.csv, and print what they say."""
    choice, fresh = evaluate(nets, env_id, cfg)
    first = next(iter(nets.values()))
    rows = summary(fresh, {m: cost(first, m, cfg) for m in dict.fromkeys(e.method for e in fresh)})
    episodes = [("choose", *e) for e in choice] + [("report", *e) for e in fresh]
    columns = list(dict.fromkeys(k for r in rows for k in r))
    write_csv(folder / "table.csv", [columns, *([r.get(k, "") for k in columns] for r in rows)])
    write_csv(folder / "episodes.csv", [("purpose", *Episode._fields), *episodes])  # the last: a run is done
    if choice:
        print("\nto choose the weight", *table(summary(choice)), sep="\n")
    for k in range(1, 6 if cfg.goal else 1):
        print(f"\ngoal {k}", *table(summary([e for e in fresh if goal_of(e.seed) == k])), sep="\n")
    print(f"\n{title}, fresh episodes", *table(rows), sep="\n")
    if answers := [verdict(r) for r in rows if "gain" in r]:
        print("did guidance help?", *answers, sep="\n")
    print(f"saved in {folder}")

def fingerprint(paths):
    """What tells whether data are the same: a file's SHA-256, or the names of many slices."""
    if len(paths) > 1:
        return " ".join(path.name for path in paths)
    with open(paths[0], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def learn(states, record, folder, names, cfg):
    """Train States, saved ones with their record or else new ones, on what data there are. -> States"""
    base, short, env_id, dataset, goal = names
    folder.mkdir(parents=True, exist_ok=True)  # if it cannot be written, now is the time to know
    family = f"{base}-goal" if goal else base
    if family in MINUTES and not cfg.preset:
        print(f"time    about {MINUTES[family]} minutes by default, from nothing on two cores", flush=True)
    paths, origin = find_dataset(cfg, base, dataset)
    mark, env = fingerprint(paths), make_env(env_id, goal)
    if record and mark != record["fingerprint"]:
        raise UserError(f"{folder} was trained on other data, {record['data']}: choose another --out")
    if not record:
        g_dim = env.reset(options=dict(task_id=1))[1]["goal"].size if goal else 0
        s_dim, a_dim = env.observation_space.shape[0] + g_dim, env.action_space.shape[0]
        packages = ("jax", "jaxlib", "optax", "numpy", "ogbench", "gymnasium", "mujoco")
        versions = {p: version(p) for p in packages} | dict(python=platform.python_version())
        record = dict(sizes=(s_dim, a_dim, 0 if cfg.goal_flow else g_dim), seen={}, versions=versions)
        record |= dict(data=f"{cfg.data or paths[0]}: {origin}", fingerprint=mark)
        states = init_seeds(*record["sizes"], cfg)
    record["config"] = asdict(cfg)
    counts = (f"{k} {sum(x[0].size for x in jax.tree.leaves(v)):,}" for k, v in states.params.items())
    print(f"nets    {', '.join(counts)} parameters, for each of {cfg.seeds} seed(s)")
    mesh = device_mesh(cfg.seeds, cfg.batch_size, jax.devices())
    everywhere, by_seed = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("seed",)))
    load = lambda path: to_device(load_dataset(path, env, goal), cfg.reach, everywhere)
    slices = stream(paths, load, cfg, int(states.step[0]))
    with jax.set_mesh(mesh):
        return fit(jax.device_put(states, by_seed), slices, folder, record, cfg, short, env_id)

def run(given):
    """A whole run, from the given options to the table."""
    if given.get("table"):
        return print(*pooled(given["table"]), sep="\n")
    names = find_task(given.get("env", Config.env), given.get("goal", Config.goal))
    base, short, env_id, _, goal = names
    given |= dict(env=short.removesuffix("-goal"), goal=goal)
    folder = Path(given.get("out", Config.out)) / f"{short}-s{given.get('seed', Config.seed)}"
    settings, states, record = defaults(base, goal, given.get("preset")), None, {}
    if given.get("eval") or given.get("gif"):
        states, record = load_run(folder, given)
        settings = record["config"]
    elif (folder / "checkpoint.npz").exists():
        states, record = load_run(folder, settings | given)
    settings = settings | given
    cfg = Config(**{k: tuple(dict.fromkeys(v)) if type(v) is list else v for k, v in settings.items()})
    if "edp" in [method_of(m)[0]["method"] for m in cfg.methods] and not cfg.edp:
        raise UserError("edp is a policy of its own, which this run does not train: train one with --edp 100")
    if cfg.goal_flow and not goal:
        raise UserError("--goal-flow lets the flow see a goal, and there is none without --goal")
    if 0 < cfg.long_horizon < cfg.horizon:
        raise UserError(f"--long-horizon {cfg.long_horizon} is shorter than the {cfg.horizon} of --horizon")
    changed = [f"{k} {v}" for k, v in asdict(cfg).items() if v != getattr(Config, k)]
    print(f"qgf     {env_id}, seed {cfg.seed} -> {folder}\nconfig  {', '.join(changed)}")
    devices = f"{jax.device_count()} of {jax.devices()[0].device_kind}"
    print(f"device  {devices}, {CORES} CPU cores, jax {jax.__version__}")
    if not (cfg.eval or cfg.gif):
        states = learn(states, record, folder, names, cfg)
    nets = nets_by_run(states, short, cfg)
    if cfg.gif:
        return film(nets, folder, env_id, cfg)
    report(folder, f"{short} after {states.step[0]} updates", nets, env_id, cfg)

def main(argv=None):
    """The command line. -> exit status"""
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qgf"
    jax.config.update("jax_compilation_cache_dir", str(cached))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        run(parse(argv))
        return 0
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from what was saved"
    except BrokenProcessPool:
        message = "a simulator process died, out of memory? The same command goes on from what was saved"
    except OSError as e:
        message = f"cannot read or write {e.filename or 'a file'}: {e.strerror or e}; what was saved is kept"
    print(f"qgf: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
