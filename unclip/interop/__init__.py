"""Other people's weights, both ways: Karlo and diffusers, OpenAI CLIP, OpenCLIP, Hugging Face.

A format's module lists how each of its tensors becomes one of ours (`layout`); files are read and
written tensor by tensor (`weights`), and nothing is unpickled.
"""
