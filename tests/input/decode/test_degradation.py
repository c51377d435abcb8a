"""Degradations: their published ranges, keyed by the sample, in every order, and in place."""

import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.input.decode import degradation as dg
from unclip.input.decode.image import downsample


@pytest.fixture(scope="module")
def noisy():
    """A smooth picture with some texture, uint8 [128, 160, 3]."""
    y, x = np.mgrid[:128, :160]
    smooth = np.stack([110 + 60 * np.sin(y / 18 + c) * np.cos(x / 22 - c) for c in range(3)], -1)
    texture = np.random.default_rng(0).integers(-12, 12, smooth.shape)
    return (smooth + texture).astype(np.uint8)


@pytest.mark.parametrize("kernel, sigma", [(3, 0.6), (5, 1.1), (7, 2.0)])
def test_blur_is_the_two_dimensional_convolution(kernel, sigma):
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    r = kernel // 2
    window = np.array(
        [
            [np.exp(-(a * a + b * b) / (2 * sigma**2)) for b in range(-r, r + 1)]
            for a in range(-r, r + 1)
        ]
    )
    window /= window.sum()
    expected = np.zeros(noise.shape)
    for y in range(9):
        for x in range(11):
            for a in range(-r, r + 1):
                for b in range(-r, r + 1):
                    v, u = abs(y + a), abs(x + b)  # mirrored, the edge itself not repeated
                    v, u = v if v < 9 else 16 - v, u if u < 11 else 20 - u
                    expected[y, x] += window[a + r, b + r] * noise[v, u]
    assert np.abs(dg.gaussian_blur(noise, kernel, sigma) - expected).max() <= 0.5 + 1e-9


def test_the_papers_kernel():
    """exp(-1 / (2 x 0.36)) = 0.24935: centre 0.66722, sides 0.16639 of the 1-D factor."""
    assert np.allclose(dg.gaussian_kernel(3, 0.6), [0.166367, 0.667265, 0.166367], atol=1e-4)
    dot = np.zeros((5, 5, 1), np.uint8)
    dot[2, 2] = 200
    assert dg.gaussian_blur(dot)[1:4, 1:4, 0].tolist() == [[6, 22, 6], [22, 89, 22], [6, 22, 6]]
    for kernel, sigma in [(4, 1.0), (3, 0.0)]:
        with pytest.raises(ConfigError, match="odd kernel"):
            dg.gaussian_blur(dot, kernel, sigma)


def test_a_kernel_in_two_dimensions_is_a_convolution():
    rng = np.random.default_rng(0)
    picture, kernel = rng.integers(0, 256, (7, 9, 3), np.uint8), rng.random((5, 5))
    kernel /= kernel.sum()
    padded = np.pad(picture.astype(float), [(2, 2), (2, 2), (0, 0)], "reflect")
    expected = sum(
        kernel[a, b] * padded[4 - a : 11 - a, 4 - b : 13 - b] for a in range(5) for b in range(5)
    )
    assert np.abs(dg.filtered(picture, kernel) - expected).max() <= 0.51


def test_an_anisotropic_kernel_has_its_variances_along_its_axes():
    kernel = dg.anisotropic_kernel(41, np.pi / 6, (9.0, 1.0))
    y, x = np.mgrid[:41, :41] - 20
    along = np.cos(np.pi / 6) * x + np.sin(np.pi / 6) * y
    across = np.cos(np.pi / 6) * y - np.sin(np.pi / 6) * x
    assert kernel.sum() == pytest.approx(1)
    moments = [(kernel * v * w).sum() for v, w in ((along, along), (across, across))]
    assert moments == pytest.approx([9, 1], abs=1e-3)
    assert abs((kernel * along * across).sum()) < 1e-3


def test_sinc_passes_below_its_cutoff_and_rings():
    kernel = dg.sinc_kernel(41, np.pi / 2)
    response = np.abs(np.fft.fft2(kernel, (256, 256)))
    assert kernel.sum() == pytest.approx(1) and kernel.min() < -0.01
    assert response[0, :48].min() > 0.85 and response[0, 80:128].max() < 0.15
    step = np.zeros((64, 64, 3), np.uint8) + np.uint8([60])
    step[:, 32:] = 190
    edge = dg.filtered(step, dg.sinc_kernel(21, np.pi / 3))[32, :, 0]
    assert edge.max() > 195 and edge.min() < 55  # a Gaussian would overshoot nowhere


@pytest.mark.parametrize("kind", [*dg.KINDS])
@pytest.mark.parametrize("factor", [2, 4])
def test_degradations_are_keyed_small_and_real(noisy, kind, factor):
    original = noisy.copy()
    made = lambda k: dg.degrade(kind, noisy, factor, np.random.default_rng(k))
    results, again = ([made(k) for k in range(12)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(results, again))
    assert np.array_equal(noisy, original)
    shape = (128 // factor, 160 // factor, 3)
    assert all(r.dtype == np.uint8 and r.shape == shape for r in results)
    assert len({r.tobytes() for r in results}) == (12 if "bsr" in kind else 1)
    # Degraded, yet the same picture in the same place.
    clean = downsample(noisy, factor).astype(float)
    mean = np.mean(results, 0)
    assert np.abs(mean - clean).mean() < 8
    moved = [
        np.abs(mean - np.roll(clean, shift, axis)).mean() for shift in (-1, 1) for axis in (0, 1)
    ]
    assert min(moved) > np.abs(mean - clean).mean()


def test_bsrgans_own_ranges_are_far_stronger(noisy):
    clean = downsample(noisy, 4).astype(float)
    errors = {
        kind: np.mean(
            [
                np.abs(dg.degrade(kind, noisy, 4, np.random.default_rng(k)) - clean).mean()
                for k in range(30)
            ]
        )
        for kind in ("blur", "bsr", "bsrgan")
    }
    assert errors["blur"] < errors["bsr"] < 0.8 * errors["bsrgan"]


class Recorded:
    """What the steps of many pictures were called with."""

    def __init__(self, monkeypatch, noisy, ranges, count=400):
        self.orders, self.qualities, self.now = [], [], []
        names = {
            "_shrunk": "shrink", "_blurred": "blur", "_gaussian_noise": "noise",
            "_poisson_noise": "poisson", "_sensor_noise": "sensor",
        }  # fmt: skip
        for function, name in names.items():
            monkeypatch.setattr(dg, function, self.step(name))
        monkeypatch.setattr(dg, "_resized", self.resized)
        monkeypatch.setattr(dg, "jpeg", self.jpeg)
        for k in range(count):
            self.now = []
            out = dg.bsr(noisy[:8, :8], 2, np.random.default_rng(k), ranges)
            assert out.shape == (4, 4, 3)
            self.orders.append(tuple(self.now))

    def step(self, name):
        def run(image, *_):
            self.now.append(name)
            return image

        return run

    def resized(self, image, size, rng):
        self.now.append("resize")
        return np.zeros((*size, 3), np.uint8)

    def jpeg(self, image, quality):
        self.now.append("jpeg")
        self.qualities.append(quality)
        return image


@pytest.mark.parametrize(
    ("ranges", "blurs", "qualities"), [(dg.MODERATE, 1, (80, 95)), (dg.ORIGINAL, 2, (30, 95))]
)
def test_steps_come_in_every_order_and_as_often_as_published(
    monkeypatch, noisy, ranges, blurs, qualities
):
    found = Recorded(monkeypatch, noisy, ranges)
    count = lambda name: sum(order.count(name) for order in found.orders) / len(found.orders)
    assert count("blur") == blurs and count("shrink") == count("resize") == count("noise") == 1
    assert count("poisson") == pytest.approx(0.1, abs=0.05)
    assert count("sensor") == pytest.approx(0.25, abs=0.07)
    assert count("jpeg") == pytest.approx(1.9, abs=0.05)
    assert all(order[-1] == "jpeg" for order in found.orders)
    assert all(order.index("shrink") < order.index("resize") for order in found.orders)
    firsts = {order[0] for order in found.orders}
    assert firsts == {"blur", "shrink", "noise", "poisson", "sensor", "jpeg"}
    assert (min(found.qualities), max(found.qualities)) == qualities


def test_gaussian_noise_has_its_levels_and_three_kinds():
    flat = np.full((64, 64, 3), 128, np.uint8)
    alike, alone, deviations = 0, 0, []
    for k in range(60):
        noise = dg._gaussian_noise(flat, (2, 25), np.random.default_rng(k)).astype(float) - 128
        deviations.append(noise.std())
        correlation = np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)]
        alike += (correlation > 0.99).all()
        alone += (np.abs(correlation) < 0.1).all()
    assert min(deviations) > 1.7 and max(deviations) < 26
    assert alike / 60 == pytest.approx(0.4, abs=0.15)
    assert alone / 60 == pytest.approx(0.4, abs=0.15)


def test_poisson_noise_grows_with_light():
    """Its variance is light / photons, and it leaves the mean and black alone."""
    seed = next(k for k in range(50) if np.random.default_rng(k).random(2)[1] < 0.5)
    photons = 10 ** np.random.default_rng(seed).uniform(2, 4) / 255
    for level in (40, 120, 200):
        flat = np.full((128, 128, 3), level, np.uint8)
        noisy = dg._poisson_noise(flat, np.random.default_rng(seed)).astype(float)
        assert noisy.mean() == pytest.approx(level, rel=0.01)
        # Rounding to bytes adds 1 / 12.
        assert noisy.var() == pytest.approx(level / photons + 1 / 12, rel=0.05)
    black = np.zeros((8, 8, 3), np.uint8)
    assert not any(dg._poisson_noise(black, np.random.default_rng(k)).any() for k in range(5))


def test_resizing_moves_and_tints_nothing():
    flat = np.full((40, 56, 3), 130, np.uint8)
    y, x = np.mgrid[:40, :56]
    ramp = np.stack([3 * x + 2 * y] * 3, -1).astype(np.uint8)
    for k in range(12):
        rng = lambda k=k: np.random.default_rng(k)
        for size in ((10, 14), (13, 9), (60, 70), (1, 1), (0, 3)):
            assert (dg._resized(flat, size, rng()) == 130).all()
        small = dg._resized(ramp, (10, 14), rng()).astype(float)
        middle = ramp.reshape(10, 4, 14, 4, 3).mean((1, 3))
        assert np.abs(small - middle)[1:-1, 1:-1].max() <= 1


def test_sensor_noise_grows_with_light_in_linear_space():
    """Shot noise: the linear variance is shot x light + read^2, so it is affine in the light."""

    def linear(v):
        v = v / 255.0
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    seed = 3
    shot, read = (lambda r: (r.uniform(0, 2e-3), r.uniform(0, 5e-3)))(np.random.default_rng(seed))
    for level in (120, 160, 200):
        flat = np.full((200, 200, 3), level, np.uint8)
        noisy = linear(dg._sensor_noise(flat, np.random.default_rng(seed)).astype(float))
        assert noisy.var() == pytest.approx(shot * linear(level) + read**2, rel=0.05)
        assert noisy.mean() == pytest.approx(float(linear(level)), rel=0.01)


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="unknown degradation 'bsrgn': did you mean 'bsrgan'"):
        dg.check("bsrgn")
