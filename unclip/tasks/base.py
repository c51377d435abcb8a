"""What a stage of the cascade must offer so that one loop can train it, and what stages share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import gaussian, guidance, repaint, samplers
from unclip.diffusion.schedule import Schedule
from unclip.input.decode import transforms
from unclip.runtime import optim
from unclip.tasks import keys, timesteps

Tree = Any


class FrozenPart(Protocol):
    """A trained network that a stage reads its conditions through; `cascade.bundle.Part` is one."""

    arch: Mapping[str, Any]
    params: Tree | None
    extra: Mapping[str, Any]


class Task(Protocol):
    """One stage: pure functions of (params, frozen, batch, key); no jit, no sharding, no I/O.

    A frozen dataclass: `dataclasses.replace` gives another one.

    Attributes:
      stage: "clip", "prior", "decoder" or "upsampler".
      network: class of the model that is trained; presets: its architectures by name.
      measures: what the stage can be judged by besides its loss: names of `training.evaluators`.
      model: the network, a linen module.
      draw: the settings of `sample`, complete and checked.
      weights: {name: tree} of what `frozen` gives, as far as it is loaded.
      judge: the CLIP among its frozen parts, which can judge the pictures it draws; None without.
      splits_over_tensor: whether the network can be laid out by `runtime.sharding.TENSOR`.
    """

    stage: ClassVar[str]
    network: ClassVar[type[nn.Module]]
    presets: ClassVar[Mapping[str, Mapping]]
    measures: ClassVar[tuple[str, ...]]
    model: nn.Module
    draw: Mapping[str, Any]
    weights: Mapping[str, Tree]
    judge: Any
    splits_over_tensor: ClassVar[bool]

    @classmethod
    def needs(cls, arch: Mapping, settings: Mapping) -> tuple[str, ...]:
        """The frozen parts that this stage reads with such a model: of "clip" and "t5"."""

    @classmethod
    def part_name(cls, settings: Mapping, parts: Mapping[str, Mapping]) -> str:
        """Which part of a bundle this stage is: parts are {name: settings} of those it holds."""

    @classmethod
    def z_scale_of(cls, settings: Mapping) -> float:
        """s where the network works on s * z_i / |z_i|, 0 where z_i keeps CLIP's own length."""

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the input must deliver, by name."""

    def transform(self, use: str, settings: Mapping) -> Callable:
        """The per-sample transform that delivers the batch, of `input.decode.transforms`.

        Args:
          use: "train"; "held_out" (no random caption or crop, except that the loss of an upsampler
            is measured on crops); "sample" (whole pictures, as at drawing time).
          settings: `config.input`.
        """

    def whole(self) -> "Task":
        """This task on whole pictures, as they are drawn, where training sees crops."""

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters, float32; call under `eval_shape` or `jit(..., out_shardings=...)`."""

    def frozen(self) -> dict[str, Tree] | None:
        """{name: tree} that are loaded, sharded and never updated (CLIP, T5, statistics), or None.

        Raises:
          ConfigError: one of them was not given.
        """

    def frozen_shapes(self) -> dict[str, Tree] | None:
        """The same as ShapeDtypeStructs, whether they are given or not."""

    def init_frozen(self, name: str, key: jax.Array) -> Tree:
        """Random parameters of the frozen part `name`, float32, for benchmarks and shapes."""

    @property
    def unmeasured(self) -> dict[str, np.ndarray]:
        """Statistics that only a trained network has, as they are until it was measured."""

    def statistics_shapes(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        """What `fit` gives, or None for a stage that measures nothing before it is trained."""

    def fit(
        self,
        embeddings: Iterable[tuple[np.ndarray, np.ndarray]],
        sums: dict[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the stage must know of the training data, from batches of (z_i, z_t) [b, D].

        Args:
          sums: what an earlier call that was cut short had added up, or empty; numbers, arrays and
            lists of arrays, kept up to date batch by batch.
        """

    def loss(self, params, frozen, batch, key, *, train: bool):
        """(scalar float32, {name: scalar}): means over the rows with `batch["valid"]`."""

    def value_and_grad(self, params, frozen, batch, key, accumulate: int = 1):
        """((loss, metrics), gradients) of a batch, `accumulate` slices of it one after another."""

    def sharpness_aware(self, params, frozen, batch, key, accumulate: int, rho: float, rows: int):
        """The same by SAM, `rows` of the batch at a time finding a point of their own to go to.

        Args:
          rho: radius; rows: 0 = the whole batch goes to one point.

        Raises (when traced):
          ConfigError: the batch does not divide.
        """

    def memory(self) -> Tree | None:
        """What training learns about itself and needs again, as it is before the first step.

        It is part of the state; `value_and_grad` is given it as `frozen["memory"]`.
        """

    def remember(self, memory: Tree, metrics: dict, rows: int) -> tuple[Tree, dict]:
        """(the memory after a step on a batch of `rows`, the metrics that are left to log)."""

    def traceable(self) -> "Task":
        """This task with attention that any machine can trace, and see into, whatever runs it."""

    def predict(self) -> dict[str, Callable]:
        """{name: fn(params, frozen, batch, key)}: what evaluators may call."""

    def checked_draw(self, given: Mapping, name: str | None = None) -> dict[str, Any]:
        """`draw` with the settings given in place of its own; name: of the part, for errors.

        Raises:
          ConfigError: settings that the stage does not have, or values out of their range.
        """

    def sample(
        self,
        params,
        frozen,
        conditions,
        sample_keys,
        *,
        draw=None,
        x_T=None,
        noise=None,
        tell=None,
        tell_every=1,
    ):
        """Draws what the stage makes, a row a key.

        Args:
          conditions: {name: rows}, by stage; sample_keys: typed keys [B], one a picture.
          draw: settings that replace `self.draw`'s; numbers among them may be traced.
          x_T: optional starting noise [B, ...]; noise: seam for parity tests, [steps, B, ...].
          tell, tell_every: see `samplers.sample`; a stage without diffusion tells nothing.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What most stages do alike; the rest of `Task` is theirs.

    Args:
      arch: keyword arguments of the stage's network.
      weights: trees of the frozen parts by name, arrays or shapes; absent where only the shapes of
        their architectures are wanted.
    """

    arch: Mapping[str, Any]
    _: dataclasses.KW_ONLY
    weights: Mapping[str, Tree] = dataclasses.field(default_factory=dict, repr=False)

    measures: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}  # setting in configs and bundles -> argument
    frozen_names: ClassVar[tuple[str, ...]] = ()
    draw: ClassVar[Mapping[str, Any]] = {}
    draw_defaults: ClassVar[Mapping[str, Any]] = {}  # every setting that a draw has
    draw_choices: ClassVar[Mapping[str, Iterable[str]]] = {}  # of those that are names
    judge: ClassVar[None] = None
    schedule: ClassVar[Schedule | None] = None
    splits_over_tensor: ClassVar[bool] = True

    @classmethod
    def needs(cls, arch, settings):
        del arch, settings
        return ()

    @classmethod
    def part_name(cls, settings, parts):
        del settings, parts
        return cls.stage

    @classmethod
    def z_scale_of(cls, settings):
        del settings
        return 0.0

    def whole(self):
        return self

    def transform(self, use, settings):
        spec = self.batch_spec(1)
        side = lambda name: spec[name].shape[1] if name in spec else None
        train = use == "train"
        return transforms.ImageText(
            side("image"),
            spec["tokens"].shape[1],
            self.tokenizer and self.tokenizer.encode,
            clip_size=side("clip_image"),
            crop=settings["crop"] if train else "center",
            captions=settings["captions"],
            draw_caption=train,
            margin=settings["margin"],
        )

    @property
    def tokenizer(self):
        """An object with `encode` for captions; None: CLIP's."""
        return None

    def frozen(self):
        missing = [name for name in self.frozen_names if self.weights.get(name) is None]
        if missing:
            raise errors.ConfigError(f"the {self.stage} was given no {' and no '.join(missing)}")
        return {name: self.weights[name] for name in self.frozen_names} or None

    def frozen_shapes(self):
        shapes = {}
        for name in self.frozen_names:
            if self.weights.get(name) is not None:
                shapes[name] = jax.eval_shape(lambda tree: tree, self.weights[name])
            elif name == "statistics":
                shapes[name] = self.statistics_shapes()
            else:
                init = lambda key, name=name: self.init_frozen(name, key)
                shapes[name] = jax.eval_shape(init, jax.random.key(0))
        return shapes or None

    @property
    def unmeasured(self):
        return {}

    def statistics_shapes(self):
        return None

    def value_and_grad(self, params, frozen, batch, key, accumulate=1):
        def one(params, rows):
            loss = lambda p: self.loss(p, frozen, rows, key, train=True)
            return jax.value_and_grad(loss, has_aux=True)(params)

        return optim.accumulate(one, accumulate)(params, batch)

    def sharpness_aware(self, params, frozen, batch, key, accumulate, rho, rows):
        if not rows:
            gradient = lambda p: self.value_and_grad(p, frozen, batch, key, accumulate)
            return optim.sam_gradient(gradient, params, rho)

        def one(params, part):
            group = lambda own: optim.sam_gradient(
                lambda p: self.value_and_grad(p, frozen, own, key), params, rho
            )
            # The rows of a group are neighbours, and so on one device where it holds as many.
            found = jax.vmap(group)(optim.groups(part, rows))
            return jax.tree.map(lambda leaf: leaf.mean(0), found)

        return optim.accumulate(one, accumulate)(params, batch)

    def memory(self):
        return None

    def remember(self, memory, metrics, rows):
        del rows
        return memory, metrics

    def traceable(self):
        plain = {"attention_impl": "xla"}
        others = {
            name: dataclasses.replace(frozen, model=frozen.model.clone(**plain))
            for name in ("clip", "t5")
            if (frozen := getattr(self, name, None)) is not None
        }
        return dataclasses.replace(self, arch={**self.arch, **plain}, **others)

    def predict(self):
        return {}

    def checked_draw(self, given, name=None):
        own = dict(self.draw or {})
        if given.get("sampler", own.get("sampler")) != own.get("sampler"):
            own.pop("eta", None)  # it was meant for the other sampler
        if given.get("steps", own.get("steps")) != own.get("steps"):
            # Sections of another number of steps say nothing about these.
            sections = own.get("spacing", "even") not in ("even", "trailing", "log-snr", "karras")
            given = ({"spacing": "even"} if sections else {}) | dict(given)
        given = {**own, **given}
        if "eta" in self.draw_defaults and "eta" not in given:
            chosen = given.get("sampler", self.draw_defaults["sampler"])
            given["eta"] = samplers.own_eta(chosen)
        return _checked_draw(
            name or self.stage, self.draw_defaults, given, self.schedule, self.draw_choices
        )

    def _set(self, **values) -> None:
        """Sets derived fields while the task is made; the settings of its draw are completed."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.draw_defaults:
            object.__setattr__(self, "draw", self.checked_draw({}))


TIMESTEPS = ("uniform", "loss_aware")
# Guidance of a diffusion: see `guidance.in_interval` and `guidance.classifier_free`.
GUIDANCE = MappingProxyType({"guidance_low": 0.0, "guidance_high": 1.0, "guidance_rescale": 0.0})
FRACTIONS = tuple(GUIDANCE)  # settings from 0 to 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Diffusion(Stage):
    """What the diffusion stages share: which timesteps they are trained on.

    Args:
      timesteps: "uniform" (paper) or "loss_aware", see `tasks.timesteps`.
    """

    timesteps: str = "uniform"

    def _set(self, **values):
        if self.timesteps not in TIMESTEPS:
            raise errors.unknown("timesteps", self.timesteps, TIMESTEPS)
        super()._set(**values)

    def timesteps_of(self, frozen, sample_keys, below: int, tag: int, *, train: bool):
        """(t int32 [B], weight of each row's loss [B] or None for 1)."""
        if self.timesteps == "uniform" or not train:
            return keys.integers(sample_keys, below, tag), None
        p = timesteps.probabilities(frozen["memory"])
        return timesteps.draw(p, keys.uniform(sample_keys, tag))

    def told(self, t, loss, valid, *, train: bool) -> dict:
        """What `remember` needs of a batch's losses, as one of its metrics, or {}."""
        if self.timesteps == "uniform" or not train:
            return {}
        return {"memory": timesteps.seen(self.trained_steps, t, loss, valid)}

    def guided(self, model_fn, draw, *, learned_variance=False) -> gaussian.ModelFn:
        """`guidance.with_guidance` as the settings of a draw say."""
        last = len(self.schedule) - 1
        return guidance.with_guidance(
            model_fn,
            guidance.in_interval(
                draw["guidance"], draw["guidance_low"], draw["guidance_high"], last
            ),
            rescale=draw["guidance_rescale"],
            learned_variance=learned_variance,
        )

    @property
    def trained_steps(self) -> int:
        """How many timesteps training draws from, the cleanest ones."""
        return len(self.schedule)

    def memory(self):
        if self.timesteps == "uniform":
            return None
        return timesteps.remember_nothing(self.trained_steps)

    def remember(self, memory, metrics, rows):
        if memory is None:
            return memory, metrics
        metrics = dict(metrics)
        return timesteps.remember(memory, metrics.pop("memory"), rows), metrics


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pictures(Diffusion):
    """What the diffusion stages that make pictures draw alike: fields `parametrisation`, `variance`
    and a method `denoiser`."""

    def denoiser(self, params, frozen, conditions, sample_keys, draw):
        """(denoise, respaced schedule) for `diffusion.samplers`, under conditions and guidance.

        Args:
          sample_keys: of conditions that are drawn, one a picture; draw: complete.
        """
        raise NotImplementedError

    def shape(self, conditions) -> tuple[int, int, int]:
        """(H, W, 3) of the pictures that the conditions make."""
        return (self.image_size, self.image_size, 3)

    def sample(
        self,
        params,
        frozen,
        conditions,
        sample_keys,
        *,
        draw=None,
        x_T=None,
        noise=None,
        tell=None,
        tell_every=1,
    ):
        """Draws pictures float32 [B, H, W, 3] in [-1, 1].

        Args:
          frozen, conditions: see `denoiser`.
          sample_keys: typed keys [B], one a picture.
          draw: settings in place of the task's own; those that `cascade.pipeline.TRACED` names may
            be traced.
          x_T: optional starting noise [B, H, W, 3].
          noise: seam for parity tests, [steps, B, H, W, 3] standard normal.
          tell, tell_every: see `samplers.sample`.
        """
        draw = {**self.draw, **(draw or {})}
        denoise, respaced = self.denoiser(params, frozen, conditions, sample_keys, draw)
        if x_T is None:
            x_T = samplers.draw_noise(sample_keys, self.shape(conditions))
        pictures = samplers.sample(
            denoise,
            respaced,
            x_T,
            sample_keys,
            sampler=draw["sampler"],
            eta=draw["eta"],
            noise=noise,
            tell=tell,
            tell_every=tell_every,
        )
        return jnp.clip(pictures, -1.0, 1.0)

    def invert(
        self, params, frozen, conditions, x_0, sample_keys, *, draw=None, iterations: int = 1
    ):
        """The x_T from which a draw by "ddim" with eta 0 leads back to pictures (section 3.1).

        Args:
          conditions, draw: those of the draw that will start from x_T; of draw the steps, spacing
            and guidance matter. Guidance above 1 is inverted badly: see `samplers.ddim_invert`,
            also for iterations.
          x_0: float32 [B, H, W, 3] in [-1, 1].
          sample_keys: typed keys [B], those of the draw.

        Returns:
          (x_T float32 [B, H, W, 3], error float32 [B]: root mean square of what the draw gives
          minus x_0).
        """
        draw = {**self.draw, **(draw or {})}
        denoise, respaced = self.denoiser(params, frozen, conditions, sample_keys, draw)
        x_T = samplers.ddim_invert(denoise, respaced, x_0, iterations=iterations)
        back = samplers.sample(denoise, respaced, x_T, None, sampler="ddim", eta=0.0)
        error = (jnp.clip(back, -1.0, 1.0) - x_0) ** 2
        return x_T, jnp.sqrt(error.mean(axis=(1, 2, 3)))

    def inpaint(
        self,
        params,
        frozen,
        conditions,
        sample_keys,
        known,
        mask,
        *,
        draw=None,
        jump_length: int = 10,
        resamples: int = 10,
        tell=None,
        tell_every=1,
    ):
        """Fills holes of pictures, float32 [B, H, W, 3]; see `repaint.inpaint`.

        Args:
          known: float32 [B, H, W, 3] in [-1, 1]; mask: [B, H, W, 1], 1 = to be filled.
          Other arguments as in `sample`.
        """
        draw = {**self.draw, **(draw or {})}
        denoise, respaced = self.denoiser(params, frozen, conditions, sample_keys, draw)
        pictures = repaint.inpaint(
            denoise,
            respaced,
            samplers.draw_noise(sample_keys, self.shape(conditions)),
            sample_keys,
            known,
            mask,
            sampler=draw["sampler"],
            eta=draw["eta"],
            jump_length=jump_length,
            resamples=resamples,
            tell=tell,
            tell_every=tell_every,
        )
        return jnp.clip(pictures, -1.0, 1.0)


def _checked_draw(
    stage: str,
    defaults: Mapping,
    given: Mapping,
    schedule: Schedule | None,
    choices: Mapping[str, Iterable[str]],
) -> dict[str, Any]:
    """The settings of a draw: `given` over `defaults`, all mistakes in one error.

    Args:
      stage: for the message.
      schedule: the noise schedule that "steps" and "spacing" respace, where there is one.
      choices: valid names of settings that are names.

    Raises:
      ConfigError: settings that the stage does not have, or values out of their range.
    """
    wrong = []
    for name in given:
        if name not in defaults:
            wrong.append(errors.unknown(f"{stage} setting", name, defaults))
    draw = {**defaults, **given}
    for name, valid in choices.items():
        if draw[name] not in valid:
            wrong.append(errors.unknown(name, draw[name], valid))
    for name in ("guidance", "temperature", "top_p", "eta", *FRACTIONS):
        value = draw.get(name, 1.0)
        if not isinstance(value, int | float | np.number) or not np.isfinite(value):
            wrong.append(errors.ConfigError(f"{stage}: {name} {value!r}: expected a finite number"))
            draw[name] = defaults[name]  # the rest is looked at with the stage's own
        elif name == "top_p" and not 0 < value <= 1:
            wrong.append(errors.ConfigError(f"{stage}: top_p {value!r}: expected (0, 1]"))
        elif name in FRACTIONS and not 0 <= value <= 1:
            wrong.append(errors.ConfigError(f"{stage}: {name} {value!r}: expected 0 to 1"))
    low, high = draw.get("guidance_low", 0.0), draw.get("guidance_high", 1.0)
    if low > high:
        wrong.append(
            errors.ConfigError(
                f"{stage}: guidance_low {low!r} is above guidance_high {high!r}: expected 0 "
                "(cleanest) <= low <= high <= 1 (noisiest)"
            )
        )
    candidates = draw.get("candidates", 1)
    if not isinstance(candidates, int | np.integer) or candidates < 1:
        wrong.append(errors.ConfigError(f"{stage}: candidates {candidates!r}: expected at least 1"))
    try:
        if schedule is not None:
            schedule.respace(draw["steps"], draw["spacing"])
    except errors.ConfigError as error:
        wrong.append(error)
    try:
        if "sampler" in draw:
            samplers.check(draw["sampler"], draw["eta"])
    except errors.ConfigError as error:
        wrong.append(error)
    if wrong:
        raise errors.ConfigError("; ".join(error.message for error in wrong))
    return draw


def spec(
    batch_size: int,
    *,
    image: int | None = None,
    clip_image: int | None = None,
    low: int | None = None,
    tokens: int | None = None,
    z_i: int | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a stage: pictures uint8 [B, S, S, 3] by side, tokens by context length."""
    out = {}
    for name, side in (("image", image), ("clip_image", clip_image), ("low", low)):
        if side:
            out[name] = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)
    if tokens:
        out["tokens"] = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)
        out["text_mask"] = jax.ShapeDtypeStruct((batch_size, tokens), jnp.bool_)
    if z_i:
        out["z_i"] = jax.ShapeDtypeStruct((batch_size, z_i), jnp.float32)
    out["sample"] = jax.ShapeDtypeStruct((batch_size, 2), jnp.uint32)
    out["valid"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    return out


def zeros(batch_spec: dict) -> dict[str, jax.Array]:
    """A batch of zeros with the given spec, to trace a model with."""
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in batch_spec.items()}


def mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the rows where `valid`, float32; 0 when there is none."""
    values = jnp.where(valid, values.astype(jnp.float32), 0.0)
    return values.sum() / jnp.maximum(valid.sum(), 1)
