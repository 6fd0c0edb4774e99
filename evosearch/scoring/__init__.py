"""Scoring a policy: cut for real, repair what can be repaired without training, measure.

`workload` is what a scorer needs to know, `proxies` the ways to score, `scorer` runs one policy,
`pool` runs many, in this process or on Ray. `dispatch` decides which worker gets what, `simulation`
stands in for the workers in tests and benchmarks.
"""
