"""A diffusers scheduler as a table of numbers: the coefficients of its update, read off it as a black box.

In: any diffusers scheduler and a step count. Out: a :class:`SolverTable`, with which the runtime needs no sampler
code. The update of a deterministic sampler is linear in the latents x and the guided model outputs m, element by
element, so its answers to unit vectors are its coefficients. Never: computes an update of its own, changes the
caller's scheduler, or accepts one whose update is random or not linear.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tc_deploy.errors import ExportError
from tc_deploy.types import FloatArray

DoubleArray: TypeAlias = NDArray[np.float64]

MAX_HISTORY = 3
"""Earlier steps that an update may need: LMS, IPNDM and UniPC of order 3 need 3; each costs two device buffers."""
TOLERANCE = 1e-5
"""Largest error of a run, relative to the largest latent of its step. Schedulers compute their factors, and some of
them their sums, in float32, so tables show up to 1.5e-6 at 250 steps; a clipped sample shows more than 1e-1."""
NEGLIGIBLE = float(np.finfo(np.float32).eps)
"""A coefficient this small beside the largest of its step is lost when float32 adds the terms."""
DEGENERATE = 1e-9
"""Relations between steps whose singular value is this small beside the largest are one relation and rounding."""
PROBE_SHAPE = (2, 3, 4, 4)
"""Samples, channels, height, width of random latents: enough to see a rule that mixes them, such as thresholding.
Three channels because DPM-Solver cuts the output to three where the model also predicts a variance."""
LARGE = 1e3
"""Amplitude far beyond any latent, so that whatever clips does clip."""
ALTERNATIVES = "use a scheduler such as DDIM, Euler, FlowMatchEuler, DPMSolverMultistep or UniPC"


@dataclass(frozen=True, kw_only=True, eq=False)
class SolverTable:
    """One sampling run of T steps, as numbers.

    The latents start as ``noise * init_noise_sigma``. At step s the model sees ``x_s * input_scale[s]`` and
    ``timesteps[s]``. With m_s its guided output and h the history::

        x_{s+1} = sum_{j=0..h} coefficients[s, j] x_{s-j} + sum_{j=0..h} coefficients[s, h+1+j] m_{s-j}

    A term that reaches before step 0 has coefficient 0.
    """

    timesteps: FloatArray
    """(T,) as the scheduler hands them to the model."""
    init_noise_sigma: float
    input_scale: FloatArray
    """(T,)"""
    history: int
    """h, the earlier latents and outputs that an update needs: 0 for DDIM and Euler, 1 for DPM-Solver++ 2M."""
    coefficients: FloatArray
    """(T, 2(h+1))"""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    @property
    def unit_noise(self) -> bool:
        """Whether a run starts from noise as it is drawn, and the model sees the latents as they are."""
        return self.init_noise_sigma == 1 and bool((self.input_scale == 1).all())

    def with_history(self, history: int) -> SolverTable:
        """The same run as a table that looks further back, to no effect."""
        terms = self.coefficients.reshape(self.steps, 2, -1)
        padded = np.pad(terms, ((0, 0), (0, 0), (0, history - self.history)))
        return dataclasses.replace(self, history=history, coefficients=padded.reshape(self.steps, -1))


def read_solver(scheduler: Any, steps: int, set_timesteps_kwargs: Mapping[str, Any] | None = None) -> SolverTable:
    """Read a scheduler's coefficients off it.

    Args:
        scheduler: any diffusers scheduler; it is copied, never changed.
        steps: T, at least 1.
        set_timesteps_kwargs: further arguments of ``set_timesteps``, for example ``mu`` for dynamic shifting;
            ``sigmas`` or ``timesteps`` stand in place of the step count.

    Returns:
        The table with the smallest history that reproduces the scheduler, checked by :func:`check_solver`.

    Raises:
        ExportError: the scheduler fails, calls the model more than once per step, adds noise, is not linear or needs
            more than three earlier steps; the message says what to change.
    """
    if steps < 1:
        raise ExportError(f"{_name(scheduler)}: steps must be at least 1, found {steps}")
    start = partial(started_scheduler, scheduler, steps, set_timesteps_kwargs)
    _check_linear(start, steps)
    fresh = start()
    timesteps, init_noise_sigma = _timesteps(fresh), _init_noise_sigma(fresh)
    responses, input_scale = _unit_responses(fresh, steps)
    history, coefficients = _shortest(scheduler, responses)
    table = SolverTable(
        timesteps=timesteps,
        init_noise_sigma=init_noise_sigma,
        input_scale=input_scale.astype(np.float32),
        history=history,
        coefficients=coefficients.astype(np.float32),
    )
    check_solver(table, scheduler, set_timesteps_kwargs)
    return table


def check_solver(table: SolverTable, scheduler: Any, set_timesteps_kwargs: Mapping[str, Any] | None = None) -> None:
    """Compare whole runs of a table, in float64, with the scheduler's own, on random latents and outputs.

    Args:
        table: what the runtime would use.
        scheduler: the scheduler that it stands for; it is copied, never changed.
        set_timesteps_kwargs: as for :func:`read_solver`.

    Raises:
        ExportError: timesteps, initial noise, model inputs or latents differ by more than ``TOLERANCE``, or the
            scheduler itself fails.
    """
    start = partial(started_scheduler, scheduler, table.steps, set_timesteps_kwargs)
    fresh = start()
    pairs = [
        ("timesteps", table.timesteps, _timesteps(fresh)),
        ("init_noise_sigma", np.array([table.init_noise_sigma]), np.array([_init_noise_sigma(fresh)])),
    ]
    for amplitude in (1.0, LARGE):
        probe = amplitude * _probe(table.steps, seed=2)
        probe[0] *= table.init_noise_sigma
        inputs, latents = _run(start, probe)
        found = _run_table(table, probe)
        scale = table.input_scale.reshape(-1, *[1] * len(PROBE_SHAPE))
        pairs += [("latents", found, latents), ("model inputs", found[:-1] * scale, inputs)]
    for what, found, expected in pairs:
        error = _error(found, expected)
        if not error <= TOLERANCE:
            raise ExportError(
                f"solver table: its {what} depart from {_name(scheduler)} by {error:.1e} of their size, expected at"
                f" most {TOLERANCE:.0e}; read the table from this scheduler with the same set_timesteps arguments, and"
                " if that fails too, it treats channels or samples unlike each other and cannot be used"
            )


def _check_linear(start: Callable[[], Any], steps: int) -> None:
    """Check that a run does not depend on the seed, and that the run of a sum is the sum of the runs.

    Raises:
        ExportError: it is not so.
    """
    scheduler = start()
    small, large = _probe(steps, seed=0), LARGE * _probe(steps, seed=1)
    first, again = (_run(start, small, seed) for seed in (0, 1))
    if not np.array_equal(first[1], again[1]):
        raise ExportError(
            f"{_name(scheduler)}: runs with different seeds differ, expected a deterministic update;"
            f" {_remedy(scheduler, _NOISY)}"
        )
    both = zip(_run(start, small + large), first, _run(start, large), strict=True)
    error = max(_error(whole, one + other) for whole, one, other in both)
    if not error <= TOLERANCE:
        raise ExportError(
            f"{_name(scheduler)}: the update is not linear in latents and model outputs: the sum rule fails by"
            f" {error:.1e}, expected at most {TOLERANCE:.0e}; {_remedy(scheduler, _NOT_LINEAR)}"
        )


def _unit_responses(fresh: Any, steps: int) -> tuple[DoubleArray, DoubleArray]:
    """What each update makes of every latent and output so far.

    Each x_s and m_s is a unit vector of its own. A scheduler cannot tell that x_s is not its last answer, and answers
    with its coefficients, exactly: no system of equations is solved, and rounding to float32 changes no 0 and no 1.

    Args:
        fresh: a scheduler before its first step.
        steps: T.

    Returns:
        (T, 2, T) coefficients of x_0..x_{T-1} and of m_0..m_{T-1} in x_{s+1}, and (T,) the scale of the model input.
    """
    responses = np.zeros((steps, 2, steps))
    input_scale = np.zeros(steps)
    for step in range(steps):
        latents, output = np.zeros((2, 1, 1, 1, 2 * steps))
        latents[..., step] = 1.0
        output[..., steps + step] = 1.0
        scaled, following = _step(fresh, step, latents, output)
        input_scale[step] = scaled[..., step].item()
        responses[step] = following.reshape(2, steps)
    return responses, input_scale


def _shortest(scheduler: Any, responses: DoubleArray) -> tuple[int, DoubleArray]:
    """The smallest history that suffices, with its coefficients (T, 2(h+1)).

    Raises:
        ExportError: more than ``MAX_HISTORY``.
    """
    for history in range(MAX_HISTORY + 1):
        coefficients = _coefficients(responses, history)
        if coefficients is not None:
            return history, coefficients
    raise ExportError(
        f"{_name(scheduler)}: the update needs more than {MAX_HISTORY} earlier steps; {_remedy(scheduler, _TOO_LONG)}"
    )


def _coefficients(responses: DoubleArray, history: int) -> DoubleArray | None:
    """Write every update with the last ``history`` earlier steps only.

    Most solvers look no further back, and their responses are the answer. UniPC keeps a corrected sample to itself,
    through which every earlier step shows. But x_{k+1} less its own update is zero in a run, so any multiple of that
    may be added for the k inside the window: the multiples that cancel what lies before the window are sought, and
    are zero where nothing does.

    Args:
        responses: (T, 2, T) from :func:`_unit_responses`.
        history: h.

    Returns:
        (T, 2(h+1)) in the order of :class:`SolverTable`, or None where the older terms do not cancel.
    """
    steps = len(responses)
    relations = responses.copy()
    relations[np.arange(steps - 1), 0, np.arange(1, steps)] -= 1.0
    coefficients = np.zeros((steps, 2, history + 1))
    for step, update in enumerate(responses):
        first = max(0, step - history)
        if first > 0 and history > 0:
            window = relations[first:step]  # (h, 2, T)
            older = window[:, :, :first].reshape(history, -1)
            multiples = np.linalg.lstsq(older.T, -update[:, :first].ravel(), rcond=DEGENERATE)[0]
            update = update + np.tensordot(multiples, window, axes=1)  # noqa: PLW2901 - the same update, rewritten
        if np.abs(update[:, :first]).max(initial=0.0) > NEGLIGIBLE * np.abs(update).max():
            return None
        coefficients[step, :, : step + 1 - first] = update[:, first : step + 1][:, ::-1]
    return coefficients.reshape(steps, -1)


def _run_table(table: SolverTable, probe: DoubleArray) -> DoubleArray:
    """The latents (T+1, ...) of a run by the table; ``probe`` as for :func:`_run`."""
    latents, outputs = [probe[0]], probe[1:]
    for step, row in enumerate(table.coefficients.astype(np.float64).reshape(table.steps, 2, -1)):
        ages = range(min(step, table.history) + 1)
        latents.append(
            sum((row[0, age] * latents[step - age] + row[1, age] * outputs[step - age] for age in ages), np.float64(0))
        )
    return np.stack(latents)


def _probe(steps: int, seed: int) -> DoubleArray:
    """Random initial latents and T model outputs, (T+1, *PROBE_SHAPE)."""
    return np.random.default_rng(seed).standard_normal((steps + 1, *PROBE_SHAPE))


def _run(start: Callable[[], Any], probe: DoubleArray, seed: int = 0) -> tuple[DoubleArray, DoubleArray]:
    """A whole run of a scheduler.

    Args:
        start: gives a scheduler before its first step.
        probe: (T+1, ...) the initial latents, then the T model outputs.
        seed: of torch's generator, for schedulers that add noise.

    Returns:
        (T, ...) the scaled model inputs and (T+1, ...) the latents.
    """
    fresh = start()
    inputs, latents = [], [probe[0]]
    for step, output in enumerate(probe[1:]):
        scaled, following = _step(fresh, step, latents[-1], output, seed)
        inputs.append(scaled)
        latents.append(following)
    return np.stack(inputs), np.stack(latents)


def started_scheduler(scheduler: Any, steps: int, set_timesteps_kwargs: Mapping[str, Any] | None) -> Any:
    """A copy of the scheduler, before its first step.

    Raises:
        ExportError: ``set_timesteps`` refuses, or there is not one timestep per step.
    """
    fresh = copy.deepcopy(scheduler)
    arguments = dict(set_timesteps_kwargs or {})
    # Most schedulers take either a step count or a list; diffusers' own pipelines pass the list alone.
    if not {"sigmas", "timesteps"} & arguments.keys():
        arguments["num_inference_steps"] = steps
    remedy = "choose another step count, or give what it asks for in sampling.set_timesteps_kwargs of a recipe"
    if "mu" in arguments:
        remedy += (
            "; a pipeline whose shift depends on the picture's size gives it mu, for which most want"
            " use_dynamic_shifting=True and time_shift_type='exponential' in scheduler_config.json"
        )
    with _asked(scheduler, "set_timesteps", remedy):
        fresh.set_timesteps(**arguments)
    if len(fresh.timesteps) != steps:
        raise ExportError(
            f"{_name(scheduler)}: expected one model call per step, found {len(fresh.timesteps)} for {steps} steps;"
            f" choose another step count, or {ALTERNATIVES}"
        )
    # Otherwise the first step is looked up by its timestep, and the second is taken where two are equal.
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(0)
    return fresh


def _step(
    fresh: Any, step: int, latents: DoubleArray, output: DoubleArray, seed: int = 0
) -> tuple[DoubleArray, DoubleArray]:
    """One step: the scaled model input and the next latents.

    Raises:
        ExportError: the scheduler fails or gives values that are not finite.
    """
    timestep, sample = fresh.timesteps[step], torch.tensor(latents)
    scale_model_input = getattr(fresh, "scale_model_input", lambda sample, _: sample)
    with torch.random.fork_rng(devices=[]), _asked(fresh, "step", ALTERNATIVES):
        # Not torch.manual_seed, which would seed every accelerator too.
        torch.default_generator.manual_seed(seed)
        scaled = scale_model_input(sample, timestep).double().numpy()
        following = fresh.step(torch.tensor(output), timestep, sample, return_dict=False)[0].double().numpy()
    if not np.isfinite(following).all():
        at_end = step + 1 == len(fresh.timesteps)
        remedy = _remedy(fresh, _NOT_FINITE) if at_end else "two timesteps may be equal: take fewer steps"
        raise ExportError(
            f"{_name(fresh)}: the latents are not finite after step {step} of {len(fresh.timesteps)}; {remedy}"
        )
    return scaled, following


def _timesteps(fresh: Any) -> FloatArray:
    return np.asarray(fresh.timesteps.tolist(), dtype=np.float32)


def _init_noise_sigma(fresh: Any) -> float:
    """Flow matching has none, since its noise has variance 1."""
    return float(getattr(fresh, "init_noise_sigma", 1.0))


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference at any step, relative to the largest expected value of that step."""
    difference, size = (
        np.abs(values).reshape(len(expected), -1).max(axis=1) for values in (found - expected, expected)
    )
    return float((difference / np.maximum(size, np.finfo(np.float64).tiny)).max())


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


@contextlib.contextmanager
def _asked(scheduler: Any, method: str, remedy: str) -> Iterator[None]:
    """Turn whatever a scheduler raises into an :class:`ExportError` of one line."""
    try:
        with warnings.catch_warnings():
            # diffusers turns tensors into arrays in the way of numpy 1, which numpy 2 still takes but deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except Exception as error:  # a black box may raise anything
        reason = " ".join(str(error).split())
        raise ExportError(f"{_name(scheduler)}.{method}: {type(error).__name__}: {reason}; {remedy}") from error


# Behaviour decides whether a scheduler is refused; its settings only tell why. Setting, which values are to blame,
# what to set.
_Suspects: TypeAlias = tuple[tuple[str, Callable[[Any], bool], object], ...]
_NOISY: _Suspects = (
    ("algorithm_type", lambda value: str(value).startswith("sde-"), "dpmsolver++"),
    ("stochastic_sampling", bool, False),
)
_NOT_LINEAR: _Suspects = (("thresholding", bool, False), ("clip_sample", bool, False))
_NOT_FINITE: _Suspects = (("final_sigmas_type", lambda value: value == "zero", "sigma_min"),)
_TOO_LONG: _Suspects = (("solver_order", lambda value: value > MAX_HISTORY, MAX_HISTORY),)


def _remedy(scheduler: Any, suspects: _Suspects) -> str:
    """Which settings to change, or that there is none."""
    config = scheduler.config
    found = [(name, value) for name, is_to_blame, value in suspects if name in config and is_to_blame(config[name])]
    if not found:
        return f"no setting of it is to blame; {ALTERNATIVES}"
    changes = " and ".join(f"{name}={value!r} (found {config[name]!r})" for name, value in found)
    return f"set {changes}"
