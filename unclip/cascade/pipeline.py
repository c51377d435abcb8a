"""The cascade as a value: caption -> prior -> decoder -> upsamplers -> pictures (figure 2).

`UnCLIP.load(dir)` opens a bundle; every way to make a picture is a method. Each stage is compiled
once per step count, sampler and number of rows; prompts, seeds, guidance and eta are traced, so
changing them compiles nothing. How many rows a program has is what may round a picture otherwise,
also on one device, as XLA orders the sums of a matrix product or a convolution by its size. On a
CPU, where rows drawn together cost as much as one after another, a program draws one picture, so
that a picture is the same bits however many are asked for. Elsewhere it has as many rows as are
asked for, up to the next power of two and at most `batch_size`; a recipe says how many.

The methods that draw take `noise`, which replaces the random draws and so lets a picture be
compared with another program's: {stage: float32 [1 + steps, n, ...]}, stages "prior" ([..., D]),
"decoder" and "upsampler_0" ... ([..., H, W, 3]). Entry 0 is x_T, entry 1 + k the standard normal
noise of step k, the first visited being 0; the last entry, at the step to x_0, is not used. A stage
that is not named draws its own.
"""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors, tasks
from unclip.cascade import bundle, spaces
from unclip.files import images as image_files
from unclip.files import paths
from unclip.input.decode.image import for_clip
from unclip.input.decode.text import Tokenizer
from unclip.runtime import compiled, sharding
from unclip.tasks.arrays import to_uint8, unit
from unclip.tasks.clip import FrozenClip

STAGE_TAGS = {"prior": 0, "decoder": 1, "upsampler_0": 2, "upsampler_1": 3}
LAST = "_last"  # upsampler_0_last: a second network, for the last step of upsampler_0
# Settings of a draw that compile nothing.
TRACED = ("guidance", "eta", "temperature", "top_p", "noise_level")
EMBEDS = ("prior", "text", "none")  # where the decoder's z_i comes from
FREE = ("dtype", "dropout", "remat", "attention_impl")  # in which the two networks may differ


Noise = Mapping[str, np.ndarray]


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


class UnCLIP:
    """A loaded cascade.

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
            archs = {other: self._need(other, f"the {stage}").arch for other in needed}
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

    @classmethod
    def load(cls, directory: str, *, allow_mixed_spaces: bool = False, **kwargs) -> "UnCLIP":
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

    def _need(self, name: str, what: str) -> bundle.Part:
        if name not in self.parts:
            have = ", ".join(sorted(self.parts)) or "nothing"
            raise errors.ConfigError(f"{what} needs the part {name!r}; this model has {have}")
        return self.parts[name]

    @property
    def upsamplers(self) -> list[str]:
        """Names of the upsampler parts, in the order they run."""
        return sorted(name for name in self._tasks if name.startswith("upsampler"))

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

    def _batches(self, count: int):
        """(index array of 0..count-1, padded by repeating the last; how many of its rows count)."""
        rows = self.at_once(count)
        for start in range(0, count, rows):
            yield np.minimum(np.arange(start, start + rows), count - 1), count - start

    def embed_text(self, prompts: Sequence[str]) -> np.ndarray:
        """z_t float32 [n, D] of captions, not normalised."""
        self._need("clip", "embed_text")
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
        self._need("clip", "embed_image")
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
        noise: Noise | None = None,
        **settings,
    ) -> np.ndarray:
        """z_i float32 [n, D] drawn for captions, one a (prompt, seed) pair.

        Settings: see the tasks of `tasks.prior`; `noise` as this module says, with candidates = 1.
        """
        self._need("prior", "drawing from a caption")
        task = self._tasks["prior"]
        tokens, mask = self.tokenize(prompts, task.context)
        conditions = {"tokens": tokens, "text_mask": mask}
        shape = (len(tokens), task.clip.model.embed_dim)
        return self._draw("prior", conditions, seeds, settings, noise, shape)

    def _draw(
        self,
        name: str,
        conditions: dict,
        seeds: Sequence[int],
        settings: dict,
        noise: Noise | None,
        shape: tuple[int, ...],
    ) -> np.ndarray:
        """What a stage's `sample` draws, a row a seed, batch by batch.

        Args:
          conditions: arrays by name, a row a seed; settings: in place of the stage's own.
          shape: of the stage's x_T, all n rows of it.
        """
        task = self._tasks[name]
        static, traced = _split(task.checked_draw(settings, name))
        seeds, tag = np.asarray(seeds, np.uint32), STAGE_TAGS[name]
        seam = self._seam(noise, name, static, shape)
        frozen = {other: self._frozen[other] for other in task.frozen_names}
        if name + LAST in self._params:
            frozen["last"] = self._params[name + LAST]

        def draw(params, frozen, conditions, seeds, traced, **seam):
            chosen = dict(static) | traced
            # One a picture, different for every stage.
            sample_keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), tag))(seeds)
            return task.sample(params, frozen, conditions, sample_keys, draw=chosen, **seam)

        def run(rows):
            return self._call(
                name,
                draw,
                static,
                params=self._params[name],
                frozen=frozen,
                conditions={what: array[rows] for what, array in conditions.items()},
                seeds=seeds[rows],
                traced=traced,
                **seam(rows),
            )

        return self._rows(len(seeds), run)

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
        noise: Noise | None = None,
    ) -> dict[str, np.ndarray]:
        """Pictures of embeddings through the decoder and the upsamplers.

        Args:
          z_i: float32 [n, D], or None for a decoder without it; prompts: captions, or None to draw
            as the decoder was trained to without one; seeds: one a picture.
          drop_image: whether the decoder draws as it was trained to without z_i.
          decoder: settings of the decoder's draw; upsamplers: one dict an upsampler.
          stages: how many of decoder and upsamplers run; None = all.
          noise: see this module.

        Returns:
          {"decoder": float32 [n, h, w, 3] in [-1, 1], "upsampler_0": ..., ...}.
        """
        self._need("decoder", "drawing a picture")
        task = self._tasks["decoder"]
        if prompts is None:
            tokens, mask = task.empty(len(seeds))
        else:
            tokens, mask = self.tokenize(prompts, task.context, task.tokenizer)
        conditions = {"tokens": tokens, "text_mask": mask}
        conditions["drop_image"] = np.full(len(seeds), drop_image)
        conditions["drop_text"] = np.full(len(seeds), prompts is None)
        if z_i is not None:
            conditions["z_i"] = z_i
        shape = (len(seeds), *2 * (task.image_size,), 3)
        names = self._running(stages, decoder, upsamplers)
        out = {"decoder": self._draw("decoder", conditions, seeds, decoder or {}, noise, shape)}
        chosen = [*upsamplers, *[{}] * len(self.upsamplers)]
        low = out["decoder"]
        for name, settings in zip(names, chosen):
            low = out[name] = self._upsample(name, low, seeds, settings, noise)
        return out

    def _running(
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

    def _upsample(
        self, name: str, low: np.ndarray, seeds: Sequence[int], settings: dict, noise: Noise | None
    ) -> np.ndarray:
        """float32 [n, H, W, 3] in [-1, 1] of smaller pictures, by one upsampler."""
        height, width = (side * self._tasks[name].factor for side in low.shape[1:3])
        shape = (len(low), height, width, 3)
        return self._draw(name, {"low": low}, seeds, settings, noise, shape)

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

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        prior: dict | None = None,
        decoder: dict | None = None,
        upsamplers: Sequence[dict] = (),
        stages: int | None = None,
        embed: str | None = None,
        caption: bool = True,
        noise: Noise | None = None,
    ) -> Pictures:
        """Draws `n` pictures of every caption.

        Picture k of a caption uses seed `seed` + k, and is the same picture when drawn alone: to
        the bit by programs of equally many rows, as on a CPU, else up to rounding.

        Args:
          prompt: one caption or several.
          n: pictures a caption; seed: of the first one, 0 <= seed < 2**32; or one for every
            caption, so that an evaluation's pictures do not share their noise.
          prior, decoder, upsamplers: settings that replace the model's own, by stage: steps,
            guidance, sampler, eta, and the prior's candidates.
          stages: how many of decoder and upsamplers run; None = all.
          embed: where the decoder's z_i comes from (section 5.1 of the paper): "prior" draws it,
            "text" gives z_t in its place, "none" drops it. None: "text" for a decoder that was
            trained so, "prior" for any other; a decoder without z_i has only "none".
          caption: whether the decoder reads the caption too.
          noise: in place of what the seeds would draw, one row a picture; see this module.

        Returns:
          `Pictures`, caption-major.

        Raises:
          ConfigError: empty prompt, a part that is missing, a setting that does not exist or would
            have no effect.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if n < 1 or not prompts:
            raise errors.ConfigError(f"given {len(prompts)} prompts and n={n}: at least 1 of each")
        wanted = [p for p in prompts for _ in range(n)]
        first = [seed] * len(prompts) if np.ndim(seed) == 0 else list(map(int, seed))
        if len(first) != len(prompts):
            raise errors.ConfigError(f"{len(first)} seeds for {len(prompts)} prompts")
        seeds = [s for one in first for s in _seeds(one, n)]
        self._need("decoder", "drawing a picture")
        task, z_i = self._tasks["decoder"], None
        asked, embed = embed, embed or ("text" if task.embedding == "text" else "prior")
        if embed not in EMBEDS:
            raise errors.unknown("embed", embed, EMBEDS)
        if embed == "prior" and task.embedding == "text":
            raise errors.ConfigError(
                "embed 'prior': this decoder was trained on z_t in place of z_i; "
                "expected 'text' or 'none'"
            )
        unread = not task.model.use_z_i  # a text-only decoder (GLIDE, Imagen)
        if unread and asked not in (None, "none"):
            raise errors.ConfigError(
                f"embed {asked!r} would have no effect: this decoder reads the caption alone"
            )
        if prior and (unread or embed != "prior"):
            why = "reads the caption alone" if unread else f"is given z_i by embed={embed!r}"
            raise errors.ConfigError(
                f"settings of the prior ({', '.join(prior)}) would have no effect: this decoder "
                f"{why}"
            )
        drawn = ["prior"] * (embed == "prior" and not unread) + ["decoder"]
        _check_noise(noise, [*drawn, *self._running(stages, decoder, upsamplers)])
        chosen = {"decoder": decoder or {}}
        if unread:
            embed = None
        elif embed == "prior":
            z_i = self.draw_prior(wanted, seeds, noise=noise, **(prior or {}))
            chosen["prior"] = prior or {}
        else:
            z_i = self.embed_text(wanted)
        drawn = self.decode(
            z_i,
            wanted if caption else None,
            seeds,
            drop_image=embed == "none",
            decoder=decoder,
            upsamplers=upsamplers,
            stages=stages,
            noise=noise,
        )
        chosen |= dict(zip(self.upsamplers, upsamplers))
        settings = self.in_force(chosen, stages, noise, count=len(seeds))
        if embed not in (None, "prior"):
            settings["embed"] = embed
        if not caption:
            settings["caption"] = False
        recipes = [
            {"mode": "text", "prompt": p, "seed": s, **settings} for p, s in zip(wanted, seeds)
        ]
        return _pictures(drawn, recipes)

    def variations(
        self,
        image: np.ndarray,
        n: int = 4,
        seed: int = 0,
        *,
        decoder: dict | None = None,
        upsamplers: Sequence[dict] = (),
        stages: int | None = None,
        noise: Noise | None = None,
        name: str = "",
    ) -> Pictures:
        """Draws `n` pictures that share the embedding z_i of a picture (paper, section 3.1).

        Args:
          image: uint8 [H, W, 3]; a picture that is not square is cropped to its centre.
          name: of its file, for the recipe.
          Other arguments as in `generate`; the decoder draws as it was trained to without a
            caption, with guidance too.
        """
        self._need("clip", "variations of a picture")
        self._need("decoder", "variations")
        task = self._tasks["decoder"]
        if task.embedding == "text" or not task.model.use_z_i:
            read = "was trained on z_t (embedding='text')" if task.model.use_z_i else "reads none"
            raise errors.ConfigError(f"variations need a decoder of z_i; this one {read}")
        _check_noise(noise, ["decoder", *self._running(stages, decoder, upsamplers)])
        seeds = _seeds(seed, n)
        seen = for_clip(image, self._tasks["clip"].model.image_size)
        drawn = self.decode(
            self.embed_image(np.repeat(seen[None], n, axis=0)),
            None,
            seeds,
            decoder=decoder,
            upsamplers=upsamplers,
            stages=stages,
            noise=noise,
        )
        chosen = {"decoder": decoder or {}} | dict(zip(self.upsamplers, upsamplers))
        settings = self.in_force(chosen, stages, noise, count=n)
        settings["images"] = [image_files.source(image, name)]
        recipes = [{"mode": "variations", "prompt": "", "seed": s, **settings} for s in seeds]
        return _pictures(drawn, recipes)

    def redraw(self, recipe: Mapping, images: Sequence[np.ndarray] = ()) -> Pictures:
        """The picture of a recipe, drawn again: equal to the bit on the same device and versions.

        Args:
          recipe: of one picture (`files.images.read_recipe`).
          images: uint8 [H, W, 3], the pictures that it was drawn from, in the recipe's order.

        Raises:
          ConfigError: a recipe of another model, mode or other pictures, or one that is not whole.
        """
        given = lambda name, *kinds: _field(recipe, name, kinds)
        if given("model_hash", str) != self.model_hash:
            raise errors.ConfigError(
                f"the recipe is of model {recipe['model_hash']}, this is {self.model_hash}"
            )
        if "noise" in recipe:
            raise errors.ConfigError(f"the recipe's noise was {recipe['noise']}: not in the recipe")
        sources = recipe.get("images", [])
        found = [image_files.source(image)["sha256"] for image in images]
        if not isinstance(sources, list) or not all(isinstance(one, dict) for one in sources):
            raise errors.ConfigError("the recipe's images are damaged: expected a list of objects")
        if found != [one.get("sha256") for one in sources]:
            named = [f"{one.get('name')!r} ({one.get('sha256')})" for one in sources]
            raise errors.ConfigError(
                f"the recipe's pictures are {', '.join(named) or 'none'}; given "
                f"{', '.join(found) or 'none'} (sha256 of the pixels)"
            )
        # As many rows as then, that nothing is rounded otherwise.
        rows = recipe.get("batch_size", self.at_once(1))
        if type(rows) is int and 1 <= rows <= self.batch_size and not rows % self._ways:
            self = copy.copy(self)
            self._fixed = rows
        else:
            warnings.warn(
                f"drawn in batches of {rows}, here of {self.at_once(1)}: rounding may differ",
                stacklevel=2,
            )
        chosen: dict[str, dict] = {}
        for setting, values in recipe.items():
            for stage, value in values.items() if isinstance(values, dict) else ():
                if stage not in self._tasks:
                    raise errors.unknown(f"stage of the recipe's {setting}", stage, self._tasks)
                chosen.setdefault(stage, {})[setting] = value
        seed, stages = given("seed", int), given("stages", int)
        shared = {
            "decoder": chosen.pop("decoder", {}),
            "upsamplers": [chosen.pop(name, {}) for name in self.upsamplers[: max(stages, 1) - 1]],
            "stages": stages,
        }
        mode = given("mode", str)
        if mode == "text":
            embed, caption = recipe.get("embed"), recipe.get("caption", True) is not False
            shared |= {"prior": chosen.get("prior", {}), "embed": embed, "caption": caption}
            return self.generate(given("prompt", str), 1, seed, **shared)
        if mode == "variations" and len(images) == 1:
            name = str(sources[0].get("name", ""))
            return self.variations(images[0], 1, seed, name=name, **shared)
        raise errors.ConfigError(
            f"a recipe of mode {mode!r} from {len(images)} pictures: expected 'text' from none or "
            "'variations' from one"
        )

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of z_i and z_t, float32 [n], by this model's own CLIP."""
        return np.sum(unit(self.embed_image(images)) * unit(self.embed_text(prompts)), axis=-1)

    def in_force(
        self,
        chosen: dict[str, dict],
        stages: int | None = None,
        noise: Noise | None = None,
        *,
        count: int = 1,
    ) -> dict:
        """Every setting in force, for a recipe: {setting: {stage: value}}.

        Args:
          chosen: {stage: settings given}; of prior and decoder, those named are in force.
          stages, noise: as in `generate`; count: pictures of the call.
        """
        stages = stages or 1 + len(self.upsamplers)
        names = [n for n in ("prior", "decoder") if n in chosen] + self.upsamplers[: stages - 1]
        rows = self.at_once(count)
        out = {"model_hash": self.model_hash, "stages": stages, "batch_size": rows}
        if noise is not None:  # then the seeds alone do not draw the picture again
            out["noise"] = "given: " + ", ".join(noise)
        for name in names:
            for setting, value in (self._tasks[name].draw | chosen.get(name, {})).items():
                out.setdefault(setting, {})[name] = value
        return out


def _check_noise(noise: Noise | None, running: Sequence[str]) -> None:
    """Refuses noise of stages that do not draw."""
    for name in noise or {}:
        if name in STAGE_TAGS and name not in running:
            raise errors.ConfigError(
                f"noise of {name!r} would have no effect: here {', '.join(running)} draw"
            )


def lacking(parts: Mapping[str, bundle.Part]) -> dict[str, str]:
    """{mode of drawing: what `parts` lack for it, in words; "" where they can}."""
    missing = lambda *names: [f"no {name}" for name in names if name not in parts]
    if "decoder" not in parts:
        return dict.fromkeys(("text", "variations"), "no decoder")
    decoder = parts["decoder"]
    frozen = missing(*tasks.needs("decoder", decoder.arch, decoder.settings))
    reads = decoder.arch.get("use_z_i", True)
    trained_on_text = decoder.settings.get("embedding") == "text"
    text, variations = list(frozen), missing("clip")
    if reads and not trained_on_text:
        text += missing("clip", "prior")
    if not reads or trained_on_text:
        variations.append("no decoder of z_i")
    words = lambda reasons: " and ".join(dict.fromkeys(reasons))
    return {"text": words(text), "variations": words([*frozen, *variations])}


def _pictures(drawn: dict[str, np.ndarray], recipes: list[dict]) -> Pictures:
    stages = {name: to_uint8(pictures) for name, pictures in drawn.items()}
    return Pictures(list(stages.values())[-1], recipes, stages)


def _field(recipe: Mapping, name: str, kinds: tuple[type, ...]):
    """A recipe's field; ConfigError where it is missing or of another type."""
    value = recipe.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise errors.ConfigError(f"the recipe's {name} is {value!r}: expected {expected}")
    return value


def _split(draw: dict) -> tuple[tuple, dict]:
    """A draw's settings as (static items, traced floats)."""
    traced = {k: np.float32(v) for k, v in draw.items() if k in TRACED}
    return tuple(sorted((k, v) for k, v in draw.items() if k not in traced)), traced


def _seeds(seed: int, n: int) -> list[int]:
    if not 0 <= seed <= 2**32 - n:
        raise errors.ConfigError(f"seed {seed}: expected 0 <= seed and seed + n <= {2**32}")
    return list(range(seed, seed + n))
