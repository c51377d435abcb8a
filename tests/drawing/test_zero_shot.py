"""Labels and captions by CLIP against NumPy, and what is refused."""

import numpy as np
import pytest

from unclip import errors
from unclip.drawing import zero_shot
from unclip.files import images
from unclip.input.decode.image import for_clip
from unclip.measure.pictures import open_pictures
from unclip.tasks.arrays import unit

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def folder(tmp_path, picture):
    """Six pictures in folders red, BLUE and other, and one that is damaged."""
    for k, name in enumerate(("red", "red", "BLUE", "BLUE", "BLUE", "other")):
        images.write_png(tmp_path / name / f"{k}.png", picture(k))
    (tmp_path / "red" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return tmp_path


def test_probabilities_are_the_softmax_of_clips_logits(model, picture):
    labels, texts = ["red", "a blue bar", "dot"], ["a photo of a {}.", "{}"]
    given = [picture(k) for k in range(5)]
    found = model.classify(given, labels, templates=["photo", "plain"])
    z_i = unit(model.embed_image(np.stack([for_clip(p, 16) for p in given])))
    z_t = [unit(model.embed_text([t.format(label) for t in texts])).mean(0) for label in labels]
    scale = np.exp(model.parts["clip"].params["logit_scale"])
    logits = scale * np.float64(z_i) @ unit(np.stack(z_t)).T
    want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, want, atol=1e-4)
    assert found.best == [labels[k] for k in want.argmax(1)]
    one = model.classify(given[3], labels, templates=["photo", "plain"])
    np.testing.assert_allclose(one.probabilities[0], found.probabilities[3], atol=1e-6)


def test_accuracy_by_folders(model, folder):
    with pytest.warns(UserWarning, match=r"left out: red/9\.png"):
        found = model.classify(open_pictures(folder), ["red", "blue"])
    assert len(found.names) == 6
    counts, others = zero_shot.accuracy(found)
    assert {label: count for label, (_, count) in counts.items()} == {"red": 2, "blue": 3}
    assert others == 1
    truth = {"red": "red", "BLUE": "blue"}
    for label, (right, _) in counts.items():
        own = [b for n, b in zip(found.names, found.best) if truth.get(n.split("/")[0]) == label]
        assert right == own.count(label)


def test_search_ranks_by_cosine(model, folder):
    with pytest.warns(UserWarning, match="left out"):
        found = model.search(folder, "a red dot", n=4)
    pictures = open_pictures(folder)
    scores = {
        pictures.name(i): float(model.score(for_clip(pictures.read(i), 16)[None], ["a red dot"])[0])
        for i in range(len(pictures))
        if "9.png" not in pictures.name(i)
    }
    best = sorted(scores, key=scores.get, reverse=True)[:4]
    assert [one.name for one in found] == best
    assert [one.score for one in found] == pytest.approx([scores[name] for name in best], abs=1e-5)
    assert [pictures.name(one.number) for one in found] == best


def test_a_folder_without_one_good_picture(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(errors.DataError, match=r"no picture could be read; the last was a\.png"),
    ):
        model.search(tmp_path, "a red dot")


@pytest.mark.parametrize(
    ("labels", "templates", "said"),
    [
        (["a"], "plain", r"1 label\(s\): expected at least 2"),
        (["a", " ", "a "], "plain", "label 2 of 3 is empty; labels given twice: a"),
        (["a", "b"], "a photo", "template 'a photo': expected a text with one {}"),
        (["a", "b"], ["{} {}"], "expected a text with one {}"),
        (["a", "b"], ["{0.x}"], "expected a text with one {}"),
        (["a", "b"], [], "no template"),
    ],
)
def test_labels_and_templates_that_are_refused(model, picture, labels, templates, said):
    with pytest.raises(errors.ConfigError, match=said):
        model.classify(picture(), labels, templates=templates)
    assert zero_shot.checked_templates("openai7") == zero_shot.TEMPLATES["openai7"]
