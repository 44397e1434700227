"""Back into diffusers: engines in the place of a pipeline's transformer.

In: a built bundle. Out: :class:`EngineTransformer`, which a diffusers pipeline calls as it calls its own transformer;
the pipeline keeps its scheduler, its guidance, its text encoders and its decoder. Never: guesses. A call that the plan
was not made for is refused, since caches of other steps give pictures that look almost right.
"""

from tc_deploy.diffusers.transformer import EngineTransformer, UnsupportedAttributeError

__all__ = ["EngineTransformer", "UnsupportedAttributeError"]
