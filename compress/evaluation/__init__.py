"""Measurements of a model on held-out text and tasks: perplexity, KL divergence from the source, answers.

paired       scores of two models on the same windows or items
specs        what a recipe asks for
measure      walk a checkpoint, form logits in chunks, reduce to flat measurements
statistics   intervals from per-window means
tasks        questions with answers, through lm-eval
"""
