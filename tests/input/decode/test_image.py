"""Pictures: what decodes, what is refused and why, and the degradations against plain NumPy."""

import io
import pickle
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.input.decode import image as im
from unclip.input.decode import jpeg
from unclip.input.decode.image import BadPicture, decode


def encode(picture, form, **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(
        buffer, form, **options
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def smooth():
    """uint8 [40, 56, 3], smooth enough for JPEG to keep, different in every corner and channel."""
    y, x = np.mgrid[0:40, 0:56]
    return np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8)


def reason(data, **options):
    with pytest.raises(BadPicture) as error:
        decode(data, **options)
    assert isinstance(error.value, DataError)
    assert pickle.loads(pickle.dumps(error.value)).reason == error.value.reason
    assert error.value.reason in im.REASONS
    return error.value.reason


def close(a, b, tolerance):
    assert a.dtype == np.uint8 and a.shape == b.shape
    assert np.abs(a.astype(int) - b).max() <= tolerance


@pytest.mark.parametrize(
    "form, options, tolerance",
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 8),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
    ],
)
def test_formats(smooth, form, options, tolerance):
    close(decode(encode(smooth, form, **options)), smooth, tolerance)


def test_modes(smooth):
    grey = smooth[..., 0]
    three = np.stack([grey] * 3, -1)
    assert np.array_equal(decode(encode(grey, "PNG")), three)
    close(decode(encode(grey, "JPEG", quality=95)), three, 4)
    cmyk = Image.fromarray(smooth).convert("CMYK")
    close(decode(encode(cmyk, "JPEG", quality=100)), smooth, 8)
    palette = Image.fromarray(smooth).quantize(16)
    assert np.array_equal(decode(encode(palette, "PNG")), np.array(palette.convert("RGB")))
    one_bit = Image.fromarray(grey).convert("1")
    assert np.array_equal(decode(encode(one_bit, "PNG"))[..., 0], np.array(one_bit) * np.uint8(255))


def test_sixteen_bit_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 200 * 257, 65535, 300]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(decode(encode(values, "PNG"))[..., 0], expected)


def test_alpha_lies_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 128]]], np.uint8)
    expected = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0) + 255 - rgba[..., 3:]).astype(int)
    close(decode(encode(rgba, "PNG")), expected, 1)
    close(decode(encode(rgba, "WEBP", lossless=True, exact=True)), expected, 1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    assert decode(encode(palette, "PNG", transparency=0)).tolist() == [[[255] * 3, [7] * 3]]
    grey = Image.fromarray(np.array([[5, 6]], np.uint8))
    assert decode(encode(grey, "PNG", transparency=5))[0, :, 0].tolist() == [255, 6]


def png(array, colour, *, depth=8, chunks=()):
    """A PNG by its specification: array [H, W, channels] of samples, colour type, extra chunks."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = array.shape[:2]
    rows = np.asarray(array, ">u2" if depth == 16 else np.uint8).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [8, 16])
def test_png_of_every_colour_type_against_its_specification(depth):
    top = 2**depth - 1
    rng = np.random.default_rng(depth)
    grey, colour, alpha = (rng.integers(0, top + 1, (9, 7, n)) for n in (1, 3, 1))
    alpha[:3], alpha[3:5] = 0, top

    def eight(samples, opacity=top):
        return np.rint(255 * (samples * opacity + top * (top - opacity)) / top**2)

    close(decode(png(grey, 0, depth=depth)), np.tile(eight(grey), 3), 0)
    close(decode(png(colour, 2, depth=depth)), eight(colour), depth // 16)
    close(
        decode(png(np.concatenate([grey, alpha], -1), 4, depth=depth)),
        np.tile(eight(grey, alpha), 3),
        2,
    )
    close(decode(png(np.concatenate([colour, alpha], -1), 6, depth=depth)), eight(colour, alpha), 2)


def test_png_palette_with_alpha_and_one_bit():
    indices = np.array([[0, 1, 2], [2, 1, 0]])
    palette = np.array([[10, 20, 30], [200, 100, 0], [1, 2, 3]])
    opacity = np.array([255, 128, 0])
    data = png(
        indices,
        3,
        chunks=[
            (b"PLTE", palette.astype(np.uint8).tobytes()),
            (b"tRNS", opacity.astype(np.uint8).tobytes()),
        ],
    )
    over_white = np.rint((palette * opacity[:, None] + 255 * (255 - opacity[:, None])) / 255)
    close(decode(data), over_white[indices], 1)
    assert decode(png(np.array([[0b10100000]]), 0, depth=1, chunks=[])).tolist() == [[[255] * 3]]


def test_ycck_jpeg(smooth):
    """Adobe's YCCK: cyan, magenta and yellow as YCbCr, and black inverted."""
    black = np.full((40, 56, 1), 40, np.uint8)
    file = io.BytesIO()
    ycc = np.array(Image.fromarray(255 - smooth).convert("YCbCr"))
    # Pillow stores 255 - x of each ink unchanged; then the marker's transform byte says YCCK.
    stored = np.concatenate([255 - ycc, black], -1)
    Image.fromarray(stored, "CMYK").save(file, "JPEG", quality=100, subsampling=0)
    data = bytearray(file.getvalue())
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    data[at + 11] = 2
    expected = smooth.astype(float) * (255 - 40) / 255
    close(decode(bytes(data)), np.rint(expected), 10)


def test_animated_png_gives_its_first_frame(smooth):
    data = encode(smooth, "PNG", save_all=True, append_images=[Image.fromarray(255 - smooth)])
    assert b"acTL" in data and np.array_equal(decode(data), smooth)


UPRIGHT = {  # EXIF 2.3, tag 274: how the stored picture is turned to be seen upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    99: lambda a: a,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(smooth, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    expected = UPRIGHT[orientation](smooth)
    assert np.array_equal(decode(encode(smooth, "PNG", exif=exif)), expected)
    close(decode(encode(smooth, "JPEG", quality=95, exif=exif)), expected, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture(smooth):
    data = encode(smooth, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fjunk")
    close(decode(data), smooth, 8)


def test_animation_gives_its_first_frame(smooth):
    second = Image.fromarray(255 - smooth)
    data = encode(smooth, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(decode(data), smooth)


def test_limits(smooth):
    data = encode(smooth, "PNG")
    assert reason(data, max_bytes=len(data) - 1) == "too-many-bytes"
    assert reason(data, max_pixels=40 * 56 - 1) == "too-many-pixels"
    assert reason(data, min_side=41) == "too-small"
    assert decode(data, max_bytes=len(data), max_pixels=40 * 56, min_side=40).shape == (40, 56, 3)


def test_other_formats_and_no_format(smooth):
    for form in ["GIF", "BMP", "TIFF", "PPM"]:
        assert reason(encode(smooth, form)) == "format"
    assert reason(b"") == reason(b"hello") == "format"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_is_named(form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(noise, form)
    for size in range(40, len(data) - 16, len(data) // 20):
        assert reason(data[:size]) in ("truncated", "corrupt", "format"), size
    if form != "WEBP":
        assert reason(data[: len(data) // 2]) == "truncated"


def test_bit_flips_end_in_a_picture_or_a_reason(smooth):
    rng = np.random.default_rng(1)
    outcomes = 0
    for form in ["PNG", "JPEG", "WEBP"]:
        data = encode(smooth, form)
        for _ in range(200):
            damaged = bytearray(data)
            for at in rng.integers(len(data), size=3):
                damaged[at] ^= 1 << int(rng.integers(8))
            try:
                assert decode(bytes(damaged), max_pixels=1 << 16).ndim == 3
            except BadPicture as error:
                assert error.reason in im.REASONS
            outcomes += 1
    assert outcomes == 600


def bombs():
    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    for side in (65_000, 10_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        yield b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")
    jpeg = bytearray(encode(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    yield bytes(jpeg)
    webp = bytearray(
        encode(
            np.zeros((8, 8, 4), np.uint8),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGBA", (8, 8), "red")],
        )
    )
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_000 - 1).to_bytes(3, "little") * 2
    yield bytes(webp)
    for options, at in (({"lossless": True}, 21), ({}, 26)):
        webp = bytearray(encode(np.zeros((8, 8, 3), np.uint8), "WEBP", **options))
        if options:
            webp[at : at + 4] = (16_000 - 1 | (16_000 - 1) << 14).to_bytes(4, "little")
        else:
            webp[at : at + 4] = struct.pack("<2H", 16_000, 16_000)
        yield bytes(webp)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", bombs(), ids=["png", "png-10k", "jpeg", "vp8x", "vp8l", "vp8"])
def test_bombs_are_refused_by_their_header(bomb):
    tracemalloc.start()
    start = time.perf_counter()
    assert reason(bomb) == "too-many-pixels"
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 4 << 20


def test_reduced_jpeg_keeps_twice_the_target():
    y, x = np.mgrid[0:800, 0:1000]
    data = encode(np.stack([x / 4, y / 4, (x + y) / 8], -1).astype(np.uint8), "JPEG", quality=95)
    full = decode(data)
    shapes = {50: (100, 125), 51: (200, 250), 101: (400, 500), 300: (800, 1000)}
    for target, shape in shapes.items():
        reduced = decode(data, target=target)
        assert reduced.shape == (*shape, 3) and min(shape) >= min(2 * target, 800)
        ours, _ = im.resize_and_crop(reduced, target)
        exact, _ = im.resize_and_crop(full, target)
        close(ours, exact, 6)


def photograph(k, height=160, width=208):
    """uint8 [height, width, 3] with a photograph's falling spectrum and one hard edge."""
    rng = np.random.default_rng(k)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    layers = np.fft.irfft2(phases / frequency**1.4, s=(height, width))
    layers /= layers.std((1, 2), keepdims=True)
    layers[:, height // 3 :, width // 2 :] -= 1
    return np.clip(128 + 45 * layers.transpose(1, 2, 0), 0, 255).astype(np.uint8)


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "rough": {"quality": 5},
    "restarts": {"restart_marker_blocks": 3},
    "rgb": {"keep_rgb": True},
    "grey": {},
    "comment": {"comment": b"\xff\xda" * 9, "icc_profile": b"\xff\xd9\xff\xc0" * 99},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_both_decoders_give_the_same_bits(kind, monkeypatch):
    pytest.importorskip("simplejpeg")
    cases = []
    for k, size in enumerate([(160, 208), (159, 207), (17, 9), (8, 8), (1, 1), (1, 40), (33, 64)]):
        picture = photograph(k, 160, 208)[: size[0], : size[1]]
        data = encode(picture[..., 0] if kind == "grey" else picture, "JPEG", **JPEGS[kind])
        header = jpeg.read_header(data)
        assert header[:3] == (size[1], size[0], True)
        for target in (None, 1, 2, 5, 20, 40, 100):
            assert jpeg.decode_plain(data, header, target and 2 * target) is not None
            cases.append((data, target, decode(data, target=target)))
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    for data, target, quick in cases:
        assert quick.flags.c_contiguous and np.array_equal(decode(data, target=target), quick)


def test_what_is_not_plain_is_left_to_pillow(smooth, monkeypatch):
    """An orientation, four inks, damage: libjpeg-turbo would show them otherwise, or not say so."""
    exif, other = Image.Exif(), Image.Exif()
    exif[274], other[271] = 6, "maker"
    plain = encode(smooth, "JPEG")
    assert jpeg.read_header(encode(smooth, "JPEG", exif=other)).plain
    assert not jpeg.read_header(encode(smooth, "JPEG", exif=exif)).plain
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert not jpeg.read_header(encode(smooth, "JPEG", xmp=xmp)).plain
    assert decode(encode(smooth, "JPEG", xmp=xmp)).shape == (56, 40, 3)
    assert not jpeg.read_header(encode(Image.fromarray(smooth).convert("CMYK"), "JPEG")).plain
    for segment in (
        b"\xff\xe0\0\6JFIF",
        b"\xff\xee\0\7Adobe",
        b"\xff\xe2\0\x0dICC_PROFILE",
        b"\xff\xed\0\x10Photoshop 3.0\0",
        b"\xff\xe2\0\x20MPF\0" + bytes(26),
    ):
        odd = plain[:2] + segment + plain[2:]
        assert not jpeg.read_header(odd).plain  # Pillow refuses most of these
    for data in (encode(smooth, "PNG"), b"", plain[:100], b"\xff\xd8" + plain[3:]):
        assert jpeg.read_header(data) is None
    damaged = bytearray(plain)
    damaged[-40:-30] = bytes(10)
    header = jpeg.read_header(bytes(damaged))
    assert jpeg.decode_plain(bytes(damaged), header, None) is None
    lenient = decode(bytes(damaged))
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    assert np.array_equal(decode(bytes(damaged)), lenient)


def test_sizes_are_checked_before_the_quick_decoder(smooth, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(jpeg, "decode_plain", never)
    data = encode(smooth, "JPEG")
    assert reason(data, max_pixels=40 * 56 - 1) == "too-many-pixels"
    assert reason(data, min_side=41) == "too-small"


def test_scans_are_counted_where_the_pixels_are():
    data = encode(photograph(0), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xc4", start)]
    many = data[:start] + scan * jpeg.SCANS + data[start:]
    assert reason(many) == "too-many-scans"
    few = data[:start] + scan * 20 + data[start:]
    assert decode(few).shape == (160, 208, 3)
    # Neither pictures in comments nor what follows the end counts.
    comment = struct.pack(">HH", 0xFFFE, 40_002) + b"\xff\xda" * 20_000
    assert decode(data[:2] + comment + data[2:] + data * 20).shape == (160, 208, 3)
    assert decode(encode(photograph(0), "JPEG") + b"\xff\xda" * 99).shape == (160, 208, 3)


def test_reduced_decoding_is_exact_enough():
    """docs/input.md: 44 dB at a margin of 2, nearer to a full decode than another filter is."""
    worst = {2.0: 99.0, 1.0: 99.0}
    filters = 0.0
    for k in range(4):
        data = encode(photograph(k, 256, 256), "JPEG", quality=95, subsampling=2)
        full = decode(data)
        for margin in worst:
            size = int(128 / margin)
            reduced = decode(data, target=size, margin=margin)
            assert len(reduced) == 128
            exact, _ = im.resize_and_crop(full, size)
            error = im.resize_and_crop(reduced, size)[0].astype(float) - exact
            worst[margin] = min(worst[margin], 10 * np.log10(255**2 / np.mean(error**2)))
        other, _ = im.resize_and_crop(full, 64, resample=Image.Resampling.LANCZOS)
        exact, _ = im.resize_and_crop(full, 64)
        filters = max(filters, 10 * np.log10(255**2 / np.mean((other.astype(float) - exact) ** 2)))
    assert worst[2.0] > 44 and worst[2.0] > filters and worst[1.0] > 34


def test_crop_box_is_what_was_resized(smooth):
    rng = np.random.default_rng(0)
    seen = set()
    for crop, fraction in [("center", 1.0), ("random", 1.0), ("random", 0.5), ("center", 0.25)] * 8:
        cropped, box = im.resize_and_crop(smooth, 12, crop=crop, fraction=fraction, rng=rng)
        left, upper, right, lower = box
        assert right - left == lower - upper == round(40 * fraction)
        assert min(left, upper) >= 0 and right <= 56 and lower <= 40
        if crop == "center":
            assert (left + right, upper + lower) == (56, 40)
        alone = Image.fromarray(smooth[upper:lower, left:right])
        close(
            cropped[1:-1, 1:-1],
            np.array(alone.resize((12, 12), Image.Resampling.BICUBIC)).astype(int)[1:-1, 1:-1],
            3,
        )
        seen.add(box)
    assert len(seen) > 12
    with pytest.raises(ConfigError, match="unknown crop"):
        im.resize_and_crop(smooth, 12, crop="corner")
    with pytest.raises(ConfigError, match="fraction"):
        im.resize_and_crop(smooth, 12, fraction=0)


def test_resizing_is_antialiased():
    """A one-pixel checkerboard has no frequency that a third of the size can carry: it is grey."""
    board = np.indices((96, 96)).sum(0) % 2 * 255
    small, _ = im.resize_and_crop(np.stack([board] * 3, -1).astype(np.uint8), 32)
    assert np.abs(small.astype(int) - 127).max() <= 8


def test_downsample_is_the_area_mean():
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    means = noise.reshape(8, 4, 12, 4, 3).mean((1, 3))
    assert np.array_equal(im.downsample(noise, 4), np.rint(means))
    with pytest.raises(ConfigError, match="evenly"):
        im.downsample(noise, 5)
