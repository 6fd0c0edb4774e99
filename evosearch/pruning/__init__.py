"""What can be cut from a network, what that costs, in which order, and how it is done.

`table` is plain numpy, so that policies and budgets work without torch; `groups`
finds what must be cut together, from the proposals of `dependencies` (Torch-Pruning) or `chains`;
`cutting` narrows; `criteria` order channels, `blending` mixes and clusters them, `ranking` puts all
on one scale. `compensation`, `patches` and `reconstruction` make up for what is gone; `folding` and
`fusing` make fast copies.
"""
