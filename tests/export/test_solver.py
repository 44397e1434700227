"""The solver's table and graph against diffusers' own schedulers: whole runs, no stand-ins."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tc_deploy.errors import ExportError
from tc_deploy.export.check import check_solver_graph
from tc_deploy.export.solver_graph import solver_model
from tc_deploy.models.solver import check_solver, read_solver
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import GuidanceRule

# The tests run diffusers' schedulers themselves, which turn tensors into arrays in the way of numpy 1.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning"),
]

TOLERANCE = {
    "table": 5e-6,  # a float32 table in float64 arithmetic; the scheduler rounds some of its sums to float32
    "graph": 2e-5,  # the graph in float32, with a model in the loop
}
"""Largest difference of any step's latents from the scheduler's, relative to the largest latent of that step."""

STEPS = (1, 2, 7, 50)
SHAPE = (4, 5, 3)

DPM = diffusers.DPMSolverMultistepScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
UNIPC = diffusers.UniPCMultistepScheduler
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

ZERO_SNR = {
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "linspace",
}

# Class, settings, arguments of set_timesteps, history.
CASES = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, {}, 0),
    "ddim-v": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, {}, 0),
    "ddim-sample": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "sample"}, {}, 0),
    "ddim-linspace": (diffusers.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "linspace"}, {}, 0),
    "ddim-zero-snr": (diffusers.DDIMScheduler, ZERO_SNR, {}, 0),
    "ddim-inverse": (diffusers.DDIMInverseScheduler, {"clip_sample": False}, {}, 0),
    "dpm++-1": (DPM, {"solver_order": 1}, {}, 0),
    "dpm++-2": (DPM, {}, {}, 1),
    "dpm++-2-heun": (DPM, {"solver_type": "heun"}, {}, 1),
    "dpm++-2-karras": (DPM, {"use_karras_sigmas": True}, {}, 1),
    "dpm++-2-v": (DPM, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}, 1),
    "dpm++-2-sample": (DPM, {"prediction_type": "sample", "timestep_spacing": "leading"}, {}, 1),
    "dpm++-2-flow": (DPM, {**FLOW_SIGMAS, "flow_shift": 3.0}, {}, 1),
    "dpm++-2-no-lower-order": (DPM, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, {}, 1),
    "dpm-2": (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}, 1),
    "dpm++-3": (DPM, {"solver_order": 3}, {}, 2),
    "dpm++-3-heun": (DPM, {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True}, {}, 2),
    "dpm++-single-3": (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3, "lower_order_final": True}, {}, 2),
    "edm-dpm": (diffusers.EDMDPMSolverMultistepScheduler, {}, {}, 1),
    "edm-euler": (diffusers.EDMEulerScheduler, {}, {}, 0),
    "euler": (diffusers.EulerDiscreteScheduler, {}, {}, 0),
    "euler-v-leading": (
        diffusers.EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
        {},
        0,
    ),
    "euler-karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}, {}, 0),
    "flow": (FLOW, {}, {}, 0),
    "flow-shift": (FLOW, {"shift": 3.0}, {}, 0),
    "flow-dynamic": (FLOW, {"use_dynamic_shifting": True}, {"mu": 0.8}, 0),
    "deis-2": (diffusers.DEISMultistepScheduler, {}, {}, 1),
    "deis-3": (diffusers.DEISMultistepScheduler, {"solver_order": 3}, {}, 2),
    "ipndm": (diffusers.IPNDMScheduler, {}, {}, 3),
    "lms": (diffusers.LMSDiscreteScheduler, {}, {}, 3),
    "unipc-2": (UNIPC, {}, {}, 2),
    "unipc-2-flow": (UNIPC, {**FLOW_SIGMAS, "flow_shift": 5.0}, {}, 2),
    "unipc-2-uncorrected": (UNIPC, {"disable_corrector": [0, 1, 2]}, {}, 2),
    "unipc-2-noise": (UNIPC, {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}, 2),
    "unipc-3": (UNIPC, {"solver_order": 3}, {}, 3),
    "unipc-3-bh1": (UNIPC, {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}, 3),
}


def made(case):
    kind, config, arguments, history = CASES[case]
    return kind(**config), arguments, history


def started(scheduler, steps, arguments):
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(steps, **arguments)
    return fresh


def scheduler_run(scheduler, model, noise):
    """Latents (T+1, ...) as a diffusers pipeline makes them; ``model(step, model input)`` gives the guided output."""
    latents = [noise * float(getattr(scheduler, "init_noise_sigma", 1.0))]
    for step, timestep in enumerate(scheduler.timesteps):
        sample = latents[-1]
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        latents.append(scheduler.step(model(step, seen), timestep, sample, return_dict=False)[0])
    return np.stack([sample.double().numpy() for sample in latents])


def table_run(table, model, noise):
    latents, outputs = [noise * table.init_noise_sigma], []
    for step in range(table.steps):
        outputs.append(model(step, latents[-1] * float(table.input_scale[step])))
        following = torch.zeros_like(noise)
        for age in range(min(step, table.history) + 1):
            following += float(table.coefficients[step, age]) * latents[step - age]
            following += float(table.coefficients[step, table.history + 1 + age]) * outputs[step - age]
        latents.append(following)
    return np.stack([sample.numpy() for sample in latents])


def relative_error(found, expected):
    axes = tuple(range(1, expected.ndim))
    # IPNDM's only step of one ends at 0.
    size = np.maximum(np.abs(expected).max(axis=axes), np.finfo(np.float64).tiny)
    return (np.abs(found - expected).max(axis=axes) / size).max()


def random_model(steps, shape, seed=0):
    """A model that looks at its input, mildly, so that errors feed back, and otherwise answers at random."""
    answers = torch.from_numpy(np.random.default_rng(seed).standard_normal((steps, *shape)))
    return lambda step, seen: answers[step].to(seen.dtype) + torch.tanh(0.1 * seen)


def random_noise(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


class TestTable:
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("case", CASES)
    def test_run_equals_the_schedulers(self, case, steps):
        scheduler, arguments, history = made(case)
        table = read_solver(scheduler, steps, arguments)
        model, noise = random_model(steps, (2, *SHAPE)), random_noise(2, *SHAPE)
        expected = scheduler_run(started(scheduler, steps, arguments), model, noise)
        assert relative_error(table_run(table, model, noise), expected) < TOLERANCE["table"]
        assert table.history <= min(history, steps - 1)
        if steps > max(history, 2) + 1:
            assert table.history == history

    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    @pytest.mark.parametrize("steps", [1, 2, 8, 50])
    @pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.CogVideoXDDIMScheduler])
    def test_spacing(self, kind, steps, spacing):
        scheduler = kind(clip_sample=False, timestep_spacing=spacing)
        table = read_solver(scheduler, steps)
        assert table.timesteps.tolist() == started(scheduler, steps, {}).timesteps.tolist()

    @pytest.mark.parametrize("case", ["ddim", "dpm++-3", "euler", "flow-dynamic", "unipc-2"])
    def test_arrays(self, case):
        scheduler, arguments, _ = made(case)
        table = read_solver(scheduler, 6, arguments)
        fresh = started(scheduler, 6, arguments)
        assert table.steps == 6
        assert table.init_noise_sigma == float(getattr(fresh, "init_noise_sigma", 1.0))
        np.testing.assert_array_equal(table.timesteps, fresh.timesteps.numpy().astype(np.float32))
        width = table.history + 1
        assert table.coefficients.shape == (6, 2 * width)
        assert table.input_scale.shape == (6,)
        assert {table.timesteps.dtype, table.coefficients.dtype, table.input_scale.dtype} == {np.dtype(np.float32)}
        for step in range(table.history):
            before_the_start = table.coefficients[step].reshape(2, width)[:, step + 1 :]
            assert not before_the_start.any()

    def test_ddim_is_its_formula(self):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        table = read_solver(scheduler, 5)
        alpha = [scheduler.alphas_cumprod[int(t)].double().item() for t in table.timesteps] + [1.0]
        for step in range(5):
            ratio = (alpha[step + 1] / alpha[step]) ** 0.5
            noise = (1 - alpha[step + 1]) ** 0.5 - ratio * (1 - alpha[step]) ** 0.5
            np.testing.assert_allclose(table.coefficients[step], [ratio, noise], rtol=TOLERANCE["table"])

    def test_learned_variance_is_left_out(self):
        """DPM-Solver cuts the model's output to three channels, which the graph does for any number."""
        table = read_solver(DPM(variance_type="learned_range"), 5)
        np.testing.assert_array_equal(table.coefficients, read_solver(DPM(), 5).coefficients)

    def test_sigmas_stand_in_place_of_the_step_count(self):
        sigmas = np.linspace(1.0, 0.25, 4)
        table = read_solver(FLOW(use_dynamic_shifting=True), 4, {"sigmas": sigmas, "mu": 0.5})
        fresh = FLOW(use_dynamic_shifting=True)
        fresh.set_timesteps(sigmas=sigmas, mu=0.5)
        np.testing.assert_array_equal(table.timesteps, fresh.timesteps.numpy())

    def test_equal_timesteps(self):
        scheduler = diffusers.EulerDiscreteScheduler()
        table = read_solver(scheduler, 4, {"timesteps": [900, 900, 500, 100]})
        step_sizes = table.coefficients[:, 1]
        assert step_sizes[0] == 0.0
        assert (step_sizes[1:] < 0).all()

    @pytest.mark.parametrize("case", ["ddim", "dpm++-3", "euler", "flow-dynamic", "unipc-2"])
    def test_callers_scheduler_is_not_changed(self, case):
        scheduler, arguments, _ = made(case)
        # A caller may be in the midst of a run of its own.
        scheduler.set_timesteps(9, **arguments)
        sample = random_noise(1, *SHAPE)
        for timestep in scheduler.timesteps[:2]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            scheduler.step(sample, timestep, sample)
        before, config = copy.deepcopy(vars(scheduler)), dict(scheduler.config)
        read_solver(scheduler, 5, arguments)
        assert dict(scheduler.config) == config
        assert vars(scheduler).keys() == before.keys()
        assert all(equal(vars(scheduler)[name], value) for name, value in before.items())

    def test_callers_random_numbers_are_not_changed(self):
        before = torch.get_rng_state()
        with pytest.raises(ExportError):
            read_solver(diffusers.DDPMScheduler(), 3)
        read_solver(diffusers.DDIMScheduler(clip_sample=False), 3)
        assert torch.equal(torch.get_rng_state(), before)


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


class Affine(diffusers.EulerDiscreteScheduler):
    def scale_model_input(self, sample, timestep):
        return super().scale_model_input(sample, timestep) + 1


class ChannelMixing(FLOW):
    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output.flip(1), timestep, sample, **kwargs)


# Scheduler, what the message must say.
REFUSED = {
    "clip_sample": (diffusers.DDIMScheduler, ["not linear", "set clip_sample=False"]),
    "thresholding": (lambda: DPM(thresholding=True), ["not linear", "set thresholding=False"]),
    "thresholding-and-clip": (
        lambda: diffusers.DDIMScheduler(thresholding=True),
        ["not linear", "set thresholding=False", "clip_sample=False"],
    ),
    "affine": (Affine, ["not linear", "no setting"]),
    "channel-mixing": (ChannelMixing, ["latents depart from ChannelMixing", "channels or samples"]),
    "euler-ancestral": (
        diffusers.EulerAncestralDiscreteScheduler,
        ["EulerAncestralDiscreteScheduler", "different seeds", "use a scheduler such as DDIM"],
    ),
    "ddpm": (diffusers.DDPMScheduler, ["DDPMScheduler", "different seeds"]),
    "lcm": (diffusers.LCMScheduler, ["LCMScheduler", "different seeds"]),
    "tcd": (diffusers.TCDScheduler, ["TCDScheduler", "different seeds"]),
    "sa-solver": (diffusers.SASolverScheduler, ["SASolverScheduler", "different seeds"]),
    "sde-dpmsolver++": (
        lambda: DPM(algorithm_type="sde-dpmsolver++"),
        ["different seeds", "set algorithm_type='dpmsolver++' (found 'sde-dpmsolver++')"],
    ),
    "stochastic-flow": (lambda: FLOW(stochastic_sampling=True), ["different seeds", "set stochastic_sampling=False"]),
    "heun": (
        diffusers.HeunDiscreteScheduler,
        ["HeunDiscreteScheduler", "one model call per step", "found 19"],
    ),
    "flow-heun": (diffusers.FlowMatchHeunDiscreteScheduler, ["one model call per step", "found 19"]),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, ["one model call per step", "found 19"]),
    "pndm": (lambda: diffusers.PNDMScheduler(skip_prk_steps=True), ["one model call per step", "found 11"]),
    "unipc-4": (lambda: UNIPC(solver_order=4), ["more than 3 earlier steps", "set solver_order=3 (found 4)"]),
    "unipc-noise": (
        lambda: UNIPC(predict_x0=False),
        ["not finite after step 9 of 10", "final_sigmas_type='sigma_min'"],
    ),
    "unipc-bh1": (lambda: UNIPC(solver_type="bh1", solver_order=3), ["not finite", "final_sigmas_type='sigma_min'"]),
    "equal-timesteps": (lambda: UNIPC(num_train_timesteps=10), ["not finite after step 6 of 10", "take fewer"]),
    "no-mu": (lambda: FLOW(use_dynamic_shifting=True), ["set_timesteps", "`mu` must be passed"]),
    "too-many-steps": (lambda: diffusers.DDIMScheduler(num_train_timesteps=5), ["set_timesteps", "step count"]),
    "other-step": (diffusers.CogVideoXDPMScheduler, ["CogVideoXDPMScheduler.step", "TypeError"]),
}


class TestRefusal:
    @pytest.mark.parametrize("case", REFUSED)
    def test_message_says_what_is_to_blame(self, case):
        make, expected = REFUSED[case]
        with pytest.raises(ExportError) as caught:
            read_solver(make(), 10)
        message = str(caught.value)
        assert "\n" not in message
        assert [words for words in expected if words not in message] == [], message

    @pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
    @pytest.mark.parametrize("steps", [1, 2, 50])
    def test_clipping_is_seen_at_every_step_count(self, steps, setting):
        settings = {"clip_sample": False, "prediction_type": "v_prediction", setting: True}
        with pytest.raises(ExportError, match=f"set {setting}=False"):
            read_solver(diffusers.DDIMScheduler(**settings), steps)

    def test_no_steps(self):
        with pytest.raises(ExportError, match="steps must be at least 1, found 0"):
            read_solver(FLOW(), 0)

    def test_other_scheduler(self):
        table = read_solver(diffusers.DDIMScheduler(clip_sample=False), 5)
        with pytest.raises(ExportError, match="timesteps depart from EulerDiscreteScheduler"):
            check_solver(table, diffusers.EulerDiscreteScheduler())

    @pytest.mark.parametrize("field", ["coefficients", "input_scale", "init_noise_sigma"])
    def test_altered_table(self, field):
        scheduler = diffusers.EulerDiscreteScheduler()
        table = read_solver(scheduler, 5)
        check_solver(table, scheduler)
        with pytest.raises(ExportError, match="depart from EulerDiscreteScheduler"):
            check_solver(replace(table, **{field: getattr(table, field) * 1.001}), scheduler)


def session_of(model):
    data = ir.to_proto(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def graph_run(session, table, model, noise, guidance):
    """Latents (T+1, ...) by the graph; ``model(step, hidden states)`` gives the raw output of all its rows."""
    batch, halves = len(noise), 1 if guidance is None else 2
    zeros = np.zeros_like(noise)
    latents, outputs = [noise * np.float32(table.init_noise_sigma)], []
    hidden_states = np.concatenate([latents[0] * table.input_scale[0]] * halves)
    scales = np.append(table.input_scale[1:], np.float32(1.0))
    for step in range(table.steps):
        feeds = {
            "model_output": model(step, torch.from_numpy(hidden_states)).numpy(),
            "latents": latents[-1],
            "coefficients": np.repeat(table.coefficients[step : step + 1], batch, axis=0),
            "input_scale": np.full(batch, scales[step]),
        }
        for age in range(1, table.history + 1):
            feeds[f"latents.{age}"] = latents[step - age] if age <= step else zeros
            feeds[f"guided_output.{age}"] = outputs[step - age] if age <= step else zeros
        if guidance is not None:
            feeds["guidance_scale"] = guidance
        results = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
        np.testing.assert_array_equal(
            results["hidden_states"], np.concatenate([results["next_latents"] * scales[step]] * halves)
        )
        latents.append(results["next_latents"])
        outputs.append(results.get("guided_output"))
        hidden_states = results["hidden_states"]
    return np.stack(latents)


class TestGraph:
    @pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("case", ["ddim-v", "dpm++-2-karras", "dpm++-3", "euler", "flow-dynamic", "unipc-3"])
    def test_guided_run_equals_the_schedulers(self, case, steps, batch, dynamic):
        scheduler, arguments, _ = made(case)
        table = read_solver(scheduler, steps, arguments)
        channels = SHAPE[0]
        raw_model = random_model(steps, (2 * batch, 2 * channels, *SHAPE[1:]))
        noise = random_noise(batch, *SHAPE)
        guidance = np.linspace(0.0, 7.5, batch + 1, dtype=np.float32)[1:]

        def learned_variance(step, hidden_states):
            return raw_model(step, torch.cat([hidden_states, hidden_states], dim=1))

        def guided(step, seen):
            conditional, unconditional = learned_variance(step, torch.cat([seen, seen]))[:, :channels].chunk(2)
            scale = torch.from_numpy(guidance).to(seen.dtype).reshape(-1, 1, 1, 1)
            return unconditional + scale * (conditional - unconditional)

        session = session_of(solver_model(table.history, SHAPE, 2 * channels, True, None if dynamic else batch))
        found = graph_run(session, table, learned_variance, noise.float().numpy(), guidance)
        expected = scheduler_run(started(scheduler, steps, arguments), guided, noise)
        assert relative_error(found, expected) < TOLERANCE["graph"]

    @pytest.mark.parametrize("shape", [SHAPE, (2, 3, 4, 5), (6, 4)], ids=["image", "video", "packed"])
    @pytest.mark.parametrize("extra_channels", [0, 3])
    @pytest.mark.parametrize("case", ["ddim", "unipc-2"])
    def test_unguided_run_equals_the_schedulers(self, case, extra_channels, shape):
        scheduler, arguments, _ = made(case)
        table = read_solver(scheduler, 7, arguments)
        answers = random_noise(7, 2, shape[0] + extra_channels, *shape[1:], seed=3)
        noise = random_noise(2, *shape)
        session = session_of(solver_model(table.history, shape, shape[0] + extra_channels, False, None))
        found = graph_run(session, table, lambda step, _: answers[step].float(), noise.float().numpy(), None)
        fresh = started(scheduler, 7, arguments)
        expected = scheduler_run(fresh, lambda step, _: answers[step, :, : shape[0]], noise)
        assert relative_error(found, expected) < TOLERANCE["graph"]

    def test_samples_at_different_steps(self):
        table = read_solver(DPM(), 9)
        session = session_of(solver_model(1, SHAPE, SHAPE[0], True, None))
        at, rng = np.array([1, 7, 4]), np.random.default_rng(0)
        output = rng.standard_normal((6, *SHAPE), dtype=np.float32)
        latents, earlier_latents, earlier_output = rng.standard_normal((3, 3, *SHAPE), dtype=np.float32)
        feeds = {
            "model_output": output,
            "latents": latents,
            "latents.1": earlier_latents,
            "guided_output.1": earlier_output,
            "coefficients": table.coefficients[at],
            "input_scale": np.array([1.0, 0.5, 0.25], dtype=np.float32),
            "guidance_scale": np.array([1.0, 4.0, 0.0], dtype=np.float32),
        }
        names = ["next_latents", "hidden_states", "guided_output"]
        following, hidden_states, guided = session.run(names, feeds)
        for sample, step in enumerate(at):
            scale = feeds["guidance_scale"][sample]
            expected_guided = output[3 + sample] + scale * (output[sample] - output[3 + sample])
            factors = table.coefficients[step]
            expected = factors[0] * latents[sample] + factors[1] * earlier_latents[sample]
            expected += factors[2] * expected_guided + factors[3] * earlier_output[sample]
            np.testing.assert_allclose(guided[sample], expected_guided, atol=TOLERANCE["graph"])
            np.testing.assert_allclose(following[sample], expected, atol=TOLERANCE["graph"])
            for half in (0, 3):
                scaled = following[sample] * feeds["input_scale"][sample]
                np.testing.assert_array_equal(hidden_states[half + sample], scaled)

    def test_names_and_shapes(self):
        graph = solver_model(2, (4, 8, 6), 8, True, None).graph
        latents = ["batch", 4, 8, 6]
        assert shapes_of(graph.inputs) == {
            "model_output": ["model_batch", 8, 8, 6],
            "latents": latents,
            "latents.1": latents,
            "latents.2": latents,
            "guided_output.1": latents,
            "guided_output.2": latents,
            "coefficients": ["batch", 6],
            "input_scale": ["batch"],
            "guidance_scale": ["batch"],
        }
        assert shapes_of(graph.outputs) == {
            "next_latents": latents,
            "hidden_states": ["model_batch", 4, 8, 6],
            "guided_output": latents,
        }

    def test_no_history_and_no_guidance(self):
        graph = solver_model(0, (4, 8, 6), 4, False, 5).graph
        assert shapes_of(graph.inputs) == {
            "model_output": [5, 4, 8, 6],
            "latents": [5, 4, 8, 6],
            "coefficients": [5, 2],
            "input_scale": [5],
        }
        assert shapes_of(graph.outputs) == {"next_latents": [5, 4, 8, 6], "hidden_states": [5, 4, 8, 6]}

    @settings(max_examples=30, deadline=None)
    @given(
        history=st.integers(0, 4),
        channels=st.integers(1, 5),
        extra=st.integers(0, 2),
        guided=st.booleans(),
        batch=st.none() | st.integers(1, 4),
    )
    def test_is_valid_and_reproducible(self, history, channels, extra, guided, batch):
        arguments = (history, (channels, 3, 2), channels + extra, guided, batch)
        proto = ir.to_proto(solver_model(*arguments))
        onnx.checker.check_model(proto, full_check=True)
        assert proto.ir_version == 10
        assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
        assert proto.SerializeToString() == ir.to_proto(solver_model(*arguments)).SerializeToString()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, SHAPE, 4, True, None), "history must be at least 0, found -1"),
            ((0, SHAPE, 3, True, None), "output channels must be at least 4, found 3"),
            ((0, SHAPE, 4, True, 0), "batch must be at least 1, found 0"),
        ],
    )
    def test_refuses_numbers_out_of_range(self, arguments, message):
        with pytest.raises(ExportError, match=message):
            solver_model(*arguments)


def shapes_of(values):
    return {value.name: [size if isinstance(size, int) else size.value for size in value.shape] for value in values}


@pytest.mark.parametrize("rule", list(GuidanceRule))
def test_guidance_is_by_its_rule(rule: GuidanceRule, tmp_path: Path) -> None:
    """The graph against PyTorch's formula, which is compared with the pipelines themselves (test_convention.py)."""
    table = read_solver(FLOW(), 4)
    path = tmp_path / "solver.onnx"
    ir.save(solver_model(table.history, SHAPE, SHAPE[0], True, None, rule), path)
    sampling = Sampling(scheduler=FLOW(), steps=4, guidance_scale=3.0, set_timesteps_kwargs={}, guidance_rule=rule)
    assert check_solver_graph(table, sampling, (2, *SHAPE), path) <= TOLERANCE["graph"]
    plain = replace(sampling, guidance_rule=GuidanceRule.PLAIN)
    if rule is not GuidanceRule.PLAIN:
        with pytest.raises(ExportError, match="departs from PyTorch"):
            check_solver_graph(table, plain, (2, *SHAPE), path)
