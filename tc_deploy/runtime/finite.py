"""What comes out of a run is looked at before it is handed out: NaN makes a black picture, and nobody says why.

Looking at every step would cost a copy to the host at each of them, for which a GPU has to be waited for. So a run's
last latents are looked at, and only where those are wrong is it run again, step by step, to say where it began. Never:
mends a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import NotFiniteError
from tc_deploy.types import FloatArray


def is_finite(values: NDArray[Any]) -> bool:
    """Whether all of them are."""
    return bool(np.isfinite(values).all())


def first_bad_step(latents_by_step: Iterable[FloatArray]) -> int | None:
    """The first step after which latents are not finite; no later one is run. None where all are."""
    return next((step for step, latents in enumerate(latents_by_step) if not is_finite(latents)), None)


def latents_error(bundle: Path, step: int | None, steps: int, guidance_scale: float | None) -> NotFiniteError:
    """The latents of a run are not finite from ``step`` on; None where they were when it was run again."""
    if step is None:
        return NotFiniteError(
            f"{bundle}: the latents are not finite after {steps} steps, and were when the same was run again, so the"
            f" engine does not repeat itself; look for the reason with: tc-deploy validate {bundle}"
        )
    scale = "" if guidance_scale is None else f" lower the guidance scale of {guidance_scale:g}, or"
    return NotFiniteError(
        f"{bundle}: the latents are not finite from step {step} on (steps count from 0 to {steps - 1}), so there is no"
        f" picture; give other inputs,{scale} look for the reason with: tc-deploy validate {bundle}"
    )


def pixels_error(bundle: Path) -> NotFiniteError:
    """The decoder's pictures are not finite, though the latents are."""
    return NotFiniteError(
        f"{bundle}: the decoder makes values that are not finite of latents that are; look for the reason with:"
        f" tc-deploy validate {bundle}"
    )
