"""Prompts for people to read: both models' greedy answers side by side. They inform, and decide nothing."""
