"""What can be cut from a network, what that costs, in which order, and how it is done.

`table` is plain numpy, so that policies and budgets work without torch; `groups` asks
Torch-Pruning; `cutting` narrows; `criteria` order channels, `blending` mixes and clusters them;
`compensation` makes up for what is gone.
"""
