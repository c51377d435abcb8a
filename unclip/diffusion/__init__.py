"""Gaussian diffusion, the mathematics under the prior, the decoder and the upsamplers.

schedule: noise levels (unCLIP appendix C: cosine, linear) and their respacing;
gaussian: q(x_t | x_0), its posterior, and a network seen as a denoiser; losses: the training
objectives; samplers: from x_T to x_0 and back; guidance: classifier-free guidance and thresholds.
Nothing here knows a network, a configuration or a device. Paper: arXiv 2204.06125, section 2.
"""
