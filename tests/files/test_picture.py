"""One way to open a picture: limits, EXIF that turns, EXIF that is broken, reasons."""

import io
import pathlib
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from unclip import errors
from unclip.files import images, picture
from unclip.input.decode import image
from unclip.measure import picture_set

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOLDER = pathlib.Path(__file__).parent / "exif"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
ORIENTATION = 0x0112


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(exif):
    """PIXELS as PNG with any bytes as its eXIf chunk."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    data = file.getvalue()
    return data[:33] + _chunk(b"eXIf", exif) + data[33:]


def raw_profile(exif):
    """PIXELS as PNG with EXIF as ImageMagick writes it, hexadecimal in a text chunk."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    data = file.getvalue()
    text = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    return data[:33] + _chunk(b"tEXt", text) + data[33:]


def webp(exif):
    """PIXELS as lossless WebP with any bytes as its EXIF."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "WEBP", lossless=True, exif=exif)
    return file.getvalue()


def jpeg(exif):
    """PIXELS as JPEG with any bytes as its EXIF."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    return file.getvalue()


def entry(kind, count, value, order=">"):
    """EXIF whose only entry is an orientation of any type, count and value."""
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}HHHI", 1, ORIENTATION, kind, count) + value + bytes(4)


BROKEN = {
    "empty": b"",
    "two bytes": b"MM",
    "six bytes": b"MM\0*\0\0",
    "no magic": b"XXXXXXXX",
    "wrong magic": b"MM\0+\0\0\0\x08\0\0",
    "offset beyond the end": b"II*\0\xff\xff\xff\x7f",
    "entries cut": b"II*\0\x08\0\0\0\x05\0\x12\x01",
    "an empty value": entry(3, 0, bytes(4)),
    "a huge count": entry(3, 0xFFFFFFFF, b"\0\0\0\x08"),
    "text": entry(2, 4, b"six\0"),
    "undefined": entry(7, 4, b"\6\0\0\0"),
    "a ratio without its value": entry(5, 1, b"\0\0\xff\xff"),
    "an unknown type": entry(99, 1, b"\0\6\0\0"),
    "out of range": entry(3, 1, b"\0\x09\0\0"),
}


def readers(data, path):
    """What each of the three readers of pictures makes of the same bytes."""
    path.write_bytes(data)
    return [images.read_image(path), image.decode(data), picture_set.decode(data)[0]]


@pytest.mark.parametrize("write", [png, raw_profile, webp, jpeg])
@pytest.mark.parametrize("exif", BROKEN.values(), ids=BROKEN)
def test_broken_exif_never_costs_a_picture(tmp_path, write, exif):
    plain = io.BytesIO()
    Image.fromarray(PIXELS).save(plain, "JPEG", quality=95)
    expected = PIXELS if write is not jpeg else np.array(Image.open(plain))
    for found in readers(write(exif), tmp_path / "picture"):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("write", [png, raw_profile, webp])
def test_damaged_exif_gives_the_same_picture_everywhere(tmp_path, write):
    exif, rng = Image.Exif(), np.random.default_rng(1)
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "maker", 72.5
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    whole = exif.tobytes()[6:]
    upright, seen = np.rot90(PIXELS, -1), [0, 0]
    cut = [whole[:n] for n in range(len(whole) + 1)]
    for _ in range(100):
        changed = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 6)):
            changed[at] = rng.integers(256)
        cut.append(bytes(changed))
    for data in cut:
        found = readers(write(data), tmp_path / "picture")
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        if found[0].shape == PIXELS.shape:
            seen[0] += 1
        else:
            np.testing.assert_array_equal(found[0].shape, upright.shape)
            seen[1] += 1
    assert min(seen) > 5


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_files_with_broken_exif_are_read_as_they_are(name):
    path = FOLDER / name
    with Image.open(path) as file:
        stored = np.asarray(file.convert("RGB"))
    for found in (images.read_image(path), image.decode(path.read_bytes())):
        np.testing.assert_array_equal(found, stored)
    np.testing.assert_array_equal(picture_set.decode(path.read_bytes())[0], stored)


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_is_the_same_for_every_reader(tmp_path, value):
    exif = entry(3, 1, struct.pack(">HH", value, 0))
    found = readers(png(exif), tmp_path / "picture")
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    turned = picture_set.decode(png(exif))[1] & picture_set.TURNED
    assert bool(turned) == (value > 1)
    assert found[0].shape == ((9, 6, 3) if value > 4 else (6, 9, 3))


def test_a_tiff_is_turned_once():
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    Image.fromarray(PIXELS).save(file, "TIFF", exif=exif)
    found, notes = picture_set.decode(file.getvalue(), "TIFF")
    np.testing.assert_array_equal(found, np.rot90(PIXELS, -1))
    assert notes == picture_set.TURNED


def test_sixteen_bit_grey_is_rounded_alike_by_every_reader(tmp_path):
    grey, file = np.arange(0, 65536, 97, np.uint16)[None], io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    expected = np.rint(grey / 65535 * 255).astype(np.uint8)
    for found in readers(file.getvalue(), tmp_path / "picture"):
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))


def test_broken_exif_prints_nothing(tmp_path):
    """In a process of its own: pytest has filters of its own for warnings."""
    broken = b"II*\0\x08\0\0\0\x05\0\x12\x01"  # entries cut
    for name, write in {"a.png": png, "b.png": raw_profile, "c.webp": webp, "d.jpg": jpeg}.items():
        (tmp_path / name).write_bytes(write(broken))
    program = (
        "import sys; from unclip.files import images; from unclip.measure import pictures\n"
        "found = pictures.open_pictures(sys.argv[1])\n"
        "print(sum(len(found.read(i)) == len(images.read_image(found.path(i))) for i in range(4)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.stderr) == ("4\n", "")


def test_reasons(tmp_path):
    data = png(b"")
    cases = {
        "too-many-bytes": (data, {"max_bytes": len(data) - 1}),
        "too-many-pixels": (data, {"max_pixels": 53}),
        "too-small": (data, {"min_side": 7}),
        "format": (b"no picture", {}),
        "truncated": (data[: len(data) // 2], {}),
        "unreadable": (tmp_path / "missing.png", {}),
    }
    for reason, (source, limits) in cases.items():
        with (
            pytest.raises(picture.PictureError) as caught,
            picture.upright(source, **limits),
        ):
            pass
        assert caught.value.reason == reason and reason in picture.REASONS
        assert "\n" not in caught.value.message and isinstance(caught.value, errors.DataError)
        assert pickle.loads(pickle.dumps(caught.value)).reason == reason
