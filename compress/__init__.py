"""compress: make a Hugging Face model smaller, judge the result, and publish it with its evidence.

The story of a run is in `compress.pipeline`; the words of a recipe are in `compress.recipe`.
"""

__version__ = "0.1.0"
