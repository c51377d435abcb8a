"""`unclip index` as a user sees it: totals, exit codes, one line for every mistake."""

import io
import json
import tarfile

import pytest

from unclip.input.shards.collection import open_shards


@pytest.fixture(scope="module")
def index(serve_verb):
    """index(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("index") as run:
        yield run


def write(path, keys, extensions=("jpg", "txt")):
    with tarfile.open(path, "w") as archive:
        for key in keys:
            for extension in extensions:
                data = f"{key} {extension}".encode() * 9
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Two whole shards, one that is cut off in its third sample, one that is no tar."""
    for name in ("a-0", "a-1", "a-2"):
        write(tmp_path / f"{name}.tar", [f"{name}/{k}" for k in range(3)])
    data = (tmp_path / "a-2.tar").read_bytes()
    (tmp_path / "a-2.tar").write_bytes(data[: 11 * 512 + 5])
    (tmp_path / "a-3.tar").write_bytes(b"<html>" * 500)
    (tmp_path / "a-1_stats.json").write_text(json.dumps({"successes": 4}))
    return tmp_path


def test_indexes_tells_and_goes_on(index, folder):
    code, out, err = index(folder / "a-*.tar", "--jobs", "1")
    assert (code, err.count("\n")) == (0, 1), err  # the progress alone
    assert "8 samples in 4 shards, 8 with a caption; 4 shards read, 0 known already" in out
    for message in (
        "truncated 1",
        "shard-truncated 1",
        "not-a-tar 1",
        "problems.jsonl",
        "a-1.tar: img2dataset noted 4 samples, 3 are usable",
        "bytes a sample",
    ):
        assert message in out
    code, out, _ = index(folder / "a-*.tar", "--jobs", "1")
    assert code == 0 and "0 shards read, 4 known already" in out
    code, out, _ = index(folder / "a-*.tar", "--jobs", "1", "--force")
    assert code == 0 and "4 shards read, 0 known already" in out
    assert index(folder / "a-*.tar", "--check")[0] == 0
    (folder / "a-3.tar").write_bytes(b"<html>")
    data = bytearray((folder / "a-0.tar").read_bytes())
    data[512] ^= 1
    (folder / "a-0.tar").write_bytes(data)
    code, out, err = index(folder / "index", "--check", "--jobs", "1")
    assert code == 74 and "2 shards are not as they were indexed" in err
    assert "a-0.tar: the bytes of 1 samples have changed" in err and "a-3.tar: has changed" in err


def test_the_caption_may_be_any_field(index, tmp_path):
    members = [("0.jpg", "p"), ("0.json", '{"TEXT": ["a fox", "a red fox"]}'), ("1.jpg", "p")]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in members:
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    code, out, _ = index(tmp_path / "a.tar")
    assert code == 0 and "no-text 2  a.tar: 0, a.tar: 1" in out
    assert "no sample has a caption from txt,json:name; the first has text in json:TEXT" in out
    for flag in ("--caption=TEXT", "--captions=txt,json:TEXT"):
        code, out, _ = index(tmp_path / "a.tar", flag)
        assert code == 0 and "2 samples in 1 shards, 1 with a caption" in out
        assert "no-text 1  a.tar: 1" in out and "no sample has a caption" not in out
    assert "0 shards read, 1 known already" in out
    for name in ("a.tar", "index"):
        assert len(open_shards(str(tmp_path / name), captions=("json:TEXT",))) == 1


def test_to_array_record_with_the_caption_of_any_field(index, tmp_path):
    pytest.importorskip("array_record")
    write(tmp_path / "a.tar", ["0"], ("jpg",))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("0.json")
        info.size = len(data := b'{"TEXT": ["a fox", "a red fox"]}')
        tar.addfile(info, io.BytesIO(data))
    folder = tmp_path / "foxes" / "1.0.0"
    code, _, err = index(tmp_path / "a.tar", "--caption=TEXT", "--to_array_record", folder)
    assert code == 0, err
    assert open_shards(f"tfds:{folder}:train").read(0).text == "a fox"


def test_indices_of_two_sets_in_one_folder(index, folder):
    for name in ("a-0.tar", "a-1.tar"):
        (folder / name).rename(folder / f"held-out-{name[2:]}")
    code, out, _ = index(folder / "a-2.tar")
    assert code == 0 and f"index: {folder}/index," in out
    code, out, _ = index(folder / "held-out-*.tar", "--jobs", "1")
    assert code == 0 and f"index: {folder}/index-held-out," in out
    assert [len(open_shards(str(folder / name))) for name in ("index", "index-held-out")] == [2, 6]
    assert index(folder / "held-out-*.tar", "--check", "--jobs", "1")[0] == 0
    code, _, err = index(folder / "held-out-*.tar", "--out", folder / "index")
    assert code == 78 and "is the index of 1 other shards" in err and err.count("\n") == 1
    assert len(open_shards(str(folder / "index"))) == 2


def test_processes(index, folder):
    code, out, _ = index(folder / "a-*.tar", "--out", folder / "there", "--jobs", "2")
    assert code == 0 and "8 samples in 4 shards" in out
    assert (folder / "there" / "index.json").exists() and not (folder / "index").exists()


def test_to_array_record(index, folder):
    pytest.importorskip("array_record")
    code, out, err = index(
        folder / "a-*.tar", "--jobs", "1", "--to-array-record", folder / "foxes" / "1.0.0"
    )
    assert code == 0, err
    assert "8 samples in 1 files" in out
    info = json.loads((folder / "foxes" / "1.0.0" / "dataset_info.json").read_text())
    assert (info["name"], info["version"]) == ("foxes", "1.0.0")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 78, "expected shards"),
        (["FOLDER/b-*.tar"], 74, "no shard matches"),
        (["FOLDER/a-3.tar"], 74, "no usable picture in 1 shards"),
        (["FOLDER/a-0.tar", "--check"], 74, "there is no index in"),
        (["pipe:cat a.tar"], 78, "never run"),
        (["s3://bucket/a.tar"], 78, "folder of the index with --out"),
        (["FOLDER/a-0.tar", "--job=0"], 78, "jobs"),
        (["FOLDER/a-0.tar", "--captions=text"], 78, "unknown caption source 'text'"),
        (["FOLDER/a-0.tar", "--caption=x", "--captions=txt"], 78, "give one of them"),
        (["FOLDER/a-0.tar", "--out=FOLDER/a-1.tar"], 74, "a-1.tar"),
    ],
)
def test_mistakes_are_one_line(index, folder, arguments, code, message):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    found, _, err = index(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("index: ")]
    assert found == code and len(lines) == 1 and message in lines[0], err


def test_an_index_is_not_indexed(index, folder):
    assert index(folder / "a-0.tar", "--jobs", "1")[0] == 0
    code, _, err = index(folder / "index")
    assert code == 78 and "give the shards to index" in err
    code, _, err = index(folder / "index", "--check", "--caption=TEXT")
    assert code == 78 and "--caption: the index has its own" in err
