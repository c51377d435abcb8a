"""CLIP's task: both losses against float64 NumPy, padding, exact accumulation, the frozen CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip import errors, tasks
from unclip.models import clip as clip_model
from unclip.tasks import clip as clip_task


def softmax_oracle(logits):
    def cross(matrix):
        top = matrix.max(axis=1)
        return top + np.log(np.exp(matrix - top[:, None]).sum(axis=1)) - np.diag(matrix)

    return (cross(logits) + cross(logits.T)) / 2


def sigmoid_oracle(logits):
    sign = 2 * np.eye(len(logits)) - 1
    return np.log1p(np.exp(-sign * logits)).sum(axis=1)


ORACLES = {"softmax": softmax_oracle, "sigmoid": sigmoid_oracle}


@pytest.fixture(scope="module", params=ORACLES)
def stage(request, made, batch_of):
    name = request.param
    arch = dict(made("clip")[0].model.__dict__)
    arch = {k: arch[k] for k in clip_model.PRESETS["emoji"] if k in arch} | {
        "vocab_size": 40,
        "logit_bias": name == "sigmoid",
    }
    task, params, _ = made("clip", arch=arch, loss=name)
    # Fresh scale and bias: scrambling moved them, but not to where saturation hides mistakes.
    gradient = jax.jit(
        jax.value_and_grad(
            lambda p, b: task.loss(p, None, b, jax.random.key(0), train=True), has_aux=True
        )
    )
    return name, task, params, batch_of(task, 8), gradient


@pytest.mark.parametrize("name", ORACLES)
def test_losses_of_a_matrix(name):
    logits = np.random.default_rng(0).standard_normal((7, 7)) * 5
    function = getattr(clip_task, f"{name}_loss")
    got = function(jnp.float32(logits), jnp.ones(7, bool))
    np.testing.assert_allclose(got, ORACLES[name](logits), rtol=1e-5)


def test_loss_and_metrics_of_a_batch(stage):
    name, task, params, batch, gradient = stage
    z_i, z_t = (
        np.float64(jax.jit(task.predict()[z])(params, None, batch, None)) for z in ("z_i", "z_t")
    )
    cosine = (z_i / np.linalg.norm(z_i, axis=1)[:, None]) @ (
        z_t / np.linalg.norm(z_t, axis=1)[:, None]
    ).T
    scale = np.exp(np.float64(params["logit_scale"]))
    bias = float(params.get("logit_bias", 0.0))
    (loss, metrics), _ = gradient(params, batch)
    np.testing.assert_allclose(loss, ORACLES[name](cosine * scale + bias).mean(), rtol=1e-4)
    target = np.arange(len(cosine))
    assert float(metrics["image_to_text"]) == pytest.approx((cosine.argmax(1) == target).mean())
    assert float(metrics["text_to_image"]) == pytest.approx((cosine.argmax(0) == target).mean())
    assert float(metrics["temperature"]) == pytest.approx(1 / scale, rel=1e-5)


def test_padding_rows_are_no_negatives(stage):
    _, _, params, batch, gradient = stage
    short = {k: v[:6] for k, v in batch.items()}
    padded = batch | {"valid": np.arange(8) < 6}
    value, grads = gradient(params, short)
    padded_value, padded_grads = gradient(params, padded)
    jax.tree.map(
        # Eight rows are summed in another order than six: up to a leaf's largest number's rounding.
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-6 + 4e-6 * np.abs(b).max()
        ),
        (value, grads),
        (padded_value, padded_grads),
    )
    other = batch | {"valid": padded["valid"], "image": np.array(batch["image"])}
    other["image"][6:] = 255 - other["image"][6:]
    jax.tree.map(  # what stands in them does not matter to the bit
        np.testing.assert_array_equal, gradient(params, other), (padded_value, padded_grads)
    )


def test_a_zero_embedding_has_a_finite_gradient():
    grads = jax.grad(lambda z: clip_task.unit(z).sum())(jnp.zeros((2, 4)))
    assert np.isfinite(grads).all()


def test_accumulation_is_exact(stage):
    """The gradient of the whole batch to rounding, temperature and bias counted once."""
    name, task, params, batch, gradient = stage
    slices = {"softmax": 4, "sigmoid": 2}[name]
    batch = batch | {"valid": np.arange(8) != 5}
    want = gradient(params, batch)
    got = jax.jit(lambda p, b: task.value_and_grad(p, None, b, None, slices))(params, batch)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), got, want
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    parts = [
        gradient(params, {k: v[i::slices] for k, v in batch.items()})[0][0] for i in range(slices)
    ]
    assert abs(np.mean(parts) / float(want[0][0]) - 1) > 1e-2  # the mean is another loss


def test_accumulation_wants_a_divisor(stage):
    _, task, params, batch, _ = stage
    with pytest.raises(errors.ConfigError, match="batch of 8 does not divide into 3"):
        task.value_and_grad(params, None, batch, None, 3)


def test_unknown_loss_names_the_near_one():
    with pytest.raises(errors.ConfigError, match=r"'sofmax': did you mean 'softmax'"):
        clip_task.ClipTask(clip_model.PRESETS["emoji"], objective="sofmax")


def test_a_long_caption_ends_where_clip_does(made, clip_params):
    """A stage with a text transformer of its own hands CLIP captions longer than CLIP reads."""
    frozen = clip_task.FrozenClip(made("clip")[0].model)
    long = np.zeros((3, 12), np.int32)
    long[0, :12] = [38, *range(1, 11), 39]  # past CLIP's 8
    long[1, :4] = [38, 7, 8, 39]
    long[2, :8] = [38, 1, 2, 3, 4, 5, 6, 39]  # exactly CLIP's 8
    cut = long[:, :8].copy()
    cut[0, 7] = 39
    text = jax.jit(frozen.text)
    got = text(clip_params, long)
    for a, b in zip(got, text(clip_params, cut)):
        np.testing.assert_array_equal(a, b)
    assert got[1].shape[1] == 8
    assert not np.allclose(got[0][0], text(clip_params, long[:, :8])[0][0])


def test_the_empty_caption_is_the_tokenizers():
    from unclip.input.decode.text import Tokenizer

    model = clip_model.CLIP(**tasks.arguments(clip_model.PRESETS["emoji"]))
    tokens, mask = clip_task.FrozenClip(model).empty(2, 32)
    want_tokens, want_mask, _ = Tokenizer().encode(["", ""], 32)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_array_equal(mask, want_mask)


@pytest.mark.slow
def test_sam_by_groups_is_sam_on_replicas_that_share_embeddings(made, batch_of):
    """Each group's own point, written out one group after another."""
    task, params, _ = made("clip")
    batch, rho, rows = batch_of(task, 8), 0.1, 2
    got = jax.jit(
        lambda accumulate: task.sharpness_aware(
            params, None, batch, jax.random.key(0), accumulate, rho, rows
        ),
        static_argnums=0,
    )
    groups = [{k: batch[k][i : i + rows] for k in ("image", "tokens")} for i in range(0, 8, rows)]

    @jax.jit
    def loss_at(points):
        z = [task.embed(p, g) for p, g in zip(points, groups)]
        z_i, z_t = (jnp.concatenate(part) for part in zip(*z))
        middle = jax.tree.map(lambda *p: sum(p) / len(p), *points)
        return task.contrast(middle, z_i, z_t, batch["valid"])[0]

    gradients = jax.jit(jax.grad(loss_at))
    alike = [params] * len(groups)
    # A gradient with respect to one replica holds a share of what the temperature has in common.
    own = gradients(alike)
    whole = jax.tree.map(lambda *g: sum(g), *own)
    points = []
    for g in own:
        g = g | {name: whole[name] for name in g if name.startswith("logit_")}
        norm = optax.tree.norm(g)
        points.append(jax.tree.map(lambda p, d, norm=norm: p + rho * d / norm, params, g))
    want = jax.tree.map(lambda *g: sum(g), *gradients(points))
    (loss, _), grads = got(1)
    assert float(loss) == pytest.approx(float(loss_at(alike)), rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, grads, want)
    jax.tree.map(close, got(2)[1], want)


@pytest.mark.slow
def test_sam_with_one_group_is_sam_on_the_batch(made, batch_of):
    task, params, _ = made("clip")
    batch = batch_of(task, 4)
    got = jax.jit(
        lambda rows: task.sharpness_aware(params, None, batch, jax.random.key(0), 1, 0.1, rows)[1],
        static_argnums=0,
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, got(4), got(0))
    with pytest.raises(errors.ConfigError, match="sam_rows=3"):
        got(3)
