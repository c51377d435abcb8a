"""JPEG headers, and a fast decoder for the plain JPEGs that most pictures of a collection are.

Decoding JPEGs is most of what training input costs. libjpeg-turbo, through simplejpeg where it is
installed, decodes them straight into an array; Pillow, which is built on the same library, gives
the same bits but copies them more often. The header is read here first, so that sizes are checked
before anything is decoded, and every JPEG that is not plain is left to Pillow.
"""

import functools
import importlib
import re
import types
from typing import NamedTuple

import numpy as np

SCANS = 64  # the scans decoded at most; encoders write about ten
_START = b"\xff\xd8"
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # baseline, extended and progressive, Huffman coded
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
_APP1, _DNL, _SOS, _EOI = 0xE1, 0xDC, 0xDA, 0xD9
# The least length of segments that Pillow interprets (JFIF, colour profiles, Photoshop's, Adobe's)
# and fails on when they are shorter. libjpeg-turbo would accept them, but whether a picture is good
# must not depend on which of the two decodes it.
_LEAST = {0xE0: 14, 0xE2: 16, 0xED: 1 << 16, 0xEE: 14}
_NO_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers without a segment
# In a scan's data: FF starts a marker, unless it is followed by 00 (a stuffed byte), D0 to D7 (a
# restart) or another FF (padding).
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)


class Header(NamedTuple):
    """What the markers up to the first scan say.

    `plain`: Pillow is not needed; `single`: one scan holds the whole picture.
    """

    width: int
    height: int
    plain: bool
    single: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG; None where it is not one, or unusual enough to be left to Pillow.

    A plain JPEG is an 8-bit picture of one or three components whose APP1 segments (EXIF, XMP) do
    not mention an orientation, without Photoshop's segments, without further pictures, and with no
    known segment that is too short.
    """
    if not data.startswith(_START):
        return None
    position, size, plain, components = 2, None, True, 0
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _NO_LENGTH or length < 2 or position + 2 + length > len(data):
            return None
        if marker == _SOS:
            return size and Header(*size, plain, data[position + 4] == components)
        body = position + 4
        if marker in _OTHER_FRAMES or marker == _DNL:
            return None
        if marker in _FRAMES:
            if size or length < 8:
                return None
            height = data[body + 1] << 8 | data[body + 2]
            size = data[body + 3] << 8 | data[body + 4], height
            components = 0 if marker == _PROGRESSIVE else data[body + 5]
            plain = plain and data[body] == 8 and data[body + 5] in (1, 3) and min(size) > 0
        elif marker == _APP1 and plain:
            # Tag 274 in either byte order, or XMP's tiff:Orientation, anywhere in the segment.
            segment = data[body : position + 2 + length]
            plain = not (
                b"\x01\x12" in segment or b"\x12\x01" in segment or b"rientation" in segment
            )
        elif marker in _LEAST:
            plain = plain and length >= _LEAST[marker] and data[body : body + 4] != b"MPF\0"
        position += 2 + length
    return None


def too_many_scans(data: bytes, header: Header | None) -> bool:
    """Whether a JPEG has more than `SCANS` scans.

    A scan of a few bytes costs about as much as decoding the whole picture, so a small file with
    thousands of them could keep a decoder busy for minutes.
    """
    if (header is not None and header.single) or not data.startswith(_START):
        return False
    if data.count(b"\xff\xda") <= SCANS:
        return False
    scans, position = 0, 2  # pictures inside APP segments and after the end do not count
    while match := _MARKER.search(data, position):
        position, marker = match.end(), match[1][0]
        if marker == _EOI:
            return False
        if marker in _NO_LENGTH:
            continue
        position += int.from_bytes(data[position : position + 2], "big")
        scans += marker == _SOS
        if scans > SCANS:
            return True
    return False


def scale(width: int, height: int, least: int | None) -> int:
    """1, 2, 4 or 8: by how much decoding may shrink a picture whose sides stay `least` or more."""
    room = min(width, height) // least if least else 1
    return next((s for s in (8, 4, 2) if room >= s), 1)


@functools.cache
def _simplejpeg() -> types.ModuleType | None:
    """simplejpeg, or None where it is not installed: Pillow then decodes every picture, slower."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def decode_plain(data: bytes, header: Header, least: int | None) -> np.ndarray | None:
    """uint8 [H, W, 3] RGB of a plain JPEG, reduced by `scale`.

    None where it is damaged in any way, or simplejpeg is missing: Pillow then decides whether it is
    good, so that the same pictures are good with and without simplejpeg.
    """
    library = _simplejpeg()
    if library is None or not header.plain:
        return None
    factor = scale(header.width, header.height, least)
    height, width = -(-header.height // factor), -(-header.width // factor)
    out = np.empty((height, width, 3), np.uint8)
    try:
        found = library.decode_jpeg(
            data, min_height=height, min_width=width, min_factor=factor, buffer=out
        )
    except ValueError:
        return None
    return out if found.shape == out.shape else None
