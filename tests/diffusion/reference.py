"""The samplers in float64 numpy, in the variables of their authors: y = x / alpha, sigma / alpha.

Written from the papers and k-diffusion's equations, a loop with branches each, to hold against the
coefficients of `unclip.diffusion.samplers`. All take (denoise, schedule, x_T, noise, eta), denoise
being (x_t, timestep) -> x_0, and give x_0.
"""

import math

import numpy as np


def _setting(denoise, s, x_T):
    """(y of x_T, denoise of (y, k), sigma / alpha [n] and lambda [n] in the order visited)."""
    alpha = np.sqrt(s.alpha_bar[::-1])
    sigma = np.sqrt(1 - s.alpha_bar[::-1]) / alpha
    x0_of = lambda y, k: denoise(alpha[k] * y, int(s.timesteps[::-1][k]))
    return np.asarray(x_T, np.float64) / alpha[0], x0_of, sigma, -np.log(sigma)


def euler(denoise, s, x_T, noise=None, eta=0.0):
    """k-diffusion's sample_euler_ancestral; with eta 0 Euler's method."""
    y, x0_of, sigma, _ = _setting(denoise, s, x_T)
    for k in range(len(s) - 1):
        x0 = x0_of(y, k)
        now, then = sigma[k], sigma[k + 1]
        up = min(then, eta * math.sqrt(then**2 * (now**2 - then**2) / now**2))
        down = math.sqrt(then**2 - up**2)
        y = y + (down - now) * (y - x0) / now
        if up:
            y = y + up * noise[k]
    return x0_of(y, len(s) - 1)


def heun(denoise, s, x_T, noise=None, eta=0.0):
    """Algorithm 1 of arXiv 2206.00364; where sigma shrinks by more than 3, x_0' replaces x_0."""
    y, x0_of, sigma, _ = _setting(denoise, s, x_T)
    for k in range(len(s) - 1):
        now, then = sigma[k], sigma[k + 1]
        x0 = x0_of(y, k)
        slope = (y - x0) / now
        there = y + (then - now) * slope
        x0_there = x0_of(there, k + 1)
        if now / then > 3:
            y = x0_there + then * slope
        else:
            y = y + (then - now) * (slope + (there - x0_there) / then) / 2
    return x0_of(y, len(s) - 1)


def dpm_sde(denoise, s, x_T, noise=None, eta=0.0, order=2):
    """k-diffusion's sample_dpmpp_2m_sde (midpoint) and sample_dpmpp_3m_sde.

    Of first order at the step into the first timestep, as ours.
    """
    y, x0_of, sigma, lam = _setting(denoise, s, x_T)
    past = []
    for k in range(len(s) - 1):
        x0 = x0_of(y, k)
        h = lam[k + 1] - lam[k]
        long = h * (1 + eta)
        y_next = math.exp(-long) * y - math.expm1(-long) * x0
        into_first = k == len(s) - 2
        if past and not into_first:
            r0 = (lam[k] - lam[k - 1]) / h
            d = (x0 - past[-1]) / r0
            if order == 2:
                y_next = y_next - 0.5 * math.expm1(-long) * d
            else:
                phi_2 = math.expm1(-long) / long + 1
                phi_3 = phi_2 / long - 0.5
                d2 = 0.0
                if len(past) > 1:
                    r1 = (lam[k - 1] - lam[k - 2]) / h
                    d_before = (past[-1] - past[-2]) / r1
                    d2 = (d - d_before) / (r0 + r1)
                    d = d + (d - d_before) * r0 / (r0 + r1)
                y_next = y_next + phi_2 * d - phi_3 * d2
        if eta:
            y_next = y_next + sigma[k + 1] * math.sqrt(-math.expm1(-2 * h * eta)) * noise[k]
        y, past = y_next, [*past, x0]
    return x0_of(y, len(s) - 1)


def unipc(denoise, s, x_T, noise=None, eta=0.0):
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867): its linear systems solved."""
    y, x0_of, _, lam = _setting(denoise, s, x_T)
    said, corrected = [], []
    for k in range(len(s)):
        x0 = x0_of(y, k)
        if k == len(s) - 1:
            return x0
        if k:
            h = lam[k] - lam[k - 1]
            nodes = [(lam[k - 2] - lam[k - 1]) / h, 1.0] if k > 1 else [1.0]
            differences = [(said[k - 2] - said[k - 1]) / nodes[0]] if k > 1 else []
            differences.append(x0 - said[k - 1])
            # b_i = h phi_{i+1}(h) i! / B(h) with phi_{i+1} = (phi_i - 1 / i!) / h, h being -h here.
            z, b, phi = -h, [], math.expm1(-h) / -h
            for i in range(1, len(nodes) + 1):
                phi = (phi - 1 / math.factorial(i)) / z
                b.append(z * phi * math.factorial(i) / math.expm1(z))
            powers = np.array([[node**i for node in nodes] for i in range(len(nodes))])
            weights = [0.5] if k == 1 else np.linalg.solve(powers, b)
            y = math.exp(-h) * corrected[-1] - math.expm1(-h) * said[k - 1]
            for weight, difference in zip(weights, differences):
                y = y - math.expm1(-h) * weight * difference
        said.append(x0)
        corrected.append(y)
        h = lam[k + 1] - lam[k]
        y = math.exp(-h) * y - math.expm1(-h) * x0
        if k and k < len(s) - 2:
            y = y - 0.5 * math.expm1(-h) * (x0 - said[k - 1]) * h / (lam[k] - lam[k - 1])
    raise AssertionError("the last step returns")


SAMPLERS = {
    "euler": euler,
    "euler-ancestral": euler,
    "ddim": euler,
    "heun": heun,
    "dpm++2m": dpm_sde,
    "dpm++2m-sde": dpm_sde,
    "dpm++3m-sde": lambda *args: dpm_sde(*args, order=3),
    "unipc": unipc,
}
