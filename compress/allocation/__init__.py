"""Which linear gets how many bits: budgets in bytes, costs in nats, and the choice between them.

units    a linear, or those that must share a scheme
budget   what people have (bytes on disk, memory while serving) -> bytes for linears
solver   the cheapest choice within a number of bytes
fit      predicted costs held against measured divergence
"""
