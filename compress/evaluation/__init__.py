"""Measurements of a model on held-out text: perplexity, and KL divergence from the source.

specs        what a recipe asks for
measure      walk a checkpoint, form logits in chunks, reduce to flat measurements
statistics   intervals from per-window means
"""
