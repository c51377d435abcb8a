"""What a run reads: orders, weights, filters resume exactly; what was bad is counted and told."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.input.shards import folder as index_folder
from unclip.runtime import checkpoint, distributed
from unclip.training import data as inputs
from unclip.training.start import train

pytestmark = pytest.mark.usefixtures("cheap_runs")


def state_of(workdir, step=None):
    return checkpoint.load_subtree(pathlib.Path(workdir) / "checkpoints", ("params", "step"), step)


def lines(path):
    return [json.loads(text) for text in pathlib.Path(path).open()]


@pytest.fixture(scope="module")
def two_sets(shard_writer, tmp_path_factory):
    """Two collections of two shards each."""
    folder = tmp_path_factory.mktemp("two")
    for name, first in (("a", 0), ("b", 200)):
        for k in range(2):
            shard_writer(folder / f"{name}-{k}.tar", 12, first=first + 12 * k)
    return tuple(str(folder / f"{name}-*.tar") for name in ("a", "b"))


@pytest.mark.slow
def test_a_streamed_and_weighted_run_resumes_bit_for_bit(
    tiny_config, two_sets, tmp_path, monkeypatch
):
    config = tiny_config(
        "clip",
        {
            "total_steps": 4,
            "input.shards": two_sets,
            "input.proportions": (0.75, 0.25),
            "input.order": "streamed",
            "input.streams": 4,
            "input.window_examples": 5,
            "input.filters": "caption_words=:5",
        },
    )
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train(config, whole)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "should_stop", lambda at=None: at == 3)
        with pytest.raises(errors.Stopped):
            train(config, parts)
    train(config, parts)
    one, two = state_of(whole), state_of(parts)
    assert int(one["step"]) == int(two["step"]) == 4
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_samples_the_filters_reject_are_replaced_and_counted(tiny_config, two_sets, tmp_path):
    config = tiny_config(
        "clip", {"input.shards": two_sets, "input.filters": "caption_chars=24:", "log_steps": 1}
    )
    data, _ = inputs.collections(config)
    rejected = sum(len(data.read(i).text) < 24 for i in range(len(data)))
    assert 0 < rejected < len(data)
    train(config, str(tmp_path / "run"))
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["input/filtered"] == last["input/filtered/low-caption_chars"] > 0
    assert "input/bad" not in last and not list((tmp_path / "run").glob("bad_samples*"))


@pytest.fixture(scope="module")
def damaged(shard_writer, tmp_path_factory):
    """24 samples; the pictures of the last twelve are no pictures."""
    folder = tmp_path_factory.mktemp("damaged")
    good = shard_writer(folder / "0.tar", 12)
    bad = shard_writer(folder / "1.tar", 12, first=50)
    data = pathlib.Path(bad).read_bytes()
    pathlib.Path(bad).write_bytes(data.replace(b"\x89PNG\r\n", b"nothing"[:6]))
    return good, bad


@pytest.fixture(scope="module")
def damaged_run(tiny_config, damaged, tmp_path_factory):
    """A run over the damaged shards that bears with them."""
    workdir = tmp_path_factory.mktemp("damaged-run")
    train(
        tiny_config(
            "clip",
            {
                "input.shards": damaged,
                "input.max_bad_fraction": 1.0,
                "total_steps": 3,
                "log_steps": 1,
            },
        ),
        str(workdir),
    )
    return workdir


def test_bad_samples_are_listed_and_counted(damaged_run):
    listed = lines(damaged_run / "bad_samples-00000.jsonl")
    assert {row["shard"] for row in listed} == {"1.tar"}
    assert {row["reason"] for row in listed} == {"format"}
    assert {row["key"] for row in listed} == {f"{k:05d}" for k in range(50, 62)}
    assert {row["sample"] for row in listed} <= set(range(24))
    counted = lines(damaged_run / "metrics.jsonl")[-1]
    assert counted["input/bad"] == counted["input/bad/format"] == len(listed)
    assert counted["input/substituted"] == 12  # of the 24 samples of one epoch


def test_too_many_bad_samples_end_the_run_and_keep_what_was_learned(
    tiny_config, damaged, damaged_run, tmp_path
):
    changes = {"input.shards": damaged, "input.max_bad_fraction": 1.0, "total_steps": 3}
    strict = tiny_config("clip", changes | {"input.max_consecutive_bad": 1})
    with pytest.raises(errors.DataError, match=r"in a row are bad.*max_consecutive_bad=1"):
        train(strict, str(tmp_path / "run"))
    assert lines(tmp_path / "run" / "bad_samples-00000.jsonl")
    # The same command with a wider limit goes on, and ends as a run that was never stopped.
    train(tiny_config("clip", changes), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path / "run"), state_of(damaged_run))


class Failing:
    """Batches that end with an error where a shard has gone."""

    def __init__(self, batches, position):
        self.batches, self.last = batches, position

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.batches.close()

    def __next__(self):
        if self.batches.position == self.last:
            raise errors.DataError("a shard is gone")
        return next(self.batches)


def test_a_failing_input_saves_the_step_it_reached(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("clip", {"total_steps": 4, "save_steps": 100})
    real = inputs.batches
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "batches", lambda *a, **k: Failing(real(*a, **k), 24))
        with pytest.raises(errors.DataError, match="a shard is gone"):
            train(config, str(tmp_path / "run"))
    assert int(state_of(tmp_path / "run")["step"]) == 3
    assert checkpoint.stored(tmp_path / "run" / "checkpoints")[0] == 3


@pytest.mark.slow
def test_streaming_trains_and_says_what_it_cannot(tiny_config, shards, two_sets, tmp_path):
    config = tiny_config("clip", {"input.shards": two_sets, "input.streaming": True})
    assert inputs.collections(config)[0] is None
    train(config, str(tmp_path / "run"))
    assert int(state_of(tmp_path / "run")["step"]) == 2
    for changes, message in (
        ({"input.proportions": (1.0, 1.0)}, "need indexed shards"),
        ({"input.where": {"name": "red"}}, "need indexed shards"),
        ({"input.order": "streamed"}, "need indexed shards"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            inputs.collections(
                tiny_config("clip", {"input.shards": two_sets, "input.streaming": True} | changes)
            )


def test_the_captions_of_a_config_say_which_samples_there_are(tiny_config, shard_writer, tmp_path):
    """Without any KEY.txt: walked, by an index and streamed; lists of captions count."""
    path = shard_writer(tmp_path / "a.tar", 8, captions=False)
    for patterns in ((path,), (str(tmp_path / "index"),)):
        changes = {"input.shards": patterns, "input.captions": ("json:name",)}
        config = tiny_config("clip", changes | {"input.held_out": patterns})
        assert [len(found) for found in inputs.collections(config)] == [8, 8]
        index_folder.index_folder(path, tmp_path / "index", captions=("txt", "json:name"), jobs=1)
    config = tiny_config("clip", changes | {"input.shards": (path,), "input.streaming": True})
    transform = lambda sample, rng: {"name": np.array(len(sample.meta["name"]))}
    with inputs.batches(config, None, transform) as batches:
        assert set(next(batches)["name"]) == {3, 4, 5}
        assert not batches.problems
    config.input.captions = ("txt",)
    with (
        inputs.batches(config, None, transform) as batches,
        pytest.raises(errors.DataError, match=r"gave no sample.*'no-text'"),
    ):
        next(batches)


def test_a_prior_needs_indexed_shards_for_its_statistics(tiny_config, run_of, two_sets, tmp_path):
    config = tiny_config(
        "prior", {"clip": run_of("clip"), "input.shards": two_sets, "input.streaming": True}
    )
    with pytest.raises(errors.ConfigError, match="statistics are measured on indexed shards"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input.order": "sorted"}, "global"),
        ({"input.proportions": (1.0,)}, "1 proportions for 2 patterns"),
        ({"input.order": "streamed", "input.streams": 3}, "3 streams"),
        ({"input.filters": "similarty=0.3:"}, "did you mean 'similarity'"),
        ({"input.shards": ()}, "no training shards"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_run(
    tiny_config, two_sets, changes, message
):
    config = tiny_config("clip", {"input.shards": two_sets} | changes)
    with pytest.raises(errors.ConfigError, match=message):
        inputs.collections(config)


def test_an_index_beside_the_shards_changes_nothing(tiny_config, two_sets, tmp_path):
    for pattern in two_sets:
        for path in pathlib.Path(pattern).parent.glob("*.tar"):
            shutil.copy(path, tmp_path)
    patterns = tuple(str(tmp_path / pathlib.Path(p).name) for p in two_sets)
    config = lambda: tiny_config("clip", {"input.shards": patterns})
    walked, _ = inputs.collections(config())
    index_folder.index_folder(patterns, tmp_path / "index", jobs=1)
    indexed, _ = inputs.collections(config())
    assert indexed.fingerprint == walked.fingerprint and len(indexed) == len(walked) == 48
    assert [indexed.read(i) for i in range(48)] == [walked.read(i) for i in range(48)]
