"""Pictures in and out: PNG files that carry the recipe to make them again, grids, user input.

A generated PNG holds two text chunks: `parameters`, the text that AUTOMATIC1111's web UI writes
and many tools read, and `unclip`, our recipe as JSON, which is exact. The recipe has what is needed
to draw the picture again: the model's hash, mode, prompt, seed and every setting; of a picture that
it was drawn from, name, hash and, where that one was drawn too, its own recipe, so that a chain of
edits is whole in its last picture. A grid has the recipes of all of its pictures.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from unclip import errors
from unclip.files import picture as pictures
from unclip.files import replacing

MAX_RECIPE_CHARS = 256 << 10
_DEPTH = 100  # edits of a chain that are described
MAX_SOURCE_CHARS = 64 << 10  # of the recipe of a source: a recipe is written twice, once quoted

# Recipe field -> the name AUTOMATIC1111 gives it, in its order.
_KNOWN = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
}
_FIELDS = {label.lower(): field for field, label in _KNOWN.items()}
_TEXT_FIELDS = ("sampler", "size", "model_hash")
_PAIR = re.compile(r'\s*(\w[\w /-]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write_png(
    path: str | os.PathLike, image: np.ndarray, recipe: Mapping[str, Any] | None = None
) -> None:
    """Writes one picture as PNG with its recipe in text chunks, atomically.

    Args:
      path: the file; replaced when it exists.
      image: uint8 [H, W, 3] RGB.
      recipe: JSON-able; `prompt`, `negative_prompt`, `steps`, `sampler`, `guidance`, `seed` and
        `model_hash` get their AUTOMATIC1111 names, any other key is written after them.

    Raises:
      ConfigError: the recipe cannot be written as JSON.
      DataError: the file cannot be written.
      ValueError: the picture is not uint8 [H, W, 3].
    """
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        recipe = _plain(recipe)
        height, width = _checked(image).shape[:2]
        chunks.add_text("parameters", format_parameters(recipe, f"{width}x{height}"))
        chunks.add_text("unclip", json.dumps(recipe, sort_keys=True, allow_nan=False))
    with replacing(path) as temporary:
        Image.fromarray(_checked(image)).save(temporary, format="PNG", pnginfo=chunks)


def read_recipe(path: str | os.PathLike) -> dict[str, Any] | None:
    """The recipe inside a PNG, or None where it has none. Pixels are not decoded.

    Our JSON is preferred; a PNG of another program gives what its `parameters` text says. Nothing
    in it can be trusted: values have any JSON type and any content.

    Raises:
      DataError: the file cannot be read, is not a PNG, or its text is beyond the limits.
    """
    with _reported(path, ("PNG",)), pictures.opened(path, formats=("PNG",)) as picture:
        # `.info` holds the chunks before the pixels; `.text` would decode the whole picture.
        texts = [picture.info.get(key) for key in ("unclip", "parameters")]
    text, parameters = (
        str(text) if isinstance(text, str) and len(text) <= MAX_RECIPE_CHARS else None
        for text in texts
    )
    if text is not None:
        try:
            recipe = json.loads(text)
        except (ValueError, RecursionError):
            recipe = None  # damaged: the plain text below may still be whole
        if isinstance(recipe, dict):
            return recipe
    return parse_parameters(parameters) if parameters is not None else None


@dataclasses.dataclass(frozen=True)
class Source:
    """A picture that others are drawn from.

    Attributes:
      pixels: uint8 [H, W, 3], upright RGB.
      name: of its file, "" where there is none.
      recipe: how it was drawn itself; None for any other picture.
    """

    pixels: np.ndarray
    name: str = ""
    recipe: Mapping[str, Any] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What a recipe says of it: `source`."""
        return source(self.pixels, self.name, self.recipe)


def open_source(path: str | os.PathLike) -> Source:
    """A user's picture with its name and, where it is a PNG of ours, its recipe.

    Raises:
      DataError: as `read_image`.
    """
    pixels, recipe = read_image(path), None
    with contextlib.suppress(errors.DataError):  # JPEG and WebP
        recipe = read_recipe(path)
    return Source(pixels, os.path.basename(os.fspath(path)), kept_recipe(recipe))


def kept_recipe(recipe: Any) -> dict[str, Any] | None:
    """A recipe as others may carry it, or None for one that no model of ours can repeat.

    A recipe of more than `MAX_SOURCE_CHARS` is not kept: the chain begins at its picture then.
    """
    if not isinstance(recipe, Mapping) or "grid_columns" in recipe:
        return None
    if not all(isinstance(recipe.get(name), str) for name in ("mode", "model_hash")):
        return None
    try:
        plain = _plain(recipe)
    except errors.ConfigError:
        return None
    return plain if len(json.dumps(plain)) <= MAX_SOURCE_CHARS else None


def source(
    image: np.ndarray, path: str | os.PathLike = "", recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a recipe says of a picture that others are drawn from.

    Args:
      image: uint8 [H, W, 3], as `read_image` gives it; path: of its file, whose name is kept.
      recipe: how it was drawn itself, as `kept_recipe` gives it.

    Returns:
      {"name", "width", "height", "sha256": hex, of the pixels row by row} and "recipe" where there
      is one.
    """
    image = _checked(image)
    height, width = image.shape[:2]
    hashed = hashlib.sha256(f"{width}x{height} RGB uint8\n".encode() + image.tobytes())
    name = os.path.basename(os.fspath(path))
    found = {"name": name, "width": width, "height": height, "sha256": hashed.hexdigest()}
    return found | ({"recipe": dict(recipe)} if recipe else {})


def grid_recipe(recipes: Sequence[Mapping[str, Any]], columns: int) -> dict[str, Any]:
    """The recipe of a grid: what its pictures share, and in "pictures" each one's own, row by row.

    Where that is longer than a recipe may be, "pictures" is their number: each has its own PNG.
    """
    recipes = [_plain(recipe) for recipe in recipes]
    first = recipes[0] if recipes else {}
    shared = {k: v for k, v in first.items() if all(k in r and r[k] == v for r in recipes)}
    own = [{k: v for k, v in recipe.items() if k not in shared} for recipe in recipes]
    found = shared | {"grid_columns": columns, "pictures": own}
    if len(json.dumps(found)) > MAX_RECIPE_CHARS:
        found["pictures"] = len(own)
    return found


def recipes_of(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipes of a grid's pictures, the inverse of `grid_recipe`; of a picture, its own alone.

    Raises:
      ConfigError: a grid whose pictures' recipes were too long to be kept.
    """
    if "grid_columns" not in recipe:
        return [dict(recipe)]
    shared = {k: v for k, v in recipe.items() if k not in ("grid_columns", "pictures")}
    own = recipe.get("pictures")
    if not isinstance(own, list) or not all(isinstance(one, dict) for one in own):
        raise errors.ConfigError("a grid without its pictures' recipes: each is in its own PNG")
    return [shared | one for one in own]


def described(recipe: Mapping[str, Any], depth: int = 0) -> list[str]:
    """A recipe in lines for people: plain fields, a table of the stages' settings, its sources.

    What it holds is untrusted: any value is shown as one printable line of 200 signs at most.
    """
    recipe, lines, pad = dict(recipe), [], "  " * depth
    sources, pictures = recipe.pop("images", None), recipe.pop("pictures", None)
    staged = {name: value for name, value in recipe.items() if isinstance(value, Mapping)}
    order = ["mode", "prompt", "negative_prompt", "from_prompt", "seed"]
    first = [name for name in order if name in recipe]
    rest = sorted(recipe.keys() - staged.keys() - set(first))
    width = max((len(_shown(name)) for name in [*first, *rest]), default=0)
    for name in [*first, *rest]:
        lines.append(f"{pad}{_shown(name):<{width}}  {_shown(recipe[name])}")
    if staged:
        stages = sorted({_shown(stage) for values in staged.values() for stage in values})
        rows = [["", *stages]]
        for name, values in sorted(staged.items()):
            values = {_shown(stage): value for stage, value in values.items()}
            cells = [_shown(values[stage]) if stage in values else "-" for stage in stages]
            rows.append([_shown(name), *cells])
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)) for row in rows)
        lines += [f"{pad}{line}".rstrip() for line in table]
    for number, one in enumerate(sources if isinstance(sources, list) else [], 1):
        one = dict(one) if isinstance(one, Mapping) else {"name": one}
        own = one.pop("recipe", None)
        size = f"{_shown(one.get('width'))}x{_shown(one.get('height'))}"
        what = "drawn by" if isinstance(own, Mapping) else "given"
        lines.append(
            f"{pad}drawn from {number}: {_shown(one.get('name')) or 'a picture'}, {size}, sha256 "
            f"{_shown(one.get('sha256'))}, {what}{':' if isinstance(own, Mapping) else ''}"
        )
        if isinstance(own, Mapping):
            lines += described(own, depth + 1) if depth < _DEPTH else [f"{pad}  …"]
    if isinstance(pictures, list):
        for number, one in enumerate(pictures, 1):
            lines.append(f"{pad}picture {number}:")
            lines += described(one, depth + 1) if isinstance(one, Mapping) else []
    elif pictures is not None:
        lines.append(f"{pad}pictures  {_shown(pictures)}")
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    return text if len(text) <= 200 else text[:199] + "…"


def format_parameters(recipe: Mapping[str, Any], size: str | None = None) -> str:
    """The `parameters` text of a recipe, as AUTOMATIC1111's web UI writes and reads it.

    A field given per stage ({"prior": 25, "decoder": 50}) puts the decoder's value under the known
    name and the other stages' under their own ("Prior steps: 25").
    """
    recipe = {name: value for name, value in recipe.items() if name != "pictures"}
    prompt = str(recipe.pop("prompt", None) or "")
    negative = str(recipe.pop("negative_prompt", None) or "")
    if size is not None:
        recipe["size"] = size
    pairs, extra = {}, {}
    for field, label in _KNOWN.items():
        value = recipe.pop(field, None)
        if isinstance(value, Mapping):
            stages = dict(value)
            value = stages.pop("decoder", None)
            extra |= {f"{stage} {field}": item for stage, item in stages.items()}
        if value is not None:
            pairs[label] = str(value) if field in _TEXT_FIELDS else _quoted(value)
    for key, value in [*extra.items(), *sorted(recipe.items())]:
        label = re.sub(r"[^\w/-]+", " ", str(key).replace("_", " ")).strip()
        if label and value is not None:
            pairs.setdefault(label[0].upper() + label[1:], _quoted(value))
    lines = [prompt]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{label}: {value}" for label, value in pairs.items()))
    # A chunk's text cannot hold NUL, nor the lone surrogates of undecodable command-line bytes.
    return "\n".join(lines).replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def parse_parameters(text: str) -> dict[str, Any]:
    """Reads a `parameters` text into recipe fields: the inverse of `format_parameters`.

    Returns `prompt`, `negative_prompt` when there is one, and the settings of the last line with
    numbers as numbers: known names under our field names, others lower-case with underscores.
    Nested values stay JSON text; the `unclip` chunk has them exactly. Never raises on a string.
    """
    lines = text.strip("\n").split("\n")
    pairs = _PAIR.findall(lines[-1])
    # The web UI takes the last line as settings where it has at least three pairs; ours always has
    # "Size".
    is_settings = len(pairs) >= 3 or any(key.strip() == "Size" for key, _ in pairs)
    if is_settings:
        lines.pop()
    else:
        pairs = []
    negative_at = next((i for i, s in enumerate(lines) if s.startswith("Negative prompt:")), None)
    recipe: dict[str, Any] = {"prompt": "\n".join(lines[:negative_at]).strip()}
    if negative_at is not None:
        negative = "\n".join(lines[negative_at:]).removeprefix("Negative prompt:").strip()
        recipe["negative_prompt"] = negative
    for label, value in pairs:
        label = label.strip().lower()
        field = _FIELDS.get(label, label.replace(" ", "_"))
        recipe[field] = value.strip() if field in _TEXT_FIELDS else _unquoted(value.strip())
    return recipe


def columns_of(count: int, columns: int | None = None) -> int:
    """Pictures in a row of a grid of `count`; None for one that is nearly square."""
    return min(columns or math.ceil(math.sqrt(count)), count)


def grid(
    images: Sequence[np.ndarray] | np.ndarray,
    columns: int | None = None,
    pad: int = 2,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Lays pictures out in rows on white.

    Args:
      images: N pictures, uint8 [H, W, 3], all of one size.
      columns: pictures in a row; None for a grid that is nearly square.
      pad: white pixels around each picture.
      labels: a line of text below each picture, cut to its width; "" for none.

    Returns:
      uint8 [rows * (H + text + pad) + pad, columns * (W + pad) + pad, 3].

    Raises:
      ValueError: no pictures, unequal shapes, or another number of labels.
    """
    images = [_checked(image) for image in images]
    if not images or len({image.shape for image in images}) != 1:
        shapes = sorted({image.shape for image in images})
        raise ValueError(f"a grid needs one or more pictures of one shape, got {shapes}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(labels)} labels")
    height, width = images[0].shape[:2]
    columns = columns_of(len(images), columns)
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(max(9, min(14, width // 10)))
    text = 0 if labels is None else int(font.getbbox("Ág")[3]) + 3
    cell_h, cell_w = height + text + pad, width + pad
    canvas = Image.new("RGB", (columns * cell_w + pad, rows * cell_h + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = pad + column * cell_w, pad + row * cell_h
        canvas.paste(Image.fromarray(image), (left, top))
        if labels is not None:
            line = _fitted(draw, font, labels[number], width)
            draw.text((left, top + height + 1), line, fill="black", font=font)
    return np.asarray(canvas)


def contact_sheet(
    images: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    *,
    side: int = 128,
    columns: int | None = None,
) -> np.ndarray:
    """A grid of pictures of any sizes, each made to fit a white square of `side` pixels.

    Args:
      images: uint8 [H, W, 3] each; a small one is enlarged by a whole factor, so that its pixels
        stay what they are.
      labels, columns: as in `grid`.

    Returns:
      uint8 [rows, columns, 3].
    """
    cells = []
    for image in images:
        picture, cell = Image.fromarray(_checked(image)), Image.new("RGB", (side, side), "white")
        factor = max(side // max(picture.size), 1)
        if factor > 1:
            picture = picture.resize([factor * n for n in picture.size], Image.Resampling.NEAREST)
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        cell.paste(picture, tuple((side - n) // 2 for n in picture.size))
        cells.append(np.asarray(cell))
    return grid(cells, columns, labels=labels)


def save_animation(
    path: str | os.PathLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    milliseconds: int = 100,
    there_and_back: bool = True,
) -> pathlib.Path:
    """Writes pictures as a lossless animated WebP that repeats for ever, atomically.

    Args:
      path: ends in .webp; replaced when it exists.
      frames: uint8 [H, W, 3] each, of one size, two at least; milliseconds: that each is shown.
      there_and_back: after the last frame come those before it, backwards.

    Raises:
      ConfigError: another ending, or fewer than two frames. DataError: it cannot be written.
    """
    check_animation(path, len(frames))
    whole = [Image.fromarray(_checked(frame)) for frame in frames]
    whole += whole[-2:0:-1] if there_and_back else []
    with replacing(path) as temporary:
        whole[0].save(
            temporary,
            format="WEBP",
            lossless=True,
            save_all=True,
            append_images=whole[1:],
            duration=milliseconds,
            loop=0,
        )
    return pathlib.Path(path)


def check_animation(path: str | os.PathLike, frames: int) -> None:
    """Refuses what `save_animation` would: call it before the frames are drawn."""
    if pathlib.Path(path).suffix.lower() != ".webp":
        raise errors.ConfigError(f"animation {path}: expected a name that ends in .webp")
    if frames < 2:
        raise errors.ConfigError(f"an animation of {frames} pictures: expected at least 2")


def save_pictures(
    pictures: Sequence[np.ndarray] | np.ndarray,
    recipes: Sequence[Mapping[str, Any]],
    out_dir: str | os.PathLike,
    *,
    grid_columns: int | None = None,
    labels: Sequence[str] | None = None,
    with_grid: bool = True,
) -> list[pathlib.Path]:
    """Saves pictures as `0000-seed1234.png`, … and a `grid-0000.png`; nothing is overwritten.

    Numbering continues from the highest in the folder, and names never come from a prompt. Two
    processes may write to one folder.

    Args:
      pictures: uint8 [N, H, W, 3] or a list of uint8 [H, W, 3].
      recipes: one per picture; its integer `seed`, when there, becomes part of the name.
      out_dir: made when missing.
      grid_columns: pictures in a row of the grid.
      labels: lines of text below the pictures of the grid.
      with_grid: also save the grid, when there are two pictures or more.

    Returns:
      The pictures' paths in order, then the grid's when one was saved.

    Raises:
      DataError: the folder cannot be written.
    """
    if len(pictures) != len(recipes):
        raise ValueError(f"{len(pictures)} pictures but {len(recipes)} recipes")
    out_dir = writable_folder(out_dir)
    names = [entry.name for entry in os.scandir(out_dir)]
    number = _next_number(names, r"(\d{4,})(?:-seed-?\d+)?\.png")
    paths = []
    for picture, recipe in zip(pictures, recipes):
        seed = recipe.get("seed")
        suffix = "" if seed is None else f"-seed{int(seed)}"
        path = _reserve(out_dir, number, f"{{:04d}}{suffix}.png")
        number = int(path.name[: -len(suffix) - 4]) + 1
        _fill(path, picture, recipe)
        paths.append(path)
    if with_grid and len(paths) > 1:
        paths.append(save_grid(pictures, out_dir, grid_columns, labels, recipes))
    return paths


def save_grid(
    pictures: Sequence[np.ndarray] | np.ndarray,
    out_dir: str | os.PathLike,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    recipes: Sequence[Mapping[str, Any]] = (),
) -> pathlib.Path:
    """Saves a grid of pictures as the folder's next `grid-0000.png`.

    Args:
      recipes: one a picture; other arguments as in `grid`.

    Raises:
      DataError: the folder cannot be written.
    """
    out_dir = writable_folder(out_dir)
    names = [entry.name for entry in os.scandir(out_dir)]
    path = _reserve(out_dir, _next_number(names, r"grid-(\d{4,})\.png"), "grid-{:04d}.png")
    recipe = grid_recipe(recipes, columns_of(len(pictures), columns)) if recipes else None
    _fill(path, grid(pictures, columns, labels=labels), recipe)
    return path


def writable_folder(path: str | os.PathLike) -> pathlib.Path:
    """Makes a folder and tests that it can be written; call it before hours of sampling.

    Raises:
      DataError: it cannot be made, or no file can be made in it.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise errors.DataError(f"cannot write to folder {path}: {error.strerror}") from error
    return path


def read_image(path: str | os.PathLike, size: int | None = None) -> np.ndarray:
    """Reads a user's JPEG, PNG or WebP picture.

    The camera's orientation is applied and transparency is laid over white; of an animation the
    first frame is taken.

    Args:
      path: a file within the limits of `unclip.files.picture`.
      size: crop the centre square and resize it to size x size (bicubic, antialiased); None leaves
        the picture's size.

    Returns:
      uint8 [H, W, 3] RGB.

    Raises:
      DataError: not there, too large, damaged or of another format.
    """
    with _reported(path, pictures.FORMATS), pictures.upright(path) as picture:
        if getattr(picture, "is_animated", False):
            warnings.warn(f"{path} is animated: its first frame is taken", stacklevel=2)
        picture = pictures.rgb(picture)
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        # Cropped first: the filter of `resize(box=…)` would reach beyond the box.
        picture = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture)


@contextlib.contextmanager
def _reported(path: str | os.PathLike, formats: Sequence[str]) -> Iterator[None]:
    """Names the file in what `unclip.files.picture` refuses: a one-line `DataError`."""
    try:
        yield
    except pictures.PictureError as error:
        what = {
            "unreadable": f"cannot read {path}: {error.detail}",
            "format": f"{path} is not a {'/'.join(formats)} picture",
            "too-many-bytes": f"picture {path} is larger than {pictures.MAX_BYTES >> 20} MiB",
            "too-many-pixels": (
                f"picture {path} is larger than {pictures.MAX_PIXELS >> 20} megapixels"
            ),
        }
        usual = f"cannot read picture {path}: {error.detail}"
        raise errors.DataError(what.get(error.reason, usual)) from error


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return np.ascontiguousarray(image)


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as JSON has it: numpy and jax scalars and arrays become numbers and lists."""
    try:
        text = json.dumps(dict(recipe), default=lambda v: np.asarray(v).tolist(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(f"recipe cannot be written as JSON: {error}") from error
    return json.loads(text)


def _quoted(value: Any) -> str:
    """A setting's text: quoted when it has , : " or a line break, or would read as a number."""
    if not isinstance(value, str):
        text = json.dumps(value)
        return json.dumps(text) if isinstance(value, list | dict) else text
    bare = value == value.strip() and value == _unquoted(value) and not re.search(r'[,:\n"]', value)
    return value if bare else json.dumps(value, ensure_ascii=False)


def _unquoted(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, list | dict) else value


def _fitted(draw: ImageDraw.ImageDraw, font: Any, label: str, width: int) -> str:
    # Pillow's own font has little beyond ASCII: accents are dropped rather than drawn as boxes.
    ascii_label = unicodedata.normalize("NFKD", str(label)).encode("ascii", "ignore").decode()
    line = " ".join(ascii_label.split())[:200]
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(line + "…", font) > width:
        line = line[:-1]
    return line + "…" if line else ""


def _next_number(names: Sequence[str], pattern: str) -> int:
    matches = (re.fullmatch(pattern, name, re.ASCII) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _reserve(folder: pathlib.Path, number: int, template: str) -> pathlib.Path:
    """Creates the first free name, exclusively, so that a second process cannot take it."""
    for candidate in itertools.count(number):
        path = folder / template.format(candidate)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise errors.DataError(f"cannot write {path}: {error.strerror}") from error


def _fill(path: pathlib.Path, image: np.ndarray, recipe: Mapping[str, Any] | None) -> None:
    try:
        write_png(path, image, recipe)
    except BaseException:
        path.unlink(missing_ok=True)  # the empty reservation, not a picture
        raise
