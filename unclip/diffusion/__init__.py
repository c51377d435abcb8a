"""Gaussian diffusion, the mathematics under the prior, the decoder and the upsamplers.

schedule: noise schedules (cosine, linear) and their respacing; gaussian: q(x_t | x_0), its
posterior, and a network used as a denoiser; losses: the training objectives; samplers: from x_T to
x_0 and back; repaint: holes in pictures; guidance: classifier-free guidance and thresholds. Nothing
here depends on a network's architecture, a configuration or a device.
"""
