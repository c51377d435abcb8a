"""Layouts of GenEval and T2I-CompBench, and prompt files that cannot be trusted."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from unclip import protocols
from unclip.errors import ConfigError, DataError
from unclip.protocols import exports

LINES = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "green"}],
        "prompt": "a photo of a green cow",
    },
]


def pictures(n):
    return np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_geneval_layout(geneval, tmp_path):
    protocol = protocols.make(f"geneval:{geneval}", pictures=2)
    assert re.fullmatch(r"geneval-[0-9a-f]{8}\.x2", protocol.id) and protocol.reference() is None
    other = geneval.with_name("other.jsonl")
    other.write_text("".join(json.dumps(line | {"prompt": "a dog"}) + "\n" for line in LINES))
    assert protocols.make(f"geneval:{other}", pictures=2).id != protocol.id
    assert protocols.make(f"geneval:{geneval}", pictures=2, size=64).id == f"{protocol.id}.size64"
    assert protocol.prompts == [line["prompt"] for line in LINES for _ in range(2)]
    out = tmp_path / "out"
    written = protocol.export(out, pictures(4))
    expected = ["metadata.jsonl", "samples/0000.png", "samples/0001.png"]
    assert files(out) == [f"0000{i}/{name}" for i in (0, 1) for name in expected]
    for i in (0, 1):
        line = (out / f"0000{i}" / "metadata.jsonl").read_text()
        assert json.loads(line) == LINES[i] and line.count("\n") == 1
    with Image.open(out / "00001/samples/0000.png") as picture:
        assert (np.asarray(picture) == 2).all()
    assert written[2] == out / "00001/samples/0000.png"
    assert len(protocols.make("geneval", prompts=str(geneval)).prompts) == 8  # four a prompt


def test_some_rows_by_their_keys(geneval, tmp_path):
    protocol = protocols.make(f"geneval:{geneval}", pictures=2)
    protocol.export(tmp_path / "out", iter(pictures(1)), [protocol.keys[3]])
    assert files(tmp_path / "out") == ["00001/samples/0001.png"]
    with pytest.raises(ConfigError, match="unknown key"):
        protocol.export(tmp_path / "out", pictures(1), ["../../x"])
    for n in (3, 5):
        with pytest.raises(ConfigError, match="pictures for"):
            protocol.export(tmp_path / "out", pictures(n))


def test_t2i_compbench_layout(tmp_path):
    file = tmp_path / "color_val.txt"
    file.write_text("a green bench and a blue bowl\r\n\na red car and a sheep's white coat.\n")
    protocol = protocols.make(f"t2i-compbench:{file}", pictures=2)
    protocol.export(tmp_path / "out", pictures(4))
    names = ["a green bench and a blue bowl", "a red car and a sheep's white coat."]
    assert files(tmp_path / "out") == [
        f"samples/{name}_{number:06d}.png"
        for name, number in ((names[0], 0), (names[0], 1), (names[1], 2), (names[1], 3))
    ]
    # As its judges read a name: the prompt before the first "_", the number after the last.
    for row, name in enumerate(protocol.path(row).name for row in range(4)):
        assert name.split("_")[0] == protocol.prompts[row]
        assert int(name.split("_")[-1].split(".")[0]) == row
    assert len(protocols.make(f"t2i-compbench:{file}").prompts) == 20


@pytest.mark.parametrize(
    "prompt",
    [
        "../../../etc/x",
        "/etc/x",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "a\x00b",
        "a\x1b[2Jb",
        "snake_case",
        "x" * 250,
        "é" * 130,
        "x" * 3000,
    ],
)
def test_prompts_that_are_no_file_names(tmp_path, prompt):
    file = tmp_path / "hostile.txt"
    file.write_text(f"a fine prompt\n{prompt}\n")
    with pytest.raises(DataError, match="line 2"):
        protocols.make(f"t2i-compbench:{file}")


def test_a_path_in_geneval_stays_a_prompt(geneval, tmp_path):
    line = {"tag": "../t", "include": [], "prompt": "../../escape", "index": "/etc"}
    geneval.write_text(json.dumps(line))
    protocol = protocols.make(f"geneval:{geneval}", pictures=1)
    protocol.export(tmp_path / "out", pictures(1))
    assert files(tmp_path) == [
        "evaluation_metadata.jsonl",
        "out/00000/metadata.jsonl",
        "out/00000/samples/0000.png",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json", "line 1"),
        ("[1]", "line 1"),
        ('{"tag": "x", "include": []}', '"prompt"'),
        ('{"prompt": "x", "include": []}', '"tag"'),
        ('{"prompt": "x", "tag": "y"}', '"include"'),
        ('{"prompt": "  ", "tag": "y", "include": []}', "0 characters"),
        ("", "0 prompts"),
        ("[" * 200_000, "line 1"),
    ],
)
def test_damaged_geneval_files(geneval, text, message):
    geneval.write_text(text)
    with pytest.raises(DataError, match=message):
        protocols.make(f"geneval:{geneval}")


def test_limits(geneval, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="0 pictures per prompt"):
        protocols.make(f"geneval:{geneval}", pictures=0)
    with pytest.raises(DataError, match="cannot be read"):
        protocols.make(f"geneval:{tmp_path / 'none'}")
    monkeypatch.setattr(exports, "MAX_PROMPTS", 1)
    with pytest.raises(DataError, match="2 prompts, expected 1 to 1"):
        protocols.make(f"geneval:{geneval}")
    monkeypatch.setattr(exports, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than 10"):
        protocols.make(f"geneval:{geneval}")
