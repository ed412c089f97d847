"""The recipe: its words (`model`), reading one from a file (`load`), and what no single field can see (`checks`)."""

from compress.recipe.load import load_recipe
from compress.recipe.model import ALWAYS_MEASURED, Export, Recipe, json_schema

__all__ = ["ALWAYS_MEASURED", "Export", "Recipe", "json_schema", "load_recipe"]
