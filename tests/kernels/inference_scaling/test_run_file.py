"""Runs on the host that were saved: what goes on, what is refused, and what is compared."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from chain_texts import CHAIN, POTENTIAL, ChainTexts

from bayesinf import errors, kernels
from bayesinf.kernels.inference_scaling import (
    ConformalAcceptance,
    DiscreteChain,
    Gibbs,
    Islands,
    OpenAIGenerator,
    ParallelTempering,
    Potential,
    Resample,
    as_text_generator,
)

RESAMPLE = Resample(1.0, scheme="multinomial")
EXCLUDED = {"wall_time"}


def is_same(one, other):
    first, second = json.loads(one.to_json()), json.loads(other.to_json())
    return all(first[name] == second[name] or name in EXCLUDED for name in first)


@pytest.mark.parametrize("barrier", ["barrier", "speculative"])
@pytest.mark.parametrize("method", [RESAMPLE, Gibbs(3), Islands(RESAMPLE, 2), ParallelTempering(num_sweeps=2)])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path, method, barrier):
    options = {"method": method, "num_particles": 6, "barrier": barrier}
    whole = kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options)
    path = tmp_path / "run.json"
    count = []

    def stop(event):
        count.append(event)
        if len(count) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options, save=path, on_event=stop)
    generator = ChainTexts(end="")
    rest = kernels.infer(5, generator, POTENTIAL, "go", **options, resume=path)
    # what was drawn before the stop is not drawn again, and is counted; not what was under way for nobody yet
    if barrier == "barrier":
        assert rest.tokens == whole.tokens
        assert rest.num_calls == whole.num_calls
    again = dataclasses.replace(rest, tokens=whole.tokens, num_calls=whole.num_calls)
    assert is_same(again, whole)
    assert sum(num for _, num in generator.calls) < whole.tokens.generated
    with pytest.raises(errors.CheckpointError, match="another key"):
        kernels.infer(6, ChainTexts(end=""), POTENTIAL, "go", **options, resume=path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options, resume=path)


def test_a_run_in_process_goes_on_from_its_seeds(tmp_path):
    likes_a = Potential(lambda state: jnp.where(state.last == 0, 0.9, 0.2), kind="step")
    path = tmp_path / "run.json"
    whole = kernels.infer(0, as_text_generator(CHAIN), likes_a, num_particles=6, method=RESAMPLE)

    def stop(event):
        if event.num_steps == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kernels.infer(0, CHAIN, likes_a, num_particles=6, method=RESAMPLE, save=path, on_event=stop)
    rest = kernels.infer(0, CHAIN, likes_a, num_particles=6, method=RESAMPLE, resume=path)
    assert rest.texts == whole.texts
    assert rest.log_evidence == whole.log_evidence


def test_an_outage_keeps_what_there_was_and_can_be_resumed(tmp_path):
    path = tmp_path / "run.json"
    down = ChainTexts(fails=lambda text, call: len(text) == 2, end="")
    with pytest.raises(errors.GenerationError, match="the line is dead") as caught:
        kernels.infer(0, down, POTENTIAL, "go", num_particles=2, save=path)
    assert sorted({len(text) for text in caught.value.result.texts}) == [2]
    assert caught.value.result.num_steps.tolist() == [2]
    with pytest.warns(errors.SamplingWarning, match="all requests of a step failed"):
        kernels.infer(0, down, POTENTIAL, "go", num_particles=2, throw=False)
    whole = kernels.infer(0, ChainTexts(end=""), POTENTIAL, "go", num_particles=2)
    assert kernels.infer(0, ChainTexts(end=""), POTENTIAL, "go", num_particles=2, resume=path).texts == whole.texts
    for method in ("cascade", "a_star"):
        with pytest.raises(errors.GenerationError, match="the line is dead"):
            kernels.infer(0, ChainTexts(fails=lambda *_: True), POTENTIAL, "go", num_particles=2, method=method)


def saved(path, generator=None, potential=POTENTIAL, prompt="go", **options):
    options = {"num_particles": 4, "budget": 1000} | options
    return kernels.infer(0, generator or ChainTexts(), potential, prompt, save=path, **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 999}, "another budget .*1000 there, 999 here"),
        ({"num_particles": 5}, "another num_particles"),
        ({"method": RESAMPLE}, "another method"),
        ({"barrier": "speculative"}, "another barrier"),
        ({"prompt": "stop"}, "another prompt"),
        ({"potential": POTENTIAL**2.0}, 'another potential .*"exponent": 1.0.* there, .*"exponent": 2.0'),
        ({"potential": Potential(POTENTIAL.score, kind="step", aggregate="min")}, "another potential"),
        ({"potential": POTENTIAL * POTENTIAL}, "another potential"),
    ],
    ids=["budget", "particles", "method", "barrier", "prompt", "exponent", "aggregate", "factors"],
)
def test_another_run_is_refused_by_what_differs(tmp_path, changes, said):
    path = tmp_path / "run.json"
    saved(path)
    with pytest.raises(errors.CheckpointError, match=said):
        saved(path, **changes, resume=path)


def test_a_step_too_few_is_another_generator(tmp_path):
    path = tmp_path / "run.json"
    saved(path)
    longer = ChainTexts()
    longer.max_steps = 9
    with pytest.raises(errors.CheckpointError, match=r'another generator .*"max_steps": 4.* there, .*"max_steps": 9'):
        saved(path, longer, resume=path)


def test_generators_say_what_their_law_depends_on(tmp_path):
    def server(**options):
        return OpenAIGenerator("http://one/v1", "model", **options)

    here = server()
    there = OpenAIGenerator("http://two/v1", "model", api_key="other", timeout=5.0, max_retries=9)
    assert here.fingerprint() == there.fingerprint()
    changes = {"stop": "|", "end_markers": ["x"], "temperature": 0.9, "top_p": 0.5, "max_steps": 3, "mode": "chat"}
    others = [server(**{name: value}) for name, value in changes.items()]
    others += [OpenAIGenerator("http://one/v1", "larger"), server(extra={"min_p": 0.0}), server(max_tokens_per_step=9)]

    def drafts(alpha=0.1, largest=9.0, draft=here):
        return ConformalAcceptance(draft, there, len, [0.0] * 18 + [largest], alpha)

    others += [drafts(), drafts(alpha=0.2), drafts(largest=8.0), drafts(draft=server(stop="|"))]
    in_process = [as_text_generator(CHAIN), as_text_generator(CHAIN, jnp.arange(3)), as_text_generator(CHAIN, 2)]
    flat = DiscreteChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], max_steps=CHAIN.max_steps, end="b")
    others += [*in_process, as_text_generator(flat)]
    names = [json.dumps(generator.fingerprint(), sort_keys=True) for generator in [here, *others]]
    assert len(set(names)) == len(names)
    assert as_text_generator(CHAIN).fingerprint() == in_process[0].fingerprint()


def test_a_step_that_is_drawn_otherwise_is_refused(tmp_path):
    # as by another version of JAX, or another device
    likes_a = Potential(lambda state: jnp.where(state.last == 0, 0.9, 0.2), kind="step")
    path = tmp_path / "run.json"
    saved(path, CHAIN, likes_a, None)
    content = json.loads(path.read_text())
    (first, *_), *_ = content["sweeps"]["run"]["prefixes"]
    first[0] = {"a": "b", "b": "c", "c": "a"}[first[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(errors.CheckpointError, match="is drawn again"):
        saved(path, CHAIN, likes_a, None, resume=path)


def test_a_folder_that_is_not_there_is_told_before_anything_is_drawn(tmp_path):
    generator = ChainTexts()
    with pytest.raises(ValueError, match="save must lie in a folder that exists"):
        saved(tmp_path / "none" / "run.json", generator)
    assert not generator.calls
