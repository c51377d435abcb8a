"""What holds for every stage: a sample's loss is its own, wherever its row is and beside whom."""

import jax
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.tasks import base, keys

DROPOUT = dict(channels=8, multipliers=(1,), blocks=1, head_dim=8, groups=4, time_dim=16)
DROPOUT |= dict(attention=(False,), dropout=0.5)
STAGES = [
    ("prior", ""),
    ("prior", "ar"),
    ("decoder", ""),
    ("upsampler", ""),
    ("upsampler", "dropout"),
]


@pytest.fixture(scope="module", params=STAGES, ids=lambda p: "-".join(filter(None, p)))
def stage(request, made, batch_of):
    name, kind = request.param
    # The autoregressive loss draws nothing but which captions are dropped: often, to be seen.
    settings = {"text_drop": 0.5} if kind == "ar" else {}
    if kind == "dropout":
        task, params, frozen = made(name, arch=DROPOUT)
    else:
        task, params, frozen = made(name, kind, **settings)
    loss = jax.jit(lambda b: task.loss(params, frozen, b, jax.random.key(6), train=True))
    return task, batch_of(task, 6), loss


def test_rows_may_change_places(stage):
    _, batch, loss = stage
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = {name: value[order] for name, value in batch.items()}
    want, got = loss(batch), loss(moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    renumbered = moved | {"sample": batch["sample"]}
    assert abs(float(loss(renumbered)[0]) / float(want[0]) - 1) > 1e-4


@pytest.mark.slow
def test_dropout_belongs_to_the_sample(made, batch_of):
    """Gradients of a batch, of its slices and of its rows in another order are the same."""
    task, params, frozen = made("upsampler", arch=DROPOUT)
    batch = batch_of(task, 6)
    gradient = jax.jit(
        lambda b, accumulate: task.value_and_grad(params, frozen, b, jax.random.key(6), accumulate)[
            1
        ],
        static_argnums=1,
    )
    whole = jax.device_get(gradient(batch, 1))
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = {name: value[order] for name, value in batch.items()}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, jax.device_get(gradient(moved, 1)), whole)
    jax.tree.map(close, jax.device_get(gradient(batch, 3)), whole)
    kernel = lambda tree: tree["unet"]["mid"]["res_0"]["conv_1"]["kernel"]
    other = jax.device_get(gradient(batch | {"sample": batch["sample"] + np.uint32([0, 9])}, 1))
    assert np.abs(kernel(other) - kernel(whole)).max() > 0.1 * np.abs(kernel(whole)).max()


def test_padding_changes_nothing(stage):
    """The loss and every metric are means over the valid rows alone."""
    _, batch, loss = stage
    valid = np.array([True, True, False, True, False, True])
    garbage = {k: v.copy() for k, v in batch.items()} | {"valid": valid}
    for name in ("image", "low", "clip_image"):
        if name in garbage:
            garbage[name][~valid] = 255 - garbage[name][~valid]
    garbage["sample"][~valid] += 17
    want = loss(batch | {"valid": valid})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loss(garbage), want)
    one_by_one = [loss(batch | {"valid": np.arange(6) == row}) for row in np.flatnonzero(valid)]
    for name, value in want[1].items():
        mean = np.mean([float(metrics[name]) for _, metrics in one_by_one])
        assert float(value) == pytest.approx(mean, rel=1e-5), name


def test_a_sample_of_a_later_epoch_is_another(stage):
    """Both words of the sample number count."""
    _, batch, loss = stage
    numbers = [batch["sample"] + np.uint32([epoch, 0]) for epoch in range(4)]
    values = [float(loss(batch | {"sample": sample})[0]) for sample in numbers]
    assert np.ptp(values) > 1e-4 * abs(values[0])


def test_no_valid_row_gives_zero(stage):
    _, batch, loss = stage
    value, _ = loss(batch | {"valid": np.zeros(6, bool)})
    assert float(value) == 0.0


def test_spec_and_zeros_agree(stage):
    task, batch, _ = stage
    spec = task.batch_spec(6)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in spec.items()
    }
    assert {k: v.shape for k, v in base.zeros(spec).items()} == {
        k: v.shape for k, v in spec.items()
    }


def test_draws_belong_to_the_sample_number():
    sample = np.array([[0, 5], [1, 5], [0, 6], [0, 5]], np.uint32)
    key = keys.sample_keys(jax.random.key(0), sample)
    noise = np.asarray(keys.normal(key, (3,), 1))
    np.testing.assert_array_equal(noise[0], noise[3])
    assert len({tuple(row) for row in noise}) == 3
    alone = keys.normal(keys.sample_keys(jax.random.key(0), sample[1:2]), (3,), 1)
    np.testing.assert_array_equal(alone[0], noise[1])
    assert not np.allclose(noise, keys.normal(key, (3,), 2))
    assert not np.allclose(noise, keys.normal(keys.fold(key, 1), (3,), 1))


@pytest.mark.parametrize(
    ("stage_name", "settings", "said"),
    [
        ("decodr", {}, "unknown stage 'decodr': did you mean 'decoder'"),
        ("clip", {"los": "softmax"}, "unknown clip setting 'los': did you mean 'loss'"),
        ("clip", {"kind": "diffusion"}, "unknown clip setting 'kind'"),
        ("prior", {"kind": "difusion"}, "unknown prior kind 'difusion': did you mean 'diffusion'"),
        ("prior", {"kind": "ar", "clamp": 1.0}, "unknown prior setting 'clamp'"),
        ("decoder", {"varience": 1}, "unknown decoder setting 'varience': did you mean 'variance'"),
        ("upsampler", {"image_size": 8, "noise": "cosin"}, "'cosin': did you mean 'cosine'"),
    ],
)
def test_unknown_names(made, stage_name, settings, said):
    with pytest.raises(errors.ConfigError) as caught:
        if stage_name in tasks.STAGES:
            kind = settings.get("kind", "") if stage_name == "prior" else ""
            if kind == "difusion" or stage_name == "clip":
                tasks.make(stage_name, made("clip")[0].model.__dict__, settings)
            rest = {k: v for k, v in settings.items() if k != "kind"}
            made(stage_name, kind, **rest)
        tasks.make(stage_name, {}, settings)
    assert said in str(caught.value)


def test_arguments_of_a_stored_architecture():
    got = tasks.arguments(
        {"class": "Decoder", "multipliers": [1, 2], "remat": "", "dtype": "bfloat16", "blocks": 2}
    )
    assert got == {"multipliers": (1, 2), "remat": None, "dtype": np.dtype("bfloat16"), "blocks": 2}


def test_a_field_the_model_lacks_is_a_config_error():
    with pytest.raises(errors.ConfigError, match=r"clip: .*'widht'"):
        tasks.make("clip", {"widht": 3}, {})
