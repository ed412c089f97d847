"""The steps of a run, one file each, in the order `compress.pipeline` calls them.

plan          everything that can be known before work starts: mistakes, bytes, memory, time
source        the source model and its health
texts         calibration and evaluation windows, and their overlap
fold          stages over checkpoints, each in a folder keyed by its fingerprint
judging       measurements of source and export, the round trip through the public loader, gates
reporting     one Report from all of it
environment   versions, device, git state
"""
