"""A recipe for a model that is taken as one piece: what it asks of blocks and tokens is refused or left out.

In: a recipe and a model. Out: the recipe as the model can have it. Never: changes what a model with blocks is asked.
"""

from __future__ import annotations

from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.errors import UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.types import Skip


def recipe_for(model: DiffusionTransformer, recipe: Recipe) -> Recipe:
    """The recipe as it is; where nothing is known of the model's blocks, a search without what needs them.

    Raises:
        UsageError: it asks to keep tokens or to skip blocks of such a model.
    """
    if model.family.blocks:
        return recipe
    cache = recipe.cache
    asked = [
        *(["keep some tokens (--keep-ratio)"] if any(cache.keep_ratio) else []),
        *(["keep some tokens (--keep-counts)"] if any(map(any, cache.keep_counts or ())) else []),
        *(["skip blocks (--skip blocks)"] if cache.skip is Skip.BLOCKS else []),
    ]
    if asked:
        raise UsageError(
            f"{recipe.model}: cannot {asked[0]}: nothing is known of the blocks of a {model.family.model_class}; leave"
            " it out, so that cached steps forecast the model's output, or describe the class (adapters.md in the"
            " documentation)"
        )
    space = recipe.search.model_copy(update={"keep_ratio": (0.0,)})
    whole = cache.model_copy(update={"keep_counts": None, "keep_ratio": (0.0, 0.0)})
    return recipe.model_copy(update={"cache": whole, "search": space})
