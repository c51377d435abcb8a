"""Architectures alone: linen modules, whose parameters are plain nested dicts."""

from unclip.models import parameters

parameters.take_without_tracing()
