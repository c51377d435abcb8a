"""What stages.py gives a step to read, and which presets it refuses."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.input.decode.text import T5Tokenizer, Tokenizer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stages():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import stages

    return stages


@pytest.mark.parametrize("tokenizer", [None, T5Tokenizer()])
def test_captions_are_of_the_tokenizer_that_the_stage_reads_with(stages, tokenizer):
    spec = {
        "tokens": jax.ShapeDtypeStruct((2, 32), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((2, 32), bool),
    }
    batch = stages.random_batch(spec, tokenizer)
    ids = (tokenizer or Tokenizer()).encode(["a photograph of a red fox"], 32)[0]
    assert batch["tokens"].shape == (2, 32) and batch["tokens"].dtype == np.int32
    assert (batch["tokens"] == ids).all()
    assert (batch["text_mask"] == (np.asarray(ids) != 0)).all()


def test_presets_that_stages_do_not_have_are_all_told(stages, monkeypatch, capsys):
    command = ["stages.py", "--preset", "imagen", "--stages", "prior", "decoder", "upsampler"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        stages.main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 78 and "prior:" in line and "upsampler:" in line
    assert "decoder:" not in line
