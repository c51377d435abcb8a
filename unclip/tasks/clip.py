"""Training CLIP (section 2 and appendix C of the paper): contrastive loss over the global batch.

The joint embedding this stage learns is what the prior predicts and the decoder inverts. Other
stages use it frozen, through `FrozenClip`.
"""

import dataclasses
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from unclip import errors
from unclip.models import clip as clip_model
from unclip.models.transformer import stack_blocks
from unclip.tasks import base
from unclip.tasks.arrays import to_float, unit

LOSSES = ("softmax", "sigmoid")


def init_clip(model: clip_model.CLIP, key: jax.Array) -> dict:
    """Fresh parameters of both towers, float32."""
    batch = base.zeros(base.spec(1, image=model.image_size, tokens=model.context))
    return model.init(key, to_float(batch["image"]), batch["tokens"])["params"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ClipTask(base.Stage):
    """Both towers trained from pictures and captions.

    Args:
      arch: keyword arguments of `models.clip.CLIP`.
      objective: "softmax" (CLIP, InfoNCE both ways) or "sigmoid" (SigLIP, pairwise); configs call
        it `loss`.
    """

    objective: str = "softmax"

    stage = "clip"
    network, presets = clip_model.CLIP, clip_model.PRESETS
    measures = ("retrieval",)
    aliases = MappingProxyType({"loss": "objective"})

    def __post_init__(self):
        if self.objective not in LOSSES:
            raise errors.unknown("CLIP loss", self.objective, LOSSES)
        self._set(model=self.network(**self.arch))

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        size, context = self.model.image_size, self.model.context
        return base.spec(batch_size, image=size, tokens=context)

    def init(self, key: jax.Array) -> dict:
        return init_clip(self.model, key)

    def loss(self, params, frozen, batch, key, *, train):
        """Mean contrastive loss of the valid rows, every other row of the global batch a negative.

        Returns:
          (scalar, {"loss", "image_to_text", "text_to_image": top-1 in the batch, "temperature"}).
        """
        del frozen, key, train
        return self.contrast(params, *self.embed(params, batch), batch["valid"])

    def value_and_grad(self, params, frozen, batch, key, accumulate: int = 1):
        """`loss` of the whole batch and its gradient, a slice of the batch in memory at a time.

        The loss compares every row with every other, so the mean over microbatches is another
        loss. Here the embeddings of all slices are made first, without their activations; the loss
        gives its gradient with respect to them; then each slice is embedded once more and that
        gradient taken on to the parameters (arXiv 2101.06983; BASIC, arXiv 2111.10050, section 4).
        Costs one forward pass more than `loss`, whatever the number of slices.

        Args:
          accumulate: slices, a divisor of B; slice i holds rows i, i + accumulate, ... as in
            `runtime.optim.accumulate`, so that every device keeps its rows.

        Returns:
          ((scalar, metrics), gradients), as `jax.value_and_grad(loss, has_aux=True)` does.

        Raises:
          ConfigError: the batch does not divide.
        """
        if accumulate == 1:
            return super().value_and_grad(params, frozen, batch, key)
        size = len(batch["valid"])
        if size % accumulate:
            raise errors.ConfigError(
                f"a batch of {size} does not divide into {accumulate} microbatches"
            )

        def split(leaf):
            rows = leaf.reshape(size // accumulate, accumulate, *leaf.shape[1:])
            return jnp.swapaxes(rows, 0, 1)

        join = lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(size, *leaf.shape[2:])
        slices = jax.tree.map(split, {name: batch[name] for name in ("image", "tokens")})
        _, embedded = jax.lax.scan(lambda _, rows: (None, self.embed(params, rows)), None, slices)
        gradient = jax.value_and_grad(self.contrast, argnums=(0, 1, 2), has_aux=True)
        value, (grads, *wanted) = gradient(params, *map(join, embedded), batch["valid"])

        def body(total, part):
            rows, cotangents = part
            _, pull = jax.vjp(lambda p: self.embed(p, rows), params)
            return jax.tree.map(jnp.add, total, pull(cotangents)[0]), None

        # `grads` holds those of the temperature and the bias already, and zeros elsewhere.
        grads, _ = jax.lax.scan(body, grads, (slices, tuple(map(split, wanted))))
        return value, grads

    def sharpness_aware(self, params, frozen, batch, key, accumulate, rho, rows):
        """SAM, each group of `rows` neighbours with a point of its own (paper, appendix C: 64).

        As on replicas that share their embeddings alone: every group goes up the gradient of the
        whole loss that flows through its own rows, is embedded there, and all groups' embeddings
        are compared. `rows` = B is SAM on the whole batch.

        Args:
          accumulate: how many shares of the groups are embedded one after another; the others
            together, with as many copies of the parameters.
        """
        if not rows:
            return super().sharpness_aware(params, frozen, batch, key, accumulate, rho, rows)
        size = len(batch["valid"])
        if size % (rows * accumulate):
            raise errors.ConfigError(
                f"a batch of {size} does not divide into {accumulate} times groups of "
                f"sam_rows={rows}"
            )
        # Groups are neighbours; share i holds groups i, i + accumulate, ... of every device.
        shares = lambda leaf: jnp.swapaxes(
            leaf.reshape(-1, accumulate, rows, *leaf.shape[1:]), 0, 1
        )
        join = lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(size, *leaf.shape[3:])
        parts = jax.tree.map(shares, {name: batch[name] for name in ("image", "tokens")})
        contrast = jax.value_and_grad(self.contrast, argnums=(0, 1, 2), has_aux=True)

        def pull(at, own, cotangents):
            return jax.vjp(lambda p: self.embed(p, own), at)[1](cotangents)[0]

        _, embedded = jax.lax.scan(
            lambda _, own: (None, jax.vmap(lambda r: self.embed(params, r))(own)), None, parts
        )
        value, (shared, *wanted) = contrast(params, *map(join, embedded), batch["valid"])
        wanted = tuple(map(shares, wanted))

        def there(own, cotangents):
            """The point of one group; temperature and bias go up the gradient of all."""
            up = jax.tree.map(jnp.add, pull(params, own, cotangents), shared)
            step = rho / jnp.maximum(optax.tree.norm(up), 1e-12)
            return jax.tree.map(lambda p, g: p + (step * g).astype(p.dtype), params, up)

        def again(total, share):
            points = jax.vmap(there)(*share)
            mean = jax.tree.map(lambda t, p: t + p.mean(0) / accumulate, total, points)
            return mean, jax.vmap(self.embed)(points, share[0])

        zeros = jax.tree.map(jnp.zeros_like, params)
        middle, embedded = jax.lax.scan(again, zeros, (parts, wanted))
        _, (grads, *others) = contrast(middle, *map(join, embedded), batch["valid"])

        def back(total, share):
            own, up, cotangents = share
            found = jax.vmap(pull)(jax.vmap(there)(own, up), own, cotangents)
            return jax.tree.map(lambda t, g: t + g.sum(0), total, found), None

        grads, _ = jax.lax.scan(back, grads, (parts, wanted, tuple(map(shares, others))))
        return value, grads

    def embed(self, params, batch):
        """(z_i, z_t), float32 [B, D] each, not normalised."""
        images = clip_model.normalise(to_float(batch["image"]))
        z_i, z_t, _ = self.model.apply({"params": params}, images, batch["tokens"])
        return z_i.astype(jnp.float32), z_t.astype(jnp.float32)

    def contrast(self, params, z_i, z_t, valid):
        """The loss and its metrics from the embeddings of the whole batch, see `loss`."""
        scale, bias = self.model.apply({"params": params}, method="logit_scale_and_bias")
        similarity = unit(z_i) @ unit(z_t).T
        if self.objective == "softmax":
            losses = softmax_loss(similarity * scale, valid)
        else:
            losses = sigmoid_loss(similarity * scale + bias, valid)
        masked = jnp.where(valid[None, :] & valid[:, None], similarity, -jnp.inf)
        target = jnp.arange(len(valid))
        hit = lambda matrix: base.mean(jnp.argmax(matrix, axis=1) == target, valid)
        loss = base.mean(losses, valid)
        return loss, {
            "loss": loss,
            "image_to_text": hit(masked),
            "text_to_image": hit(masked.T),
            "temperature": 1.0 / scale,
        }

    def predict(self):
        return {
            "z_i": lambda params, frozen, batch, key: FrozenClip(self.model).image(
                params, batch["image"]
            ),
            "z_t": lambda params, frozen, batch, key: FrozenClip(self.model).text(
                params, batch["tokens"]
            )[0],
        }


def softmax_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Symmetric cross-entropy of the matching pair (arXiv 2103.00020, figure 3); float32 [B].

    Args:
      logits: [B, B], row = picture, column = caption, scaled by the inverse temperature.
      valid: bool [B]; rows that only pad the batch are no negatives.
    """
    logits = jnp.where(valid[None, :] & valid[:, None], logits, -1e9)
    target = jnp.arange(logits.shape[0])
    cross = optax.softmax_cross_entropy_with_integer_labels
    return (cross(logits, target) + cross(logits.T, target)) / 2


def sigmoid_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Pairwise sigmoid loss summed over a picture's captions (arXiv 2303.15343, eq. 1); [B]."""
    sign = 2 * jnp.eye(logits.shape[0]) - 1
    pairs = -jax.nn.log_sigmoid(sign * logits)
    return jnp.where(valid[None, :] & valid[:, None], pairs, 0.0).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class FrozenClip:
    """A trained CLIP as the later stages use it: no gradient, float32 results.

    Args:
      model: its network.
      fold: run the blocks under a scan whatever the layout of the parameters, which are stacked on
        the way in: a program with one block a tower in place of all compiles much sooner.
    """

    model: clip_model.CLIP
    fold: bool = False

    def init(self, key: jax.Array) -> dict:
        """Random parameters float32, for benchmarks and for shapes."""
        return init_clip(self.model, key)

    def _apply(self, params, inputs, method):
        model = self.model
        if self.fold and not model.fold:
            model, params = model.clone(fold=True), stack_blocks(params)
        return model.apply({"params": params}, inputs, method=method)

    def image(self, params, images: jax.Array) -> jax.Array:
        """z_i [B, D], not normalised, of uint8 or [-1, 1] float pictures of any size."""
        if images.dtype == jnp.uint8:
            images = to_float(images)
        images = clip_model.resize_for_clip(images, self.model.image_size)
        z_i = self._apply(params, images, "encode_image")
        return jax.lax.stop_gradient(z_i.astype(jnp.float32))

    def text(self, params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(z_t [B, D] not normalised, hidden [B, L, W] after the final norm).

        Captions longer than CLIP's context L end where it does: a stage with a text transformer of
        its own may read on.
        """
        tokens = jnp.asarray(tokens)
        context, end = self.model.context, self.model.vocab_size - 1
        if tokens.shape[1] > context:
            last = jnp.where(tokens[:, context - 1 :] != 0, end, 0).max(axis=1)
            tokens = tokens[:, :context].at[:, -1].set(last)
        z_t, hidden = self._apply(params, tokens, "encode_text")
        return jax.lax.stop_gradient((z_t.astype(jnp.float32), hidden.astype(jnp.float32)))

    def empty(self, batch_size: int, context: int | None = None) -> tuple[jax.Array, jax.Array]:
        """The empty caption: (tokens int32 [B, L], mask bool [B, L]), start and end alone."""
        start, end = self.model.vocab_size - 2, self.model.vocab_size - 1
        tokens = jnp.zeros((batch_size, context or self.model.context), jnp.int32)
        tokens = tokens.at[:, 0].set(start).at[:, 1].set(end)
        return tokens, jnp.arange(tokens.shape[1])[None, :].repeat(batch_size, 0) < 2
