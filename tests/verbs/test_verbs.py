"""`unclip export` and `unclip generate` as processes, and parts that do not fit together."""

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from unclip import errors
from unclip.cascade import bundle, runs
from unclip.files import images


@pytest.fixture(scope="module")
def generate(serve_verb):
    """generate(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("generate") as run:
        yield run


@pytest.fixture(scope="module")
def export(serve_verb):
    """export(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("export") as run:
        yield run


def test_export_writes_the_averages(export, run_of, bundle_dir, tmp_path):
    command = (
        "--clip",
        run_of("clip"),
        "--prior",
        run_of("prior"),
        "--decoder",
        run_of("decoder"),
        "--upsampler",
        run_of("upsampler_0"),
        "--upsampler",
        run_of("upsampler_1"),
        "--out",
        tmp_path,
    )
    code, out, err = export(*command)
    assert code == 0, err
    written = bundle.describe(tmp_path)
    assert written["hash"] == bundle.describe(bundle_dir)["hash"] and written["hash"] in out
    assert set(written["parts"]) == set(bundle.describe(bundle_dir)["parts"])
    assert set(bundle.read_part(tmp_path, "prior").extra) == {"mean", "std"}
    assert written["meta"]["sources"]["clip"] == run_of("clip")
    assert "--mode text: yes" in out and "--mode variations: yes" in out
    # A smaller bundle in its place: nothing is left of the other parts.
    parts = ("--clip", run_of("clip"), "--decoder", run_of("decoder"))
    code, out, err = export(*parts, "--out", tmp_path)
    assert code == 0, err
    assert "--mode text: no, it has no prior" in out and "--mode variations: yes" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("clip.safetensors", "decoder.safetensors", "model.json")
    ]
    code, _, err = export(*parts, "--out", run_of("prior"))
    assert code == 78 and "holds something else than a bundle (" in err
    code, _, err = export("--clip", bundle_dir, "--noema", "--out", tmp_path / "other")
    assert code == 78 and "a BUNDLE holds one set of parameters" in err
    code, _, err = export(*parts, "--upsampler_last", "x", "--out", tmp_path / "other")
    assert code == 78 and "--upsampler_last is a net of the first --upsampler" in err
    assert not (tmp_path / "other").exists()


def test_export_refuses_another_clip_or_says_so(export, run_of, tmp_path):
    part = runs.open_part(run_of("clip"), "clip")
    own = bundle.space(part)
    part.params["logit_scale"], part.space = part.params["logit_scale"] + np.float32(1e-3), ""
    bundle.write(tmp_path / "clip", {"clip": part})

    def command(clip, out):
        given = (("clip", clip), ("prior", run_of("prior")), ("decoder", run_of("decoder")))
        return [word for name, path in given for word in (f"--{name}", path)] + ["--out", out]

    code, _, err = export(*command(tmp_path / "clip", tmp_path / "no"))
    assert code == 78 and err.count("was trained with another clip") == 2
    assert not (tmp_path / "no").exists()
    code, _, err = export(*command(run_of("clip"), tmp_path / "no"), "--noema")
    assert code == 78 and "--noema takes a run's raw CLIP" in err
    out = tmp_path / "yes"
    code, said, _ = export(*command(tmp_path / "clip", out), "--allow_mixed_spaces")
    assert code == 0 and said.count("several embedding spaces") == 2 and "unknown" not in said
    document = bundle.describe(out)
    assert len(document["meta"]["mixed_spaces"]) == 2
    assert document["parts"]["prior"]["trained_with"] == {"clip": own}


def test_export_of_a_run_of_another_stage_is_one_line(run_of, tmp_path):
    with pytest.raises(errors.ConfigError, match="run of stage 'clip', not 'decoder'"):
        runs.open_part(run_of("clip"), "decoder")


def test_average_or_parameters(run_of):
    ema, raw = (runs.open_part(run_of("clip"), "clip", ema=flag) for flag in (True, False))
    a, b = ema.params["vision"]["proj"]["kernel"], raw.params["vision"]["proj"]["kernel"]
    assert a.shape == b.shape and not np.array_equal(a, b)


def test_a_bundle_is_as_good_as_a_run(run_of, bundle_dir):
    one = runs.open_part(run_of("upsampler_1"), "upsampler_1")
    two = runs.open_part(bundle_dir, "upsampler_1")
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert two.settings["image_size"] == 32


def test_parts_that_do_not_fit(bundle_dir):
    parts = bundle.read(bundle_dir).parts
    runs.check_fit(parts)
    swapped = parts | {"upsampler_0": parts["upsampler_1"]}
    with pytest.raises(errors.ConfigError, match=r"upsampler_0 takes 16x16 pictures, .* makes 8x8"):
        runs.check_fit(swapped)
    gap = {"decoder": parts["decoder"], "upsampler_0": parts["upsampler_1"]}
    with pytest.raises(errors.ConfigError, match="takes 16x16 pictures"):
        runs.check_fit(gap)
    parts["clip"].arch["embed_dim"] = 24
    for name in ("prior", "decoder"):
        said = f"{name} has 16-dimensional z_i, CLIP gives 24"
        with pytest.raises(errors.ConfigError, match=said):
            runs.check_fit({"clip": parts["clip"], name: parts[name]})
    parts["clip"].arch |= {"embed_dim": 16, "text_width": 8}
    said = "decoder has 16-dimensional hidden states, CLIP gives 8"
    with pytest.raises(errors.ConfigError, match=said):
        runs.check_fit({"clip": parts["clip"], "decoder": parts["decoder"]})


def test_generate_writes_pictures_that_say_how(generate, bundle_dir, tmp_path):
    prompt = " ".join(["red"] * 20)
    code, out, err = generate(
        "--model",
        bundle_dir,
        "--prompt",
        "a red dot",
        "--prompt",
        prompt,
        "--n",
        2,
        "--seed",
        7,
        "--stages",
        1,
        "--guidance",
        2.5,
        "--guidance_low",
        0.25,
        "--guidance_rescale",
        0.5,
        "--batch_size",
        2,
        "--out",
        tmp_path,
    )
    assert code == 0, err
    paths = [pathlib.Path(line) for line in out.split("\n") if line.endswith(".png")]
    recipes = [images.read_recipe(path) for path in paths]
    made = [(path, r) for path, r in zip(paths, recipes) if "grid_columns" not in r]
    assert [(r["prompt"], r["seed"]) for _, r in made] == [
        ("a red dot", 7),
        ("a red dot", 8),
        (prompt, 7),
        (prompt, 8),
    ]
    for path, recipe in made:
        assert recipe["guidance"]["decoder"] == 2.5
        assert recipe["guidance_low"]["decoder"] == 0.25
        assert recipe["guidance_high"]["decoder"] == 1.0
        assert recipe["guidance_rescale"]["decoder"] == 0.5
        assert recipe["model_hash"] == bundle.describe(bundle_dir)["hash"]
        with Image.open(path) as picture:
            assert picture.size == (8, 8)
            assert "Seed: " in picture.text["parameters"]
    assert "cut" in err
    grid = images.read_recipe(paths[-1])
    assert images.recipes_of(grid) == [recipe for _, recipe in made]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompt", "a red dot", "--prompt", " "), 78, "--prompt 2 of 2 is empty"),
        ((), 78, "needs at least one --prompt"),
        (("--mode", "variatons"), 78, "did you mean 'variations'"),
        (
            ("--mode", "variations", "--prior_steps", 9, "--candidates", 1, "--prompt", "a"),
            78,
            "--prompt has no effect: --mode variations draws from --image alone; --prior_steps has "
            "no effect: --mode variations uses no prior; --candidates",
        ),
        (
            ("--prompt", "a", "--guidance_low", 0.9, "--guidance_high", 0.2),
            78,
            "guidance_low",
        ),
        (("--image", "a.png", "--prompt", "a"), 78, "--image has no effect: --mode text"),
        (("--prompt", "a", "--stages", 9), 78, "stages=9: expected 1 (the decoder alone) to 3"),
        (
            ("--prompt", "a", "--stages", 1, "--upsampler_steps", 2),
            78,
            "settings for 1 upsamplers, of which 0 run with stages=1",
        ),
        (
            ("--prompt", "a", "--sampler", "plms"),
            78,
            "unknown sampler 'plms': did you mean 'ddpm'? valid: ddim",
        ),
    ],
)
def test_generate_refuses_before_it_draws(generate, bundle_dir, tmp_path, arguments, code, said):
    got, _, err = generate("--model", bundle_dir, "--out", tmp_path, *arguments)
    assert got == code and said in err
    assert not list(tmp_path.iterdir())


def test_generate_without_a_bundle(generate, tmp_path):
    code, _, err = generate("--model", tmp_path / "none", "--prompt", "a red dot")
    assert code == 74 and "is no bundle" in err


def test_generate_below_a_file(generate, bundle_dir, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, _, _ = generate(
        "--model",
        bundle_dir,
        "--prompt",
        "a red dot",
        "--out",
        tmp_path / "file" / "out",
    )
    assert code == 74
    assert (tmp_path / "file").read_text() == "kept"
