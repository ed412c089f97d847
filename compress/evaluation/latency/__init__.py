"""Seconds of both models, by turns."""
