"""CLIP scores and R-precision on embeddings at known angles."""

import numpy as np
import pytest

from unclip.errors import ConfigError, NumericsError
from unclip.measure import clip_score


def at(*degrees):
    """Vectors in the plane at these angles, of various lengths."""
    angle = np.deg2rad(degrees)
    length = 1 + np.arange(len(degrees))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * length[:, None]


def test_scores_of_known_angles():
    z_i, z_t = at(0, 0, 0), at(60, 120, 90)
    assert clip_score.cosine(z_i, z_t) == pytest.approx([0.5, -0.5, 0], abs=1e-15)
    # Hessel clips each picture, torchmetrics the mean.
    assert clip_score.hessel(z_i, z_t) == pytest.approx([1.25, 0, 0], abs=1e-15)
    assert clip_score.torchmetrics(z_i, z_t) == pytest.approx(0, abs=1e-12)
    assert clip_score.torchmetrics(z_i[:1], z_t[:1]) == pytest.approx(50)
    assert clip_score.torchmetrics(z_i[1:], z_t[1:]) == 0


def test_reference_score_takes_the_best_reference():
    z_i, z_t = at(0, 0, 0, 0), at(60, 60, 120, 60)
    references = [at(60, 240), at(120, 5, 0), at(120), at(200, 240)]
    score = clip_score.ref_clip_score(z_i, z_t, references)
    best = np.cos(np.deg2rad(55))  # of 60°, 55° and 60° away
    assert score[0] == pytest.approx(2 * 1.25 * 1 / 2.25)
    assert score[1] == pytest.approx(2 * 1.25 * best / (1.25 + best))
    assert score[2] == 0  # the picture does not fit its caption
    assert score[3] == 0  # no reference does


def test_r_precision_of_all_captions():
    """Three captions; the third picture is nearer to the first caption than to its own."""
    z_t, z_i = at(0, 90, 180), at(10, 100, 20)
    assert clip_score.r_precision(z_i, z_t, candidates=3) == pytest.approx(2 / 3)


def test_a_tie_is_a_miss():
    z_t = np.array([[1.0, 1, 0], [1, 0, 1], [0, 1, 1]])
    z_i = np.array([[1.0, 0, 0], [1, 0, 0.9], [-1, 1, 1]])
    assert clip_score.r_precision(z_i, z_t, candidates=3) == pytest.approx(2 / 3)


def test_equal_captions_are_no_distractors():
    z_t, z_i = at(0, 0, 90)[:, :] / [[1], [2], [3]], at(10, 20, 80)
    assert clip_score.r_precision(z_i, z_t, candidates=2) == 1
    # Told apart by text although their embeddings are the same, the first two tie and miss.
    named = clip_score.r_precision(z_i, z_t, candidates=3, captions=["a fox", "one fox", "a cat"])
    assert named == pytest.approx(1 / 3)
    # Equal text whose embeddings differ by rounding is one caption.
    z_t[1] += 1e-9
    same = clip_score.r_precision(z_i, z_t, candidates=2, captions=["a fox", "a fox", "a cat"])
    assert same == 1


def test_chance_is_one_in_the_number_of_candidates():
    rng = np.random.default_rng(0)
    z_i, z_t = rng.normal(size=(2, 2000, 16))
    for candidates in (2, 5, 20):
        hits = clip_score.r_precision(z_i, z_t, candidates=candidates)
        chance = 1 / candidates
        assert abs(hits - chance) < 4 * np.sqrt(chance / 2000)


def test_candidates_equal_a_plain_draw(monkeypatch):
    """Own caption against candidates − 1 of the others, drawn in order by one generator."""
    monkeypatch.setattr(clip_score, "BLOCK", 7)
    rng = np.random.default_rng(1)
    z_t = rng.normal(size=(30, 4))
    z_i = z_t + rng.normal(size=(30, 4))
    draws, hits = np.random.default_rng(5), 0
    for i in range(30):
        others = np.delete(np.arange(30), i)[draws.choice(29, 9, replace=False)]
        cosine = z_t @ z_i[i] / np.linalg.norm(z_t, axis=1)
        hits += cosine[i] > cosine[others].max()
    assert 0 < hits < 30
    assert clip_score.r_precision(z_i, z_t, candidates=10, seed=5) == hits / 30


def test_bad_input():
    z = at(0, 10, 20)
    with pytest.raises(ConfigError, match="3 pictures and 2 captions"):
        clip_score.cosine(z, z[:2])
    with pytest.raises(ConfigError, match="2 and 3 wide"):
        clip_score.hessel(z, np.ones((3, 3)))
    with pytest.raises(ConfigError, match="0 z_i given"):
        clip_score.torchmetrics(z[:0], z[:0])
    with pytest.raises(NumericsError, match="row 1 of the z_t is all zero"):
        clip_score.cosine(z, z * [[1], [0], [1]])
    with pytest.raises(NumericsError, match=r"1 of 3 z_i .* row 2"):
        clip_score.cosine(z * [[1], [1], [np.nan]], z)
    with pytest.raises(ConfigError, match="4 candidates asked for; the set has 3 distinct"):
        clip_score.r_precision(z, z, candidates=4)
    with pytest.raises(ConfigError, match="1 candidates"):
        clip_score.r_precision(z, z, candidates=1)
    with pytest.raises(ConfigError, match="2 captions for 3"):
        clip_score.r_precision(z, z, candidates=2, captions=["a", "b"])
    with pytest.raises(ConfigError, match="2 sets of references for 3"):
        clip_score.ref_clip_score(z, z, [z, z])
    with pytest.raises(ConfigError, match="0 references of caption 1"):
        clip_score.ref_clip_score(z, z, [z, z[:0], z])
