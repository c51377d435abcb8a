"""The noise schedule and the samplers against diffusers' schedulers, step by step.

Our sampler runs a whole trajectory with a known denoiser; at each of its steps the other library's
scheduler is given the same x_t, network output and noise, so that rounding does not add up.

diffusers holds alpha_bar in float32, where 1 - alpha_bar_0 = 4e-5 keeps three digits: its step to
x_0 multiplies the predicted x_0 by 1.0005, where the equation (and Karlo, and we, in float64) have
1. So its equations are checked with its tables in float64 (`in_float64`), and what it does as it is
has a bound of its own. Standard deviations are compared as such, not their logarithms.
"""

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_unclip

from unclip.diffusion import gaussian, samplers, schedule

FULL = schedule.cosine()
COUNTS = (7, 25, 50, 1000)
SHAPE = (2, 4, 4, 3)
BOUND = 1e-5
SPREAD = 0.6  # of the data the denoiser knows: most of it inside [-1, 1], some beyond

torch.set_num_threads(1)


def there(values):
    """[B, H, W, C] to torch's [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(values), -1, 1)))


def here(values):
    return np.moveaxis(values.numpy(), 1, -1)


def known_x0(x_t, t, scale):
    """E[x_0 | x_t] for x_0 ~ N(0, (scale SPREAD)^2), a denoiser without parameters."""
    spread = scale * SPREAD
    a = gaussian.expand(FULL.at(FULL.alpha_bar, t), x_t)
    return spread**2 * jnp.sqrt(a) / (spread**2 * a + 1 - a) * x_t


def network(output, *, scale=1.0, variance=False):
    """A model_fn (x_t, t) -> x_0 or eps, with a variance value in [-1, 1] where it is learned."""

    def model_fn(x_t, t):
        out = known_x0(x_t, t, scale)
        if output == "eps":
            out = gaussian.predict_eps(FULL, x_t, t, out, "x0")
        return jnp.concatenate([out, jnp.sin(5 * x_t)], -1) if variance else out

    return model_fn


def ours(s, model_fn, noise, *, sampler="ddpm", eta=0.0, **reading):
    """Our trajectory: [(t, x_t, raw output)] of every visited step, and x_0."""
    seen = []

    def noted(x, t):
        out = model_fn(x, t)
        note = lambda *values: seen.append([np.asarray(v) for v in values])
        jax.debug.callback(note, t[0], x, out, ordered=True)
        return out

    denoise = gaussian.make_denoise(noted, s, **reading)
    draw = lambda x_T, z: samplers.sample(denoise, s, x_T, None, sampler=sampler, eta=eta, noise=z)
    x_0 = np.asarray(jax.jit(draw)(noise[0], noise[1:]))
    jax.effects_barrier()
    assert [int(t) for t, *_ in seen] == s.timesteps[samplers.visits(sampler, s)].tolist()
    return seen, x_0


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal((1 + n, *SHAPE)).astype(np.float32)


def in_float64(theirs):
    """A scheduler with its tables, of the same formula, in double precision."""
    level = lambda i: math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = [min(1 - level(i + 1) / level(i), 0.999) for i in range(1000)]
    precise = torch.tensor(betas, dtype=torch.float64)
    torch.testing.assert_close(precise.float(), theirs.betas, rtol=1e-6, atol=0)
    theirs.betas, theirs.alphas = precise, 1 - precise
    theirs.alphas_cumprod = torch.cumprod(1 - precise, 0)
    return theirs


def worst(pairs):
    return max(float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in pairs)


# ======================================================================================= schedule


def test_timesteps(parity):
    theirs = diffusers.UnCLIPScheduler()
    different = 0
    for n in COUNTS:
        theirs.set_timesteps(n)
        got = FULL.respace(n).timesteps[::-1]
        assert got.shape == tuple(theirs.timesteps.shape)
        different += int((got != theirs.timesteps.numpy()).sum())
    parity(
        "scheduler: timesteps of 7, 25, 50, 1000 steps", "diffusers UnCLIPScheduler", different, 0
    )


def test_betas(parity):
    theirs = diffusers.UnCLIPScheduler()
    pairs = [(FULL.betas, theirs.betas.numpy()), (FULL.alpha_bar, theirs.alphas_cumprod.numpy())]
    parity("scheduler: betas and alpha_bar", "diffusers UnCLIPScheduler", worst(pairs), BOUND)


@pytest.mark.parametrize("kind", ["fixed_small_log", "learned_range"])
def test_standard_deviations(parity, kind):
    """Of every step that draws noise, for 7, 25, 50 and 1000 steps."""
    theirs = diffusers.UnCLIPScheduler(variance_type=kind)
    values, pairs = np.float32([-1, -0.3, 0, 0.5, 1]), []
    for n in COUNTS:
        s = FULL.respace(n)
        t, below = s.timesteps[1:].tolist(), s.timesteps[:-1].tolist()
        if kind == "learned_range":
            got = jnp.exp(
                0.5
                * gaussian.learned_range(
                    s, jnp.asarray(t), jnp.broadcast_to(values, (len(t), len(values)))
                )
            )
            want = [
                (0.5 * theirs._get_variance(a, b, torch.from_numpy(values))).exp().numpy()
                for a, b in zip(t, below)
            ]
        else:
            got = jnp.exp(0.5 * gaussian.fixed_small(s, jnp.asarray(t)))
            want = [theirs._get_variance(a, b).numpy() for a, b in zip(t, below)]
        pairs.append((got, np.stack(want)))
    parity(
        f"scheduler: standard deviations, {kind}", "diffusers UnCLIPScheduler", worst(pairs), BOUND
    )


# ======================================================================== one step of each kind


KARLO = pytest.mark.parametrize(
    ("output", "variance", "limit"),
    [
        ("x0", "fixed_small", 5.0),
        ("x0", "fixed_small", 10.0),
        ("eps", "learned_range", 1.0),
        ("eps", "fixed_small", 1.0),
    ],
    ids=["prior-5", "prior-10", "decoder", "upsampler"],
)


@KARLO
@pytest.mark.parametrize("tables", ["float64", "float32"])
def test_ancestral_steps(parity, monkeypatch, output, variance, limit, tables):
    """Karlo's three stages: every step of 7, 25, 50 and 1000."""
    learned = variance == "learned_range"
    theirs = diffusers.UnCLIPScheduler(
        variance_type="learned_range" if learned else "fixed_small_log",
        prediction_type={"x0": "sample", "eps": "epsilon"}[output],
        clip_sample_range=limit,
    )
    theirs = in_float64(theirs) if tables == "float64" else theirs
    model_fn = network(output, scale=limit, variance=learned)
    pairs, clipped = [], []
    for n in COUNTS:
        noise = normal(n)
        seen, x_0 = ours(
            FULL.respace(n),
            model_fn,
            noise,
            parametrisation=output,
            variance=variance,
            clip=limit,
        )
        after = [x for _, x, _ in seen[1:]] + [x_0]
        theirs.set_timesteps(n)
        steps = [*theirs.timesteps, None]
        for k, (_, x, out) in enumerate(seen):
            monkeypatch.setattr(
                scheduling_unclip, "randn_tensor", lambda *_, z=noise[1 + k], **__: there(z)
            )
            done = theirs.step(there(out), steps[k], there(x), prev_timestep=steps[k + 1])
            clipped.append((done.pred_original_sample.abs() == limit).float().mean())
            pairs.append((here(done.prev_sample), after[k]))
    assert 0.001 < np.mean(clipped) < 0.5  # the clamp was met, and did not hide the rest
    part = f"scheduler: one ancestral step, predicts {output}, {variance}, clamp {limit:g}"
    if tables == "float64":
        parity(part, "diffusers UnCLIPScheduler", worst(pairs), BOUND)
    else:
        parity(
            f"{part}, relative to the clamp",
            "diffusers UnCLIPScheduler, its float32 tables",
            worst(pairs) / limit,
            1e-3,
        )


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps(parity, eta, spacing):
    """diffusers' DDIM takes t - 1000 / n for the step below, so n divides 1000 here."""
    theirs = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing=spacing,
    )
    in_float64(theirs)
    pairs = []
    for n in (10, 25, 50):
        theirs.set_timesteps(n)
        noise = normal(n, 1)
        s = FULL.respace(timesteps=theirs.timesteps.tolist())
        seen, x_0 = ours(
            s, network("eps"), noise, sampler="ddim", eta=eta, parametrisation="eps", clip=1.0
        )
        after = [x for _, x, _ in seen[1:]] + [x_0]
        for k, (t, x, out) in enumerate(seen):
            # Ours always derives eps again from the clamped x_0, as GLIDE does.
            done = theirs.step(
                there(out),
                int(t),
                there(x),
                eta=eta,
                use_clipped_model_output=True,
                variance_noise=there(noise[1 + k]) if eta else None,
            )
            pairs.append((here(done.prev_sample), after[k]))
    parity(
        f"scheduler: one DDIM step, eta {eta:g}, {spacing} timesteps",
        "diffusers DDIMScheduler",
        worst(pairs),
        BOUND,
    )


# ============================================================================ whole trajectories


def dpm(order, timesteps):
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        prediction_type="sample",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(timesteps=timesteps)
    return theirs


@pytest.mark.parametrize("n", [7, 25])
def test_dpm_solver(parity, n):
    """The whole trajectory on its own, with the same denoiser, up to the last step but one.

    There diffusers extrapolates from the step before and we do not (the step into the first
    timestep is too long for that); it is compared with diffusers' first-order step. Both end with
    the predicted x_0.
    """
    s = FULL.respace(n)
    noise = normal(n, 2)
    seen, x_0 = ours(s, network("x0"), noise, sampler="dpm++2m", parametrisation="x0")
    theirs, x = dpm(2, s.timesteps[::-1].tolist()), there(noise[0])
    pairs = []
    for k, (t, mine, _) in enumerate(seen[:-1]):
        pairs.append((here(x), mine))
        out = np.asarray(known_x0(jnp.asarray(here(x)), jnp.full(SHAPE[0], int(t)), 1.0))
        x = theirs.step(there(out), theirs.timesteps[k], x).prev_sample
    first_order = dpm(1, s.timesteps[::-1].tolist())
    for k in (n - 2, n - 1):
        _, mine, out = seen[k]
        done = first_order.step(there(out), first_order.timesteps[k], there(mine)).prev_sample
        pairs.append((here(done), x_0 if k == n - 1 else seen[k + 1][1]))
    parity(
        f"scheduler: DPM-Solver++(2M), trajectory of {n} steps",
        "diffusers DPMSolverMultistepScheduler",
        worst(pairs),
        BOUND,
    )


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)], ids=str)
def test_trajectories(parity, monkeypatch, sampler, eta):
    """25 steps, each library left to itself with the same denoiser, which predicts x_0."""
    noise = normal(25, 3)
    common = {"clip_sample": True, "clip_sample_range": 1.0, "prediction_type": "sample"}
    if sampler == "ddpm":
        theirs = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", **common)
        name, options = "UnCLIPScheduler", {}
    else:
        theirs = diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **common
        )
        name, options = "DDIMScheduler", {"eta": eta, "use_clipped_model_output": True}
    in_float64(theirs).set_timesteps(25)
    s = FULL.respace(timesteps=theirs.timesteps.tolist())
    _, x_0 = ours(s, network("x0"), noise, sampler=sampler, eta=eta, parametrisation="x0", clip=1.0)
    x, steps = there(noise[0]), [*theirs.timesteps.tolist(), None]
    for k, t in enumerate(steps[:-1]):
        out = there(known_x0(jnp.asarray(here(x)), jnp.full(SHAPE[0], t), 1.0))
        monkeypatch.setattr(
            scheduling_unclip, "randn_tensor", lambda *_, z=noise[1 + k], **__: there(z)
        )
        if sampler == "ddpm":
            options = {"prev_timestep": steps[k + 1]}
        elif eta:
            options["variance_noise"] = there(noise[1 + k])
        x = theirs.step(out, t, x, **options).prev_sample
    parity(
        f"scheduler: {sampler} trajectory of 25 steps, eta {eta:g}",
        f"diffusers {name}",
        worst([(here(x), x_0)]),
        BOUND,
    )


def along(theirs, s, *, twice=False):
    """A scheduler set to our timesteps, its sigmas in float64."""
    t, sigmas = s.timesteps[::-1].copy(), s.signal_to_noise[::-1] ** -0.5
    theirs.set_timesteps(len(s))
    if twice:
        t, sigmas = (
            np.append(t[:1], np.repeat(t[1:], 2)),
            np.append(sigmas[:1], sigmas[1:].repeat(2)),
        )
    theirs.timesteps = torch.from_numpy(t.astype(np.float64))
    theirs.sigmas = torch.from_numpy(np.append(sigmas, 0.0))
    return theirs


MULTISTEP = {"solver_order": 2, "final_sigmas_type": "zero"}
PEERS = {  # sampler: (its scheduler, what it is made with, which variable it walks in)
    "euler": ("EulerDiscreteScheduler", {}, "scaled"),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}, "scaled"),
    "heun": ("HeunDiscreteScheduler", {}, "scaled"),
    "dpm++2m-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", **MULTISTEP},
        "plain",
    ),
    "dpm++3m-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", **MULTISTEP, "solver_order": 3},
        "plain",
    ),
    "unipc": ("UniPCMultistepScheduler", MULTISTEP, "plain"),
}


@pytest.mark.parametrize("sampler", PEERS)
def test_trajectories_of_the_faster_ones(parity, monkeypatch, sampler):
    """The whole way from sigma = 80, each library by itself with the same denoiser of eps.

    At the step into the first timestep ours are of first order and theirs are not, so the way is
    compared until there. 3M SDE has eta 0: at 1 diffusers' third order has a sign that keeps its
    second difference from vanishing with the step, which k-diffusion's and ours have not.
    """
    name, options, variable = PEERS[sampler]
    s = FULL.respace(timesteps=FULL.respace(26, "karras").timesteps[:-1])
    theirs = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", **options)
    along(theirs, s, twice=sampler == "heun")
    eta = 0.0 if sampler == "dpm++3m-sde" else None
    noise = normal(25, 5)
    seen, x_0 = ours(s, network("eps"), noise, sampler=sampler, eta=eta, parametrisation="eps")
    start = noise[0] / (s.alpha_bar[-1] ** 0.5 if variable == "scaled" else 1)
    x, pairs = there(start.astype(np.float64)), []
    for k, t in enumerate(theirs.timesteps):
        shown = theirs.scale_model_input(x, t)
        if k < len(seen):
            pairs.append((here(shown), seen[k][1]))
        out = network("eps")(jnp.float32(here(shown)), jnp.full(SHAPE[0], int(t)))
        drawn = there(noise[1 + min(k, 24)]).double()
        for module in ("euler_ancestral_discrete", "dpmsolver_multistep"):
            monkeypatch.setattr(
                f"diffusers.schedulers.scheduling_{module}.randn_tensor",
                lambda *_, z=drawn, **__: z,
            )
        x = theirs.step(there(out).double(), t, x).prev_sample
    if variable == "scaled":
        pairs.append((here(x), x_0))
    else:
        pairs = pairs[:-1]
    how = "" if eta is None else f", eta {eta:g}"
    parity(
        f"scheduler: {sampler} trajectory of 25 steps by Karras{how}",
        f"diffusers {name}",
        worst(pairs),
        BOUND,
    )
