"""Other people's weights, both ways: Karlo and diffusers, OpenAI CLIP, OpenCLIP, Hugging Face.

The networks are those of unCLIP (arXiv 2204.06125) as the public has trained them. A format module
lists how each of its tensors becomes one of ours (`layout`); files are read and written tensor by
tensor (`weights`), and nothing is unpickled.
"""
