"""What a training job needs around the model: processes, meshes, checkpoints, optimisers, metrics.

Nothing here knows a model, a loss or a data set: every function takes pytrees and paths.
"""
