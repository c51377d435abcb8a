"""Sweeps of an evaluation, as section 5 of the paper (arXiv 2204.06125) judges its models.

`plan` makes cells of a config, `drawing` draws them, `scoring` scores them, `store` keeps them,
`follow` does so for a training that goes on, `findings` and `report` say what came out.
"""
