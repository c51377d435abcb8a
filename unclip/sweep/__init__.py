"""Sweeps of an evaluation over settings of drawing, such as guidance, and over models.

`plan` makes cells of a config, `drawing` draws them, `scoring` scores them, `store` keeps them,
`follow` does so for the checkpoints of a training that still runs, `findings` and `report`
summarise the results.
"""
