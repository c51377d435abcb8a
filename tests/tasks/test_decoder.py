"""The decoder's and the upsamplers' tasks: losses, condition dropout, drawing."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.diffusion import gaussian, guidance, samplers
from unclip.tasks import keys
from unclip.tasks.arrays import to_float


class Spy:
    """A network that says nothing and remembers what it was given."""

    def __init__(self, channels=6):
        self.seen, self.channels = {}, channels

    def apply(self, variables, x_t, t, *rest, **conditions):
        self.seen = conditions | {"x_t": x_t, "t": t, "rest": rest}
        return jnp.zeros((*x_t.shape[:-1], self.channels))


def spied(task, params, frozen, batch, *, train, channels=6):
    """(loss, metrics, what the network was given) of a task with its network replaced."""
    spy, task = Spy(channels), copy.copy(task)
    spy.use_z_i = getattr(task.model, "use_z_i", False)
    object.__setattr__(task, "model", spy)

    @jax.jit
    def run(frozen, batch):
        loss, metrics = task.loss(params, frozen, batch, jax.random.key(2), train=train)
        return loss, metrics, {k: v for k, v in task.model.seen.items() if k not in OPTIONS}

    return jax.device_get(run(frozen, batch))


OPTIONS = ("dropout_keys", "rngs", "rest")


def given(batch, z_i):
    return {"z_i": z_i, "tokens": batch["tokens"], "text_mask": batch["text_mask"]}


@pytest.fixture(scope="module")
def drawing(made, batch_of):
    task, params, frozen = made("decoder", draw={"steps": 2, "sampler": "ddim"})
    batch = batch_of(task, 3)
    z_i = task.embed(frozen, batch)
    sample_keys = keys.sample_keys(jax.random.key(9), batch["sample"])
    run = jax.jit(
        lambda scale: task.sample(
            params, frozen, given(batch, z_i), sample_keys, draw={"guidance": scale}
        )
    )
    return task, params, frozen, batch, z_i, sample_keys, run


def test_conditions_are_dropped_separately(made, batch_of):
    """10 % without picture, 50 % without caption, independent of one another (section 2.1)."""
    task, params, frozen = made("decoder", variance="learned_range", image_size=1)
    task = dataclasses.replace(task, stored=True)
    rows = 4096
    batch = batch_of(task, rows)
    _, _, seen = spied(task, params, frozen, batch, train=True)
    image, text = seen["drop_image"], seen["drop_text"]
    for got, want in ((image, 0.1), (text, 0.5), (image & text, 0.05)):
        assert abs(got.mean() - want) < 4 * np.sqrt(want * (1 - want) / rows)
    t = seen["t"]
    assert t.min() < 20 and t.max() > 980 and abs(t.mean() - 499.5) < 4 * 289 / np.sqrt(rows)
    _, _, seen = spied(task, params, frozen, batch, train=False)
    assert not np.any(seen["drop_image"]) and not np.any(seen["drop_text"])


def test_a_dropped_caption_is_the_empty_one(made, batch_of, clip_params):
    task, _, frozen = made("decoder")
    batch = batch_of(task, 3)
    drop = np.array([True, False, True])
    got = jax.jit(task.text)(frozen, batch["tokens"], batch["text_mask"], drop)
    empty, empty_mask = task.clip.empty(1, 8)
    text = jax.jit(task.clip.text)
    z_t, hidden = text(clip_params, empty)
    for row in (0, 2):
        np.testing.assert_array_equal(got["tokens"][row], empty[0])
        np.testing.assert_array_equal(got["text_mask"][row], empty_mask[0])
        np.testing.assert_allclose(got["z_t"][row], z_t[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["text_hidden"][row], hidden[0], rtol=1e-5, atol=1e-6)
    kept = text(clip_params, batch["tokens"])[0][1]
    np.testing.assert_allclose(got["z_t"][1], kept, rtol=1e-5, atol=1e-6)


def test_l_simple_of_a_silent_network_is_the_noise(made, batch_of):
    """eps predicted as zero costs the mean square of eps, whatever the picture."""
    task, params, frozen = made("decoder", variance="fixed_small")
    batch = batch_of(task, 5)
    loss, metrics, seen = spied(task, params, frozen, batch, train=True, channels=3)
    x_t, t = np.float64(seen["x_t"]), seen["t"]
    alpha_bar = np.float64(task.schedule.alpha_bar)[t][:, None, None, None]
    x_0 = np.float64(batch["image"]) / 127.5 - 1
    eps = (x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)
    assert float(loss) == pytest.approx((eps**2).mean(), rel=1e-3)
    assert "vlb" not in metrics and 0.7 < (eps**2).mean() < 1.3


def test_the_hybrid_adds_the_bound(made, batch_of):
    task, params, frozen = made("decoder", vlb_weight=3.0)
    loss, metrics, _ = spied(task, params, frozen, batch_of(task, 4), train=True)
    assert float(loss) == pytest.approx(metrics["mse"] + 3 * metrics["vlb"], rel=1e-5)
    assert metrics["vlb"] > 0


def test_min_snr_zero_is_off(made, batch_of):
    """gamma = 5 weighs steps of little noise down (arXiv 2303.09556); 0 weighs none."""
    mse = {}
    for gamma in (0.0, 5.0):
        task, params, frozen = made("upsampler", min_snr=gamma)
        batch = batch_of(task, 16)
        mse[gamma], _, seen = spied(task, params, frozen, batch, train=True, channels=3)
    x_0, t = np.float64(batch["image"]) / 127.5 - 1, seen["t"]
    alpha_bar = np.float64(task.schedule.alpha_bar)[t]
    root = lambda a: np.sqrt(a)[:, None, None, None]
    eps = (np.float64(seen["x_t"]) - root(alpha_bar) * x_0) / root(1 - alpha_bar)
    each = (eps**2).mean((1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    assert float(mse[0.0]) == pytest.approx(each.mean(), rel=1e-3)
    assert float(mse[5.0]) == pytest.approx((np.minimum(snr, 5) / snr * each).mean(), rel=1e-3)


@pytest.mark.slow
def test_guidance_one_is_the_conditional_model_alone(drawing):
    task, params, frozen, batch, z_i, sample_keys, run = drawing
    tokens, mask = batch["tokens"], batch["text_mask"]

    @jax.jit
    def conditional():
        text = task.text(frozen, tokens, mask, jnp.zeros(3, bool))
        respaced = task.schedule.respace(2)
        denoise = gaussian.make_denoise(
            lambda x, t: task.model.apply({"params": params}, x, t, z_i=z_i, **text),
            respaced,
            parametrisation="eps",
            variance="learned_range",
            clip=guidance.static_threshold(),
        )
        x_T = samplers.draw_noise(sample_keys, (4, 4, 3))
        return samplers.sample(denoise, respaced, x_T, sample_keys, sampler="ddim")

    want = np.clip(conditional(), -1, 1)
    np.testing.assert_allclose(run(1.0), want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(4.0), want, atol=1e-2)


def test_the_picture_depends_on_both_conditions(drawing):
    task, params, frozen, batch, z_i, sample_keys, run = drawing
    draw = jax.jit(
        lambda z, tokens, mask: task.sample(
            params,
            frozen,
            {"z_i": z, "tokens": tokens, "text_mask": mask},
            sample_keys,
            draw={"guidance": 1.0},
        )
    )
    base = np.asarray(run(1.0))
    assert not np.allclose(draw(z_i[::-1], batch["tokens"], batch["text_mask"]), base, atol=1e-3)
    other = draw(z_i, batch["tokens"][::-1], batch["text_mask"][::-1])
    assert not np.allclose(other, base, atol=1e-3)


def test_guidance_leads_away_from_a_negative_caption_and_embedding(drawing):
    """In place of the dropped conditions, each by itself."""
    task, params, frozen, batch, z_i, sample_keys, run = drawing
    plain = given(batch, z_i)
    draw = jax.jit(
        lambda conditions, scale: task.sample(
            params, frozen, conditions, sample_keys, draw={"guidance": scale}
        )
    )
    unguided, usual = run(1.0), np.asarray(run(3.0))
    caption = {"negative_tokens": batch["tokens"], "negative_text_mask": batch["text_mask"]}
    # Where guidance comes from and goes to are the same, there is none.
    same = draw(plain | caption | {"negative_z_i": z_i}, 3.0)
    np.testing.assert_allclose(same, unguided, atol=1e-4)
    other = {name: rows[::-1] for name, rows in caption.items()}
    away = draw(plain | other | {"negative_z_i": z_i}, 3.0)
    assert np.abs(away - same).max() > 1e-3
    np.testing.assert_allclose(
        draw(plain | other | {"negative_z_i": z_i}, 1.0), unguided, atol=1e-5
    )
    # One alone: the other condition is dropped, as it is without a negative one.
    text_alone = draw(plain | caption, 3.0)
    assert np.abs(text_alone - usual).max() > 1e-3 and np.abs(text_alone - same).max() > 1e-3


def test_guidance_off_outside_its_interval(drawing):
    task, params, frozen, batch, z_i, sample_keys, run = drawing
    draw = jax.jit(
        lambda **draw: task.sample(params, frozen, given(batch, z_i), sample_keys, draw=draw)
    )
    off = {"guidance_rescale": 0.5}
    whole = draw(guidance=4.0, guidance_low=0.0, guidance_high=1.0, guidance_rescale=0.0)
    np.testing.assert_allclose(whole, run(4.0), atol=1e-6)
    # Its steps are at 0 and at 999.
    none = draw(guidance=4.0, guidance_low=0.4, guidance_high=0.6, **off)
    np.testing.assert_allclose(none, run(1.0), atol=1e-6)
    for low, high in ((0.5, 1.0), (0.0, 0.5)):
        half = draw(guidance=4.0, guidance_low=low, guidance_high=high, **off)
        assert np.abs(half - run(4.0)).max() > 1e-3 and np.abs(half - run(1.0)).max() > 1e-3
    assert draw._cache_size() == 1


def test_inversion_tells_how_near_its_draw_comes(made, with_model, batch_of):
    """x_T leads back to the pictures, and the error is that of the draw."""
    task, params, _ = made("upsampler")

    class Known:
        """The eps of pictures that are N(0, 1/4), as a trained network would have it."""

        def apply(self, variables, x_t, t, low):
            a = gaussian.expand(task.schedule.at(task.schedule.alpha_bar, t), x_t)
            return jnp.sqrt(1 - a) / (a / 4 + 1 - a) * x_t

    task = with_model(task, Known())
    batch = batch_of(task, 3)
    low, x_0 = {"low": to_float(batch["low"])}, 0.9 * to_float(batch["image"])
    sample_keys = keys.sample_keys(jax.random.key(0), batch["sample"])
    settings, worst = {"steps": 20}, {}
    for iterations in (1, 6):
        x_T, error = jax.jit(
            lambda x_0, n=iterations: task.invert(
                params, None, low, x_0, sample_keys, draw=settings, iterations=n
            )
        )(x_0)
        back = task.sample(params, None, low, sample_keys, draw=settings, x_T=x_T)
        want = np.sqrt(np.mean((np.asarray(back) - x_0) ** 2, axis=(1, 2, 3)))
        np.testing.assert_allclose(error, want, atol=1e-5)
        worst[iterations] = error.max()
    assert worst[6] < 0.005 < worst[1] < 0.1


def test_a_task_fills_holes(made, batch_of):
    task, params, _ = made("upsampler", draw={"steps": 3})
    batch = batch_of(task, 2)
    sample_keys = keys.sample_keys(jax.random.key(0), batch["sample"])
    known, low = to_float(batch["image"]), to_float(batch["low"])
    mask = np.zeros((2, 8, 8, 1), np.float32)
    mask[:, :4] = 1.0
    filled = jax.jit(
        lambda known: task.inpaint(
            params, None, {"low": low}, sample_keys, known, mask, jump_length=1, resamples=2
        )
    )(known)
    np.testing.assert_array_equal(filled[:, 4:], known[:, 4:])
    assert np.abs(filled[:, :4] - known[:, :4]).max() > 0.1 and np.abs(filled).max() <= 1


def test_a_sampler_brings_its_own_eta(made):
    """Unless one is asked for; the task's own is meant for the task's own sampler."""
    task, _, _ = made("decoder", draw={"sampler": "ddim", "eta": 0.3})
    assert task.checked_draw({})["eta"] == 0.3
    assert task.checked_draw({"sampler": "ddim"})["eta"] == 0.3
    assert task.checked_draw({"sampler": "dpm++2m"})["eta"] == 0.0
    assert task.checked_draw({"sampler": "euler-ancestral"})["eta"] == 1.0
    assert task.checked_draw({"sampler": "euler-ancestral", "eta": 0.5})["eta"] == 0.5
    assert made("decoder", draw={"sampler": "dpm++2m-sde"})[0].draw["eta"] == 1.0


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        ({"guidance_low": -0.1}, "guidance_low -0.1: expected 0 to 1"),
        ({"guidance_rescale": 1.5, "guidance_high": "x"}, "guidance_high 'x': .*guidance_rescale"),
        (
            {"guidance_low": 0.8, "guidance_high": 0.2},
            r"guidance_low 0\.8 is above guidance_high 0\.2",
        ),
        ({"spacing": "karras", "steps": 400}, "at most 142 steps"),
    ],
)
def test_settings_of_guidance_out_of_range(made, draw, said):
    with pytest.raises(errors.ConfigError, match=said):
        made("decoder")[0].checked_draw(draw)


def test_mistakes_in_a_draw_are_told_together(made):
    """When the task is made, and when it is asked to draw with other settings."""
    task, _, _ = made("decoder")
    wrong = {"threshold": "statik", "sampler": "dimm", "steps": 0, "gidance": 1.0}
    for attempt in (lambda: task.checked_draw(wrong), lambda: made("decoder", draw=wrong)):
        with pytest.raises(errors.ConfigError) as caught:
            attempt()
        said = str(caught.value)
        assert "'statik': did you mean 'static'" in said and "'dimm': did you mean 'ddim'" in said
        assert "did you mean 'guidance'" in said and "steps" in said and "\n" not in said
    with pytest.raises(errors.ConfigError, match=r"only 'ddim', .* have an eta"):
        task.checked_draw({"eta": 0.5})
    with pytest.raises(errors.ConfigError, match="guidance nan: expected a finite number"):
        task.checked_draw({"guidance": float("nan")})
    assert task.checked_draw({"steps": 3})["steps"] == 3 and task.draw["steps"] == 25


def test_a_decoder_of_text_embeddings_sees_no_picture(made, batch_of):
    task, params, frozen = made("decoder", embedding="text")
    assert "clip_image" not in task.batch_spec(2) and "z_i" not in task.batch_spec(2)
    batch = batch_of(task, 3)
    _, _, seen = spied(task, params, frozen, batch, train=True)
    z_t = task.clip.text(frozen["clip"], batch["tokens"])[0]
    np.testing.assert_allclose(seen["z_i"], z_t, rtol=1e-5)
    with pytest.raises(errors.ConfigError, match="unknown embedding 'picture'"):
        made("decoder", embedding="picture")


def test_z_scale_normalises(made):
    task, _, _ = made("decoder", z_scale=2.0)
    z_i = np.float32(np.random.default_rng(0).standard_normal((3, 8)))
    np.testing.assert_allclose(np.linalg.norm(task.scaled(z_i), axis=-1), 2.0, rtol=1e-5)
    assert made("decoder")[0].scaled(z_i) is z_i


def test_upsampling_starts_from_the_small_picture(made, batch_of):
    task, params, _ = made("upsampler", draw={"steps": 2})
    batch = batch_of(task, 2)
    sample_keys = keys.sample_keys(jax.random.key(0), batch["sample"])
    draw = jax.jit(lambda low: task.sample(params, None, {"low": low}, sample_keys))
    pictures = draw(to_float(batch["low"]))
    assert pictures.shape == (2, 8, 8, 3) and np.abs(pictures).max() <= 1
    assert not np.allclose(pictures, draw(-to_float(batch["low"])), atol=1e-3)
    # Fully convolutional: a task trained on crops draws pictures of any size.
    low = {"low": jnp.zeros((2, 6, 5, 3))}
    other = jax.eval_shape(task.sample, params, None, low, sample_keys)
    assert other.shape == (2, 12, 10, 3)


# ============================================================ decoders without CLIP

BARE = dict(
    channels=8,
    multipliers=(1,),
    blocks=1,
    head_dim=8,
    groups=4,
    time_dim=16,
    attention=(True,),
    context_dim=8,
    use_z_i=False,
    use_z_t=False,
)
OWN_TEXT = BARE | dict(text_layers=1, text_heads=2, text_context=6, vocab=40)
T5 = dict(vocab_size=30, width=12, layers=1, heads=2, head_dim=4, mlp_width=8)
READS_T5 = BARE | dict(text_context=7)


def test_a_decoder_with_its_own_text_encoder_needs_no_clip():
    """GLIDE: captions in CLIP's tokens, nothing frozen, no picture for CLIP in the batch."""
    assert tasks.needs("decoder", OWN_TEXT, {}) == ()
    task = tasks.make("decoder", OWN_TEXT, {"image_size": 4})
    assert task.frozen() is None and task.context == 6
    assert set(task.batch_spec(2)) == {"image", "tokens", "text_mask", "sample", "valid"}
    tokens, mask = task.empty(2)
    assert tokens.tolist() == [[38, 39, 0, 0, 0, 0]] * 2 and mask.sum(1).tolist() == [2, 2]
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert set(params["text_proj"]) == {"text", "caption_time"}
    keys_of = jax.random.split(jax.random.key(0), 2)
    captions = {"tokens": tokens, "text_mask": mask}
    drawn = jax.eval_shape(task.sample, params, None, captions, keys_of)
    assert drawn.shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({}, ("clip",)),
        ({"use_z_t": False}, ("clip",)),
        ({"use_z_i": False, "use_text_tokens": False}, ("clip",)),
        ({"use_z_i": False, "use_z_t": False, "use_text_tokens": False}, ()),
    ],
)
def test_what_is_read_through_clip(change, needs):
    arch = {name: value for name, value in BARE.items() if not name.startswith("use")} | change
    assert tasks.needs("decoder", arch, {"text_encoder": ""}) == needs
    if needs:
        with pytest.raises(errors.ConfigError, match="through a clip part"):
            tasks.make("decoder", arch, {})


@pytest.mark.parametrize("learned", [False, True])
def test_captions_through_t5(learned, batch_of):
    """Dropped ones are the end of sequence alone, or the learned null where there is one."""
    settings = {"image_size": 4, "text_encoder": "t5", "text_drop": 0.5}
    arch = READS_T5 | dict(learned_null_text=learned, pool_text=True)
    assert tasks.needs("decoder", arch, settings) == ("t5",)
    with pytest.raises(errors.ConfigError, match="through a t5 part"):
        tasks.make("decoder", arch, settings)
    t5_params = jax.eval_shape(
        tasks.make("decoder", arch, settings, t5=T5).t5.init, jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    t5_params = jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), t5_params)
    task = tasks.make("decoder", arch, settings, t5=T5, weights={"t5": t5_params})
    assert task.context == 7
    batch = batch_of(task, 16)
    batch["tokens"] = np.where(batch["text_mask"], batch["tokens"] % 28 + 2, 0)
    frozen = task.frozen()
    _, _, seen = spied(task, None, frozen, batch, train=True)
    assert seen["z_i"] is None and seen["z_t"] is None
    whole = lambda tokens, mask: np.asarray(task.t5.text(t5_params, tokens, mask))
    kept = seen["tokens"][:, 0] != 1
    assert 2 < kept.sum() < 14
    np.testing.assert_array_equal(seen["tokens"][kept], batch["tokens"][kept])
    np.testing.assert_array_equal(seen["tokens"][~kept], [[1, 0, 0, 0, 0, 0, 0]] * (~kept).sum())
    np.testing.assert_array_equal(seen["text_mask"][~kept].sum(1), 1)
    np.testing.assert_allclose(
        seen["text_hidden"], whole(seen["tokens"], seen["text_mask"]), atol=1e-5
    )
    if learned:
        np.testing.assert_array_equal(seen["drop_text"], ~kept)
    else:
        assert seen["drop_text"] is None
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["text_proj"]["text_tokens"]["kernel"].shape == (12, 8)


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"use_z_t": True}, {"text_encoder": "t5"}, "gives hidden states and no z_t"),
        ({"text_layers": 1}, {"text_encoder": "t5"}, "expected arch.text_layers=0"),
        ({}, {"text_encoder": "t6"}, "unknown text encoder 't6': did you mean 't5'"),
        ({"use_z": True}, {}, "decoder: .*'use_z'"),
    ],
)
def test_contradictions_are_named(change, settings, said):
    with pytest.raises(errors.ConfigError, match=said):
        tasks.needs("decoder", READS_T5 | change, settings)


def test_timesteps_of_a_net_for_the_last_step(made, batch_of):
    """t_below=1 trains on t = 0 alone, as Karlo's second network is used."""
    for below, furthest in ((1, 0), (10, 9)):
        task, params, frozen = made("upsampler", t_below=below)
        _, _, seen = spied(task, params, frozen, batch_of(task, 64), train=True, channels=3)
        assert seen["t"].min() == 0 and seen["t"].max() == furthest


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        ({"guidance": "8"}, "decoder: guidance '8': expected a finite number"),
        ({"guidance": None, "eta": float("nan")}, "guidance None: .*; decoder: eta nan: expected"),
        ({"spacing": 5}, "spacing 5 has 5 steps: expected as many as steps=25"),
        ({"spacing": "10,x"}, "unknown spacing '10,x'"),
        ({"steps": 0, "sampler": "eular"}, "sampling steps 0: .*; unknown sampler 'eular'"),
    ],
)
def test_what_no_draw_has_is_told_at_once(made, draw, said):
    task, _, _ = made("decoder")
    with pytest.raises(errors.ConfigError, match=said):
        task.checked_draw(draw)
