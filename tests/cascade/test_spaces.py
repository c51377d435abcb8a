"""Stages of one embedding space: who trained with whom is kept, and another CLIP is refused."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

from unclip import UnCLIP, errors
from unclip.cascade import bundle, runs, spaces
from unclip.cascade.bundle import Part
from unclip.sweep import weights
from unclip.training.plan import lineage, make_plan
from unclip.training.start import train

pytestmark = pytest.mark.usefixtures("cheap_runs")


def clip(value=1.0):
    return Part("clip", {"embed_dim": 2}, {"w": np.float32([value, 1 / 3])})


def stage(name, *frozen, **settings):
    trained_with = {part.kind: bundle.space(part) for part in frozen}
    return Part(name, {}, {"w": np.float32([1])}, {}, settings, trained_with=trained_with)


@pytest.fixture(scope="module")
def other_clip(run_of, tmp_path_factory):
    """A bundle of the micro CLIP with one number changed."""
    part = runs.open_part(run_of("clip"), "clip")
    part.params["logit_scale"] = part.params["logit_scale"] + np.float32(1e-3)
    folder = tmp_path_factory.mktemp("other")
    bundle.write(folder, {"clip": part})
    return str(folder)


@pytest.fixture
def exported(run_of, other_clip):
    """The parts of a bundle whose CLIP is another one."""
    parts = {name: runs.open_part(run_of(name), name) for name in ("prior", "decoder")}
    parts["clip"] = runs.open_part(other_clip, "clip")
    return parts


# ============================================================ what is compared


def test_another_clip_or_t5_is_said_of_every_stage():
    t5 = Part("t5", {}, {"w": np.float32([3])})
    parts = {"clip": clip(), "prior": stage("prior", clip()), "decoder": stage("decoder", clip())}
    assert spaces.mixed(parts) == []
    lines = spaces.mixed(parts | {"clip": clip(1.001)})
    assert [line.split(":")[0] for line in lines] == [
        "the decoder was trained with another clip",
        "the prior was trained with another clip",
    ]
    for part in (clip(), clip(1.001)):
        assert any(bundle.space(part)[:12] in line for line in lines)
    # Without the CLIP, stages are compared with one another.
    apart = {"prior": stage("prior", clip()), "decoder": stage("decoder", clip(2))}
    (line,) = spaces.mixed(apart)
    assert "that of the decoder" in line
    reads = {"t5": Part("t5", {}, {"w": np.float32([4])}), "decoder": stage("decoder", t5)}
    assert "another t5" in spaces.mixed(reads)[0]
    assert spaces.mixed({"t5": t5, "decoder": stage("decoder", t5)}) == []


@pytest.mark.parametrize(
    ("prior", "decoder", "refused"),
    [
        ({}, {}, False),
        ({}, {"z_scale": 17.2}, False),  # CLIP's own length may be rescaled
        ({"embedding": "scale"}, {"z_scale": 17.2}, False),
        ({"embedding": "scale", "scale": 4.0}, {"z_scale": 4.0}, False),
        ({"embedding": "scale"}, {}, True),
        ({"embedding": "scale", "scale": 4.0}, {"z_scale": 17.2}, True),
        ({"embedding": "whiten", "scale": 17.2}, {}, False),
        ({"kind": "ar"}, {}, False),
        ({"embedding": "scale"}, {"embedding": "text"}, False),  # is given z_t
    ],
)
def test_a_scaled_prior_needs_a_decoder_of_that_scale(prior, decoder, refused):
    parts = {"prior": stage("prior", **prior), "decoder": stage("decoder", **decoder)}
    assert bool(spaces.mixed(parts)) == refused
    parts["decoder"].arch["use_z_i"] = False
    assert spaces.mixed(parts) == []


def test_what_is_not_known_is_not_refused_but_said():
    parts = {"clip": clip(), "prior": stage("prior"), "decoder": stage("decoder", clip())}
    assert spaces.check(parts) == []
    assert spaces.unknown(parts) == ["prior (clip)"]
    whole = spaces.completed(parts)
    assert spaces.unknown(whole) == [] and spaces.mixed(whole) == []
    assert whole["prior"].trained_with == {"clip": bundle.space(clip())}


def test_the_override_covers_what_it_was_given_for():
    parts = {"clip": clip(2.0), "prior": stage("prior", clip())}
    (line,) = spaces.mixed(parts)
    with pytest.raises(errors.ConfigError) as raised:
        spaces.check(parts)
    assert line in raised.value.message and "--allow_mixed_spaces" in raised.value.message
    assert "\n" not in raised.value.message
    assert spaces.check(parts, True) == [line] == spaces.check(parts, [line])
    with pytest.raises(errors.ConfigError):
        spaces.check(parts | {"clip": clip(3.0)}, [line])


# ============================================================ bundles


def test_a_bundle_keeps_the_space_through_a_cast(tmp_path):
    one = clip()
    parts = {"clip": one, "prior": stage("prior", one)}
    bundle.write(tmp_path / "half", parts, dtype="bfloat16")
    half = bundle.read(tmp_path / "half").parts
    assert half["clip"].params["w"].dtype == ml_dtypes.bfloat16
    assert half["clip"].space == bundle.space(clip()) == bundle.tree_hash(clip().params)
    assert half["prior"].trained_with == {"clip": bundle.space(clip())}
    assert spaces.mixed(half) == []
    bundle.write(tmp_path / "again", half, dtype="float32")
    assert bundle.read_part(tmp_path / "again", "clip").space == bundle.space(clip())
    # They decide no picture: the model hash is that of a bundle without them.
    plain = {"clip": clip(), "prior": stage("prior")}
    assert bundle.write(tmp_path / "plain", plain) == bundle.write(tmp_path / "known", parts)


def test_a_bundle_of_an_older_version_is_read(tmp_path):
    bundle.write(tmp_path, {"clip": clip(), "prior": stage("prior", clip(2.0))})
    document = json.loads((tmp_path / "model.json").read_text())
    for record in document["parts"].values():
        record.pop("space", None), record.pop("trained_with", None)
    (tmp_path / "model.json").write_text(json.dumps(document))
    parts = bundle.read(tmp_path).parts
    assert spaces.check(parts) == [] and spaces.unknown(parts) == ["prior (clip)"]
    assert bundle.space(parts["clip"]) == bundle.space(clip())
    for wrong in ({"space": 3}, {"trained_with": {"clip": 3}}, {"mixed_spaces": "x"}):
        changed = json.loads(json.dumps(document))
        changed["parts"]["prior"] |= wrong
        (tmp_path / "model.json").write_text(json.dumps(changed))
        with pytest.raises(errors.DataError, match="list of parts is not valid"):
            bundle.describe(tmp_path)


def test_load_refuses_and_warns(exported, tmp_path):
    bundle.write(tmp_path / "mixed", exported)
    with pytest.raises(errors.ConfigError, match="the prior was trained with another clip"):
        UnCLIP.load(str(tmp_path / "mixed"))
    with pytest.warns(UserWarning, match="was trained with another clip") as warned:
        UnCLIP.load(str(tmp_path / "mixed"), allow_mixed_spaces=True)
    assert len(warned) == 2
    bundle.write(tmp_path / "said", exported, {spaces.RECORD: spaces.mixed(exported)})
    with pytest.warns(UserWarning, match="was trained with another clip"):
        UnCLIP.load(str(tmp_path / "said"))


# ============================================================ runs


@pytest.fixture
def resumable(run_of, tmp_path):
    """resumable(stage): a copy of its workdir, which a test may change."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / "run")


@pytest.mark.parametrize("name", ["prior", "decoder"])
@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_clip(name, resumable, tiny_config, run_of, other_clip):
    folder = resumable(name)
    before = (folder / "config.json").read_bytes()
    config = tiny_config(name, {"clip": other_clip, "total_steps": 3})
    with pytest.raises(errors.ConfigError, match=f"--config.clip={other_clip} is ") as raised:
        train(config, str(folder))
    assert "--config.allow_mixed_spaces" in raised.value.message
    assert (folder / "config.json").read_bytes() == before
    config.allow_mixed_spaces = True
    plan = make_plan(config)
    found = lineage(plan, folder)
    assert found["trained_with"] == {"clip": runs.open_part(other_clip, "clip").space}
    (line,) = found["mixed_spaces"]
    # From then on it is that CLIP's, and what happened stays written down, also in a bundle.
    runs.write_lineage(folder, found)
    assert lineage(plan, folder) == found
    bundle.write(folder / "bundle", {name: runs.open_part(folder, name)})
    assert bundle.describe(folder / "bundle")["parts"][name]["mixed_spaces"] == [line]


@pytest.mark.slow
def test_a_prior_goes_on_in_another_space_where_that_is_allowed(resumable, tiny_config, other_clip):
    folder = resumable("prior")
    statistics = runs.statistics_of(folder)
    changes = {"clip": other_clip, "total_steps": 3, "allow_mixed_spaces": True}
    train(tiny_config("prior", changes), str(folder))
    assert len(runs.lineage(folder, "prior")["mixed_spaces"]) == 1
    for name, value in runs.statistics_of(folder).items():  # its parameters live in their space
        np.testing.assert_array_equal(value, statistics[name])


@pytest.mark.slow
def test_a_run_does_not_start_from_one_of_another_clip(tiny_config, run_of, other_clip, tmp_path):
    changes = {"clip": other_clip, "init_from": run_of("decoder")}
    with pytest.raises(errors.ConfigError, match="was trained with another clip"):
        train(tiny_config("decoder", changes), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    scaled = {"clip": run_of("clip"), "init_from": run_of("decoder"), "task.z_scale": 17.2}
    with pytest.raises(errors.ConfigError, match=r"the config gives it 17\.2 \* z_i / \|z_i\|"):
        train(tiny_config("decoder", scaled), str(tmp_path / "run"))


def test_a_workdir_of_an_older_version_knows_what_its_statistics_say(
    resumable, tiny_config, run_of, other_clip
):
    folder = resumable("prior")
    (folder / runs.TRAINED_WITH).unlink()
    own = bundle.space(runs.open_part(run_of("clip"), "clip"))
    assert runs.lineage(folder, "prior")["trained_with"] == {"clip": own}
    (folder / runs.STATISTICS).unlink()
    assert runs.lineage(folder, "prior") == {"trained_with": {}, "mixed_spaces": ()}
    part = runs.open_part(folder, "prior")
    assert spaces.unknown({"prior": part}) == ["prior (clip)"]


@pytest.mark.slow
def test_the_same_clip_from_another_place_is_the_same(tiny_config, run_of, bundle_dir, tmp_path):
    half = bundle.read(bundle_dir, ["clip"])
    bundle.write(tmp_path, half.parts, dtype="bfloat16")
    folder = pathlib.Path(run_of("decoder"))
    for place in (bundle_dir, str(tmp_path)):
        plan = make_plan(tiny_config("decoder", {"clip": place}))
        assert (
            lineage(plan, folder)["trained_with"] == runs.lineage(folder, "decoder")["trained_with"]
        )


@pytest.mark.slow
def test_the_doctor_finds_it_too(tiny_config, run_of, other_clip):
    from unclip.training.checkup import examine

    config = tiny_config("decoder", {"clip": other_clip})
    problems = examine(config, run_of("decoder"))["problems"]
    assert any("another clip" in problem for problem in problems)


def test_a_sweep_is_refused_before_it_draws(run_of, other_clip, exported, tmp_path):
    places = {
        "clip": (other_clip, None),
        "prior": (run_of("prior"), 2),
        "decoder": (run_of("decoder"), 2),
    }
    with pytest.raises(errors.ConfigError) as raised:
        weights.check_spaces([places])
    assert raised.value.message.count("another clip") == 2
    weights.check_spaces([places | {"clip": (run_of("clip"), 2)}])
    bundle.write(tmp_path, exported, {spaces.RECORD: spaces.mixed(exported)})
    weights.check_spaces([{name: (str(tmp_path), None) for name in exported}])
    # CLIP is read as the others were trained with it, also where raw parameters are drawn.
    raw = weights.load_part(run_of("clip"), "clip", 2, "params")
    assert bundle.space(raw) == bundle.space(runs.open_part(run_of("clip"), "clip"))


def test_copies_keep_what_is_known(tmp_path):
    part = dataclasses.replace(stage("decoder", clip()), mixed_spaces=("resumed with another",))
    bundle.write(tmp_path / "one", {"decoder": part})
    bundle.write(tmp_path / "two", bundle.read(tmp_path / "one", lazy=True).parts)
    one, two = (pathlib.Path(tmp_path, name, "model.json").read_bytes() for name in ("one", "two"))
    assert one == two
