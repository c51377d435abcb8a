"""The cascade as a value: caption -> prior -> decoder -> upsamplers -> pictures (figure 2).

`Pipeline.load(dir)` opens a bundle and draws stage by stage; the ways to make a picture of all of
them are in `unclip.drawing`. Each stage is compiled once per step count, sampler and number of
rows; prompts, seeds, guidance and eta are traced, so changing them compiles nothing. How many rows
a program has is what may round a picture otherwise, also on one device, as XLA orders the sums of a
matrix product or a convolution by its size. On a CPU, where rows drawn together cost as much as one
after another, a program draws one picture, so that a picture is the same bits however many are
asked for. Elsewhere it has as many rows as are asked for, up to the next power of two and at most
`batch_size`; a recipe says how many.

The methods that draw take `noise`, which replaces the random draws and so lets a picture be
compared with another program's: {stage: float32 [1 + steps, n, ...]}, stages "prior" ([..., D]),
"decoder" and "upsampler_0" ... ([..., H, W, 3]). Entry 0 is x_T, entry 1 + k the standard normal
noise of step k, the first visited being 0; the last entry, at the step to x_0, is not used. A stage
that is not named draws its own.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors, tasks
from unclip.cascade import bundle, spaces
from unclip.files import paths
from unclip.input.decode.text import Tokenizer
from unclip.runtime import compiled, sharding
from unclip.tasks.arrays import to_float, unit
from unclip.tasks.clip import FrozenClip

STAGE_TAGS = {"prior": 0, "decoder": 1, "upsampler_0": 2, "upsampler_1": 3}
LAST = "_last"  # upsampler_0_last: a second network, for the last step of upsampler_0
# Settings of a draw that compile nothing.
TRACED = (
    *("guidance", "guidance_low", "guidance_high", "guidance_rescale"),
    *("eta", "temperature", "top_p", "noise_level"),
)
INVERT_CALLS = 2  # of the network a step: twice is much nearer than once
FREE = ("dtype", "dropout", "remat", "attention_impl")  # in which the two networks may differ


Noise = Mapping[str, np.ndarray]
Tell = Callable[[str, int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a method drew.

    Attributes:
      images: uint8 [n, H, W, 3].
      recipes: one dict a picture, enough to draw it again.
      stages: {"decoder": uint8 [n, h, w, 3], "upsampler_0": ..., ...}, every stage's picture.
    """

    images: np.ndarray
    recipes: list[dict]
    stages: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.images)


class Pipeline:
    """A loaded cascade, stage by stage.

    Args:
      parts: {name: `bundle.Part`}, names as in `bundle`; any may be absent, methods say which
        they need.
      model_hash: identifies the weights in recipes.
      batch_size: pictures drawn at once, at most.
      fixed_batch: draw so many at once whatever is asked for, on a CPU too, and pad: of an
        evaluation, whose figures must not depend on how much of a cell is left.
      mesh: devices to draw on, of this process alone (`runtime.sharding.make_mesh` with
        `jax.local_devices()`); rows of a batch go over its data and fsdp axes, and parameters are
        sharded where fsdp is more than 1. None: JAX's default device.

    Raises:
      ConfigError: parts that do not fit one another, or a batch the mesh cannot split.
    """

    def __init__(
        self,
        parts: dict[str, bundle.Part],
        *,
        model_hash: str = "",
        batch_size: int = 8,
        fixed_batch: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.parts, self.model_hash, self.batch_size = parts, model_hash, batch_size
        self.mesh = mesh
        self._ways = ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
        if batch_size % ways:
            raise errors.ConfigError(f"batch_size {batch_size} is not a multiple of {ways} devices")
        self._fixed = batch_size if fixed_batch else 0
        self._tasks, used = {}, {"clip"} & parts.keys()
        for name in ("clip", *STAGE_TAGS):
            if name not in parts:
                continue
            part, stage = parts[name], tasks.stage_of(name)
            needed = tasks.needs(stage, part.arch, part.settings)
            archs = {other: self.need(other, f"the {stage}").arch for other in needed}
            tokenizer = parts["t5"].extra.get("tokenizer") if "t5" in needed else None
            task = self._tasks[name] = tasks.make(
                stage, part.arch, part.settings, **archs, t5_tokenizer=tokenizer
            )
            used |= {name, *needed}
            if name + LAST in parts:
                last = tasks.make(stage, parts[name + LAST].arch, part.settings).model
                free = {field: getattr(task.model, field) for field in FREE}
                if last.clone(**free) != task.model:
                    raise errors.ConfigError(
                        f"{name + LAST} has another architecture than {name}: they must be equal"
                    )
                used.add(name + LAST)
        self._params = {name: self._place(parts[name].params) for name in used}
        self._frozen = {name: self._params[name] for name in ("clip", "t5") if name in used}
        if "prior" in parts:
            statistics = {**self._tasks["prior"].unmeasured, **parts["prior"].extra}
            self._frozen["statistics"] = self._place(statistics)
        self._compiled, self._warned = {}, set()
        self._tell, self._told = None, {}

    @classmethod
    def load(cls, directory: str, *, allow_mixed_spaces: bool = False, **kwargs) -> Self:
        """Opens a bundle folder (`unclip export`, `unclip convert`).

        Args:
          allow_mixed_spaces: take stages that were not trained with one another all the same, with
            a warning, as a bundle is taken that was exported so.

        Raises:
          DataError: unreadable or damaged files; ConfigError: not a bundle, or its stages work in
            several embedding spaces (`cascade.spaces`).
        """
        opened = bundle.read(paths.expanded(directory))
        allowed = allow_mixed_spaces or opened.meta.get(spaces.RECORD, ())
        for line in spaces.check(opened.parts, allowed):
            warnings.warn(f"{directory}: several embedding spaces: {line}", stacklevel=2)
        return cls(opened.parts, model_hash=opened.hash, **kwargs)

    def _place(self, tree):
        """Parameters on the device or the mesh."""
        if self.mesh is None:
            return jax.device_put(tree)
        rules = sharding.PRESETS["fsdp" if self.mesh.shape["fsdp"] > 1 else "data"]
        where = sharding.shardings(tree, self.mesh, rules)
        return jax.device_put(tree, where)

    def _put(self, name: str, value):
        """Rows of a batch over the mesh; parameters, placed before, and scalars as they are."""
        if self.mesh is None or name in ("params", "frozen") or jnp.ndim(value) == 0:
            return value
        spec = sharding.batch_sharding(self.mesh).spec
        if name == "noise":  # one a step, then rows
            spec = jax.sharding.PartitionSpec(None, *spec)
        return jax.device_put(value, jax.sharding.NamedSharding(self.mesh, spec))

    def need(self, name: str, what: str) -> bundle.Part:
        """The part `name`. Raises ConfigError where it is not there: `what` needs it."""
        if name not in self.parts:
            have = ", ".join(sorted(self.parts)) or "nothing"
            raise errors.ConfigError(f"{what} needs the part {name!r}; this model has {have}")
        return self.parts[name]

    @property
    def upsamplers(self) -> list[str]:
        """Names of the upsampler parts, in the order they run."""
        return sorted(name for name in self._tasks if name.startswith("upsampler"))

    def task(self, name: str) -> tasks.Task:
        """The task of a part of this model: "clip", "prior", "decoder", "upsampler_0", ..."""
        return self._tasks[name]

    def stage_size(self, name: str) -> int:
        """Side in pixels of the pictures a stage makes: "decoder", "upsampler_0", ..."""
        return self._tasks[name].image_size

    def tokenize(
        self, prompts: Sequence[str], context: int | None = None, tokenizer=None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n, L], mask bool [n, L]); warns where a prompt is cut.

        Args:
          context: L; None takes CLIP's.
          tokenizer: of `input.decode.text`; None takes CLIP's.

        Raises:
          ConfigError: an empty prompt.
        """
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise errors.ConfigError(f"prompt {number + 1} of {len(prompts)} is empty")
        context = context or self._tasks["clip"].model.context
        tokenizer = tokenizer or Tokenizer()
        for prompt in prompts:
            cut = tokenizer.cut_warning(prompt, context)
            if cut and (prompt, context) not in self._warned:
                self._warned.add((prompt, context))
                warnings.warn(cut, stacklevel=3)
        tokens, mask, _ = tokenizer.encode(list(prompts), context)
        return tokens, mask

    def _call(self, name: str, function, static: tuple = (), **traced):
        """Runs a jitted function, one compilation a (name, static, shape)."""
        key = (name, static)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(function, compiler_options=compiled.options())
        traced = {k: jax.tree.map(partial(self._put, k), v) for k, v in traced.items()}
        return self._compiled[key](**traced)

    def at_once(self, count: int) -> int:
        """Rows of the programs that draw `count` pictures, padding included."""
        if self._fixed:
            return self._fixed
        devices = self.mesh.devices.flat if self.mesh is not None else jax.devices()
        one = devices[0].platform == "cpu"
        each = 1 if one else 1 << (-(-count // self._ways) - 1).bit_length()
        return min(self._ways * each, self.batch_size)

    def drawing(self, count: int) -> Self:
        """This model with the programs that draw `count` pictures, whatever it is asked for.

        What embeds and inverts the pictures of one call then has as many rows as what draws them,
        and is rounded alike when one of them is drawn again.
        """
        return self.with_rows(self.at_once(count))

    def telling(self, tell: Tell | None, every: int = 1) -> Self:
        """This model, which says how far it is while it draws.

        Programs that tell are others than silent ones, compiled once for whatever they tell.

        Args:
          tell: called as (stage, network calls done, x_0 as predicted so far of the program's first
            row: float32 [H, W, 3] in [-1, 1], or [D] of the prior in the space it is drawn in),
            from another thread and out of order if need be; None: silent again.
          every: after how many calls; a stage's last is told in any case.

        Raises:
          ConfigError: every is less than 1.
        """
        if tell is not None and every < 1:
            raise errors.ConfigError(f"every={every}: expected at least 1")
        other = copy.copy(self)
        other._tell = None if tell is None else (tell, every)
        return other

    def with_rows(self, rows: int) -> Self:
        """This model with programs of `rows` rows, at most `batch_size`."""
        other = copy.copy(self)
        other._fixed = rows
        return other

    def fits(self, rows: int) -> bool:
        """Whether programs of `rows` rows can run here."""
        return 1 <= rows <= self.batch_size and not rows % self._ways

    def _batches(self, count: int):
        """(index array of 0..count-1, padded by repeating the last; how many of its rows count)."""
        rows = self.at_once(count)
        for start in range(0, count, rows):
            yield np.minimum(np.arange(start, start + rows), count - 1), count - start

    def embed_text(self, prompts: Sequence[str]) -> np.ndarray:
        """z_t float32 [n, D] of captions, not normalised."""
        self.need("clip", "embed_text")
        tokens, _ = self.tokenize(prompts)
        frozen = FrozenClip(self._tasks["clip"].model)
        run = lambda rows: self._call(
            "z_t",
            lambda params, tokens: frozen.text(params, tokens)[0],
            params=self._params["clip"],
            tokens=tokens[rows],
        )
        return self._rows(len(tokens), run)

    def embed_image(self, images: np.ndarray) -> np.ndarray:
        """z_i float32 [n, D] of pictures uint8 [n, H, W, 3], not normalised."""
        self.need("clip", "embed_image")
        frozen = FrozenClip(self._tasks["clip"].model)
        run = lambda rows: self._call(
            "z_i", frozen.image, params=self._params["clip"], images=images[rows]
        )
        return self._rows(len(images), run)

    def _rows(self, count: int, run) -> np.ndarray:
        parts = [np.asarray(run(rows))[:left] for rows, left in self._batches(count)]
        return np.concatenate(parts)

    def draw_prior(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        noise: Noise | None = None,
        **settings,
    ) -> np.ndarray:
        """z_i float32 [n, D] drawn for captions, one a (prompt, seed) pair.

        Args:
          negative: caption that guidance leads away from, in place of none.
          noise: as this module says, with candidates = 1.
          settings: see the tasks of `tasks.prior`.
        """
        self.need("prior", "drawing from a caption")
        task = self._tasks["prior"]
        tokens, mask = self.tokenize(prompts, task.context)
        conditions = {"tokens": tokens, "text_mask": mask}
        conditions |= self._negative(negative, len(tokens), task.context)
        shape = (len(tokens), task.clip.model.embed_dim)
        return self._draw("prior", conditions, seeds, settings, noise, shape)

    def _negative(self, prompt: str, count: int, context: int, tokenizer=None) -> dict:
        """The conditions of a negative prompt, a row a picture; {} where there is none."""
        if not prompt:
            return {}
        both = self.tokenize([prompt], context, tokenizer)
        rows = (np.repeat(array, count, axis=0) for array in both)
        return dict(zip(("negative_tokens", "negative_text_mask"), rows))

    def _draw(
        self,
        name: str,
        conditions: dict,
        seeds: Sequence[int],
        settings: dict,
        noise: Noise | None,
        shape: tuple[int, ...],
        x_T: np.ndarray | None = None,
    ) -> np.ndarray:
        """What a stage's `sample` draws, a row a seed, batch by batch.

        Args:
          conditions: arrays by name, a row a seed; settings: in place of the stage's own.
          shape: of the stage's x_T, all n rows of it; x_T: in place of what the seeds draw.
        """
        task = self._tasks[name]
        static, traced = _split(task.checked_draw(settings, name))
        seeds, tag = np.asarray(seeds, np.uint32), STAGE_TAGS[name]
        seam = self._seam(noise, name, static, shape)
        if x_T is not None:
            seam = lambda rows: {"x_T": x_T[rows]}
        frozen = {other: self._frozen[other] for other in task.frozen_names}
        if name + LAST in self._params:
            frozen["last"] = self._params[name + LAST]
        key, telling = static, {}
        if self._tell is not None:
            self._told[name], every = self._tell
            told = self._told  # looked up at each call: the program outlives the function
            tell = lambda done, x_0: told[name](name, int(done), np.asarray(x_0))
            key, telling = (*static, ("tell", every)), {"tell": tell, "tell_every": every}

        def draw(params, frozen, conditions, seeds, traced, **seam):
            chosen = dict(static) | traced
            # One a picture, different for every stage.
            sample_keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), tag))(seeds)
            return task.sample(
                params, frozen, conditions, sample_keys, draw=chosen, **seam, **telling
            )

        def run(rows):
            return self._call(
                name,
                draw,
                key,
                params=self._params[name],
                frozen=frozen,
                conditions={what: array[rows] for what, array in conditions.items()},
                seeds=seeds[rows],
                traced=traced,
                **seam(rows),
            )

        found = self._rows(len(seeds), run)
        if telling:
            jax.effects_barrier()  # nothing is told of a draw that is over
        return found

    def decode(
        self,
        z_i: np.ndarray | None,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        *,
        drop_image: bool = False,
        decoder: dict | None = None,
        upsamplers: Sequence[dict] = (),
        stages: int | None = None,
        negative: str = "",
        x_T: np.ndarray | None = None,
        noise: Noise | None = None,
    ) -> dict[str, np.ndarray]:
        """Pictures of embeddings through the decoder and the upsamplers.

        Args:
          z_i: float32 [n, D], or None for a decoder without it; prompts: captions, or None to draw
            as the decoder was trained to without one; seeds: one a picture.
          drop_image: whether the decoder draws as it was trained to without z_i.
          decoder: settings of the decoder's draw; upsamplers: one dict an upsampler.
          stages: how many of decoder and upsamplers run; None = all.
          negative: caption that the decoder's guidance leads away from, in place of none.
          x_T: float32 [n, h, w, 3], where the decoder starts in place of the seeds' noise; what
            it draws on the way is still the seeds'. noise: see this module; not both.

        Returns:
          {"decoder": float32 [n, h, w, 3] in [-1, 1], "upsampler_0": ..., ...}.
        """
        self.need("decoder", "drawing a picture")
        task = self._tasks["decoder"]
        if prompts is None:
            tokens, mask = task.empty(len(seeds))
        else:
            tokens, mask = self.tokenize(prompts, task.context, task.tokenizer)
        conditions = {"tokens": tokens, "text_mask": mask}
        conditions |= self._negative(negative, len(seeds), task.context, task.tokenizer)
        conditions["drop_image"] = np.full(len(seeds), drop_image)
        conditions["drop_text"] = np.full(len(seeds), prompts is None)
        if z_i is not None:
            conditions["z_i"] = z_i
        shape = (len(seeds), *2 * (task.image_size,), 3)
        names = self.running(stages, decoder, upsamplers)
        drawn = self._draw("decoder", conditions, seeds, decoder or {}, noise, shape, x_T)
        return {"decoder": drawn} | self.draw_upsamplers(drawn, seeds, names, upsamplers, noise)

    def invert(
        self, images: np.ndarray, z_i: np.ndarray, *, decoder: dict | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """x_T from which the decoder's deterministic DDIM leads back to pictures (section 3).

        Args:
          images: uint8 [n, h, w, 3] at the decoder's size; z_i: float32 [n, D], their embeddings.
          decoder: settings of the draw that will start there: steps, spacing, guidance, threshold.

        Returns:
          (x_T float32 [n, h, w, 3], under z_i and without a caption; error float32 [n], root mean
          square of what the draw leads back to minus the picture, in [-1, 1]).
        """
        self.need("decoder", "inverting a picture")
        task = self._tasks["decoder"]
        static, traced = _split(task.checked_draw(decoder or {}, "decoder"))
        frozen = {other: self._frozen[other] for other in task.frozen_names}
        tokens, mask = task.empty(len(images))
        conditions = {"tokens": tokens, "text_mask": mask, "z_i": z_i}
        conditions["drop_text"] = np.full(len(images), True)

        def invert(params, frozen, conditions, x_0, traced):
            keys = jax.random.split(jax.random.key(0), len(x_0))  # DDIM draws nothing with them
            chosen, given = dict(static) | traced, (frozen, conditions, to_float(x_0), keys)
            start, error = task.invert(params, *given, draw=chosen, iterations=INVERT_CALLS)
            return jnp.concatenate([start.reshape(len(start), -1), error[:, None]], axis=1)

        def run(rows):
            return self._call(
                "decoder inverted",
                invert,
                static,
                params=self._params["decoder"],
                frozen=frozen,
                conditions={what: array[rows] for what, array in conditions.items()},
                x_0=images[rows],
                traced=traced,
            )

        found = self._rows(len(images), run)
        return found[:, :-1].reshape(images.shape), found[:, -1]

    def running(
        self, stages: int | None, decoder: dict | None, upsamplers: Sequence[dict]
    ) -> list[str]:
        """The upsamplers that run; refuses what could not be drawn or would have no effect."""
        count = 1 + len(self.upsamplers)
        if stages is not None and not 1 <= stages <= count:
            most = f" to {count}" if count > 1 else ", as this model has no upsampler"
            raise errors.ConfigError(
                f"stages={stages}: expected 1 (the decoder alone){most}; this model has "
                f"{', '.join(['decoder', *self.upsamplers])}"
            )
        names = self.upsamplers[: (stages or count) - 1]
        if len(upsamplers) > len(names):
            raise errors.ConfigError(
                f"settings for {len(upsamplers)} upsamplers, of which {len(names)} run"
                f"{f' with stages={stages}' if stages else ''}: they would have no effect"
            )
        for name, settings in [("decoder", decoder or {}), *zip(names, upsamplers)]:
            self._tasks[name].checked_draw(settings, name)
        return names

    def draw_upsamplers(
        self,
        low: np.ndarray,
        seeds: Sequence[int],
        names: Sequence[str],
        settings: Sequence[dict] = (),
        noise: Noise | None = None,
    ) -> dict[str, np.ndarray]:
        """Smaller pictures through upsamplers, one after the other.

        Args:
          low: float32 [n, h, w, 3] in [-1, 1]; seeds: one a picture.
          names: of the upsamplers, in their order; settings: one dict each, as far as given.

        Returns:
          {name: float32 [n, H, W, 3] in [-1, 1]}.
        """
        out, chosen = {}, [*settings, *[{}] * len(names)]
        for name, own in zip(names, chosen):
            height, width = (side * self._tasks[name].factor for side in low.shape[1:3])
            shape = (len(low), height, width, 3)
            low = out[name] = self._draw(name, {"low": low}, seeds, own, noise, shape)
        return out

    def _seam(self, noise: Noise | None, name: str, static: tuple, shape: tuple[int, ...]):
        """rows -> {"x_T", "noise"} of a stage's `sample`, or {} where the stage draws its own.

        Args:
          shape: of the stage's x_T, all n rows of it.
        """
        for given in noise or {}:
            if given not in STAGE_TAGS:
                raise errors.unknown("stage of noise", given, STAGE_TAGS)
        if noise is None or name not in noise:
            return lambda rows: {}
        settings = dict(static)
        if settings.get("candidates", 1) != 1:
            raise errors.ConfigError(
                f"noise for the prior with candidates={settings['candidates']}: expected "
                "candidates=1, as each candidate draws its own"
            )
        if "steps" not in settings:
            raise errors.ConfigError("noise for an autoregressive prior: it draws codes, no noise")
        noise, expected = np.asarray(noise[name], np.float32), (1 + settings["steps"], *shape)
        if noise.shape != expected:
            raise errors.ConfigError(
                f"noise of {name} has shape {noise.shape}; expected {expected}: x_T, then one a "
                "step"
            )
        return lambda rows: {"x_T": noise[0, rows], "noise": noise[1:, rows]}

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of z_i and z_t, float32 [n], by this model's own CLIP."""
        return np.sum(unit(self.embed_image(images)) * unit(self.embed_text(prompts)), axis=-1)

    def in_force(
        self,
        chosen: dict[str, dict],
        stages: int | None = None,
        noise: Noise | None = None,
        upsamplers: Sequence[str] | None = None,
        *,
        count: int = 1,
    ) -> dict:
        """Every setting in force, for a recipe: {setting: {stage: value}}.

        Args:
          chosen: {stage: settings given}; of prior and decoder, those named are in force.
          stages: how many of decoder and upsamplers run, None = all; noise: what was given.
          upsamplers: names of those that run, where `stages` does not say it.
          count: pictures of the call.
        """
        stages = stages or 1 + len(self.upsamplers)
        names = [n for n in ("prior", "decoder") if n in chosen]
        names += self.upsamplers[: stages - 1] if upsamplers is None else upsamplers
        rows = self.at_once(count)
        out = {"model_hash": self.model_hash, "stages": stages, "batch_size": rows}
        if noise is not None:  # then the seeds alone do not draw the picture again
            out["noise"] = "given: " + ", ".join(noise)
        for name in names:
            for setting, value in (
                self._tasks[name].checked_draw(chosen.get(name, {}), name).items()
            ):
                out.setdefault(setting, {})[name] = value
        return out


def _split(draw: dict) -> tuple[tuple, dict]:
    """A draw's settings as (static items, traced floats)."""
    traced = {k: np.float32(v) for k, v in draw.items() if k in TRACED}
    return tuple(sorted((k, v) for k, v in draw.items() if k not in traced)), traced


def seeds_of(seed: int, n: int) -> list[int]:
    """The seeds of `n` pictures from `seed` on. Raises ConfigError where one is out of range."""
    if not 0 <= seed <= 2**32 - n:
        raise errors.ConfigError(f"seed {seed}: expected 0 <= seed and seed + n <= {2**32}")
    return list(range(seed, seed + n))
