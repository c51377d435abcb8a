"""What a training job needs around the model: processes, meshes, checkpoints, optimisers, metrics.

Nothing here knows a model, a loss or a data set: every function takes pytrees and paths. The paper
(arXiv 2204.06125) enters only through the optimiser presets of its Table 3, in `optim`.
"""
