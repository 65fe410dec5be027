"""The generator over HTTP, against a server on loopback that fails in every way that servers do."""

import asyncio
import socket
import sys

import numpy as np
import pytest
from chain_texts import END, LENGTH, SCORES, estimates, law, p_value_of_means
from completions_server import PROMPT, serve

from bayesinf import errors, kernels
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import Capabilities, OpenAIGenerator, Potential, Resample, infer_async
from bayesinf.kernels.inference_scaling.http_request import RequestError, _retry_after
from bayesinf.kernels.inference_scaling.openai_capabilities import refused_field

pytest.importorskip("httpx")

RESAMPLE = Resample(1.0, scheme="multinomial")


def score(prompt, texts):
    letters = [text.replace("|", "") for text in texts]
    return [SCORES[text[-1]] * (0.5 if text[-2:-1] == text[-1] else 1.0) for text in letters]


POTENTIAL = Potential(score, kind="step")


def generator_at(url, **options):
    options = {"stop": "|", "max_steps": LENGTH, "max_tokens_per_step": 2, "backoff": 0.01, "timeout": 0.5} | options
    return OpenAIGenerator(url, "chain", **options)


def steps_at(server, num_samples=1, prefix=(), **options):
    async def body():
        generator = generator_at(server.url, **options)
        async with generator.session():
            return await generator.step(PROMPT, prefix, num_samples, 3)

    return asyncio.run(body())


def plain(text):
    return text.replace("|", "")


@pytest.mark.parametrize(
    ("style", "mode"),
    [("vllm", "completions"), ("llama", "completions"), ("keeps", "completions"), ("vllm", "chat"), ("llama", "chat")],
)
def test_the_law_over_http_is_that_of_the_chain(style, mode):
    # E[Zhat] = Z and E[Zhat W] = p G, as of the driver in process (test_text_driver)
    num = 40
    with serve(style=style) as server:
        generator = generator_at(server.url, mode=mode, timeout=30.0)

        async def body():
            options = {"method": RESAMPLE, "num_particles": 8, "answer": plain}
            return [await infer_async(s, generator, POTENTIAL, PROMPT, **options) for s in range(num)]

        results = asyncio.run(body())
    assert all(result.status == "complete" for result in results)
    rows, truth = estimates(results)
    assert p_value_of_means(rows, truth) > FALSE_ALARM
    # the test has power: an evidence of half the size, as of requests that are lost, is seen
    assert p_value_of_means(rows * 0.5, truth) < FALSE_ALARM


def test_duplicates_are_one_request():
    with serve() as server:
        result = kernels.infer(
            0, generator_at(server.url, timeout=30.0), POTENTIAL, PROMPT, method=RESAMPLE, num_particles=16
        )
        first, *others = server.requests
    assert first["n"] == 16
    assert first["prompt"] == PROMPT
    for t in range(1, LENGTH):
        prompts = [body["prompt"] for body in others if len(plain(body["prompt"])) == len(PROMPT) + t]
        assert len(prompts) == len(set(prompts))
    asked = sum(body.get("n", 1) for body in server.requests)
    assert asked == result.num_calls
    assert result.tokens.generated == 2 * asked


@pytest.mark.parametrize("fault", ["timeout", "drop", 500, 503, 429, "truncate", "garbage", "no choices"])
def test_what_passes_is_tried_again(fault):
    with serve(faults=[fault, fault]) as server:
        (step,) = steps_at(server, max_retries=2)
        assert step.failure is None
        assert len(server.requests) == 3
        if fault == 429:
            # Retry-After of 0.4 s, where the back-off alone would wait for 0.03 s at most
            assert min(np.diff(server.times)) > 0.35


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("timeout", "no reply within 0.2 s, after 2 attempts"),
        ("drop", "connection broke"),
        (500, "status 500, by order, after 2 attempts"),
        (401, "pass the server's api_key"),
        (404, "base_url ends in /v1"),
        ("garbage", "<html>busy"),
        ("no completion", "JSON that is no completion"),
    ],
)
def test_what_does_not_pass_says_why(fault, said):
    with serve(faults=[fault] * 2) as server:
        (step,) = steps_at(server, max_retries=1, timeout=0.2)
        assert said in step.failure
        assert server.url in step.failure
        # a refusal is final
        assert len(server.requests) == (1 if fault in (401, 404, "no completion") else 2)


def test_waits_grow_and_are_random(monkeypatch):
    waits = []

    async def no_sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("bayesinf.kernels.inference_scaling.http_request.asyncio.sleep", no_sleep)
    with serve(faults=[500] * 8) as server:
        assert "after 8 attempts" in steps_at(server, max_retries=7, backoff=1.0)[0].failure
    bounds = [1, 2, 4, 8, 16, 32, 60]
    assert len(waits) == 7
    assert all(0 <= wait < bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == 7


def test_a_server_may_name_a_date():
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("Wed, 21 Oct 2115 07:28:00 GMT") == 60.0
    assert _retry_after("2.5") == 2.5
    assert _retry_after("soon") == 0.0


@pytest.mark.parametrize(("style", "most"), [("vllm", 4), ("vllm", 1), ("one", None)])
def test_servers_that_have_no_room_for_many(style, most):
    # refused, or answered with one alone
    with serve(style=style, max_samples=most) as server:
        steps = steps_at(server, num_samples=9)
        assert len(steps) == 9
        assert all(step.failure is None and step.num_tokens > 0 for step in steps)
        assert sum(body.get("n", 1) == 1 for body in server.requests) >= 8
        seeds = [body["seed"] for body in server.requests if "seed" in body]
        assert len(set(seeds)) == len(seeds) >= 8


def test_requests_under_way_are_bounded():
    with serve(delay=0.02, max_samples=1) as server:
        generator = generator_at(server.url, max_concurrency=3, timeout=30.0)
        kernels.infer(0, generator, POTENTIAL, PROMPT, num_particles=12, method="majority")
        assert server.most_open <= 3
        assert server.most_open > 1
        assert len(server.requests) > 12


def test_a_request_that_fails_costs_its_particles_alone():
    with serve(faults=[None, 418]) as server:
        generator = generator_at(server.url, timeout=30.0, has_many=False)
        with pytest.warns(errors.SamplingWarning, match="requests that failed.*418"):
            result = kernels.infer(0, generator, POTENTIAL, PROMPT, num_particles=16, method="majority", answer=plain)
    assert len(result.failures) == 1
    assert set(result.answers) - {None} <= set(law())
    assert np.isneginf(result.log_votes[~result.is_done]).all()


def test_the_first_request_does_not_cost_them_all():
    # it has all particles: after its last attempt each is asked for by itself, and one of those is refused for good
    with serve(faults=[500, 500, 418, 500]) as server:
        generator = generator_at(server.url, timeout=30.0, max_retries=1)
        with pytest.warns(errors.SamplingWarning, match="1 particles died of requests that failed.*418"):
            result = kernels.infer(0, generator, POTENTIAL, PROMPT, num_particles=16, answer=plain)
        # each once, and the one that the server could not answer once more
        assert [request.get("n", 1) for request in server.requests[:19]] == [16, 16] + [1] * 17
    assert len(result.failures) == 1
    assert result.is_done.sum() == 15
    assert set(result.answers) - {None} <= set(law())
    assert np.isfinite(result.log_evidence)


@pytest.mark.parametrize("fault", [500, 418, "timeout", "drop", "truncate", "no completion"])
def test_after_many_have_failed_each_is_asked_for(fault):
    with serve(faults=[fault]) as server:
        steps = steps_at(server, num_samples=4, max_retries=0)
        assert all(step.failure is None for step in steps)
        assert [request.get("n", 1) for request in server.requests] == [4, 1, 1, 1, 1]
        seeds = [request["seed"] for request in server.requests[1:]]
        assert sorted(seeds) == [3, 4, 5, 6]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_who_may_not_ask_for_many_does_not_ask_for_each(status):
    with serve(faults=[status] * 5) as server:
        steps = steps_at(server, num_samples=4)
        assert [f"status {status}, by order" in step.failure for step in steps] == [True] * 4
        assert len(server.requests) == 1


def test_a_server_that_has_gone_is_not_waited_for_twice():
    with serve(faults=[500] * 100) as server:
        steps = steps_at(server, num_samples=4, max_retries=2)
        assert [request.get("n", 1) for request in server.requests] == [4] * 3 + [1] * 4
        assert all("status 500, by order, after 3 attempts" in step.failure for step in steps)
    with serve(faults=[500, 418, 500]) as server:
        steps = steps_at(server, num_samples=2, max_retries=0)
        assert sorted("418" in step.failure for step in steps) == [False, True]


def test_many_are_not_asked_for_after_they_have_failed_twice():
    def asked(*faults):
        with serve(faults=faults) as server:
            generator = generator_at(server.url, timeout=30.0, max_retries=0)

            async def body():
                async with generator.session():
                    for _ in range(3):
                        await generator.step(PROMPT, (), 2, 3)

            asyncio.run(body())
            return [request.get("n", 1) for request in server.requests]

    assert asked(500, None, None, 500) == [2, 1, 1, 2, 1, 1, 1, 1]
    assert asked(500, None, None, None, 500) == [2, 1, 1, 2, 2, 1, 1]


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    generator = generator_at(url, max_retries=1)
    said = "all requests of a step failed.* after 2 attempts; start it, or correct base_url"
    with pytest.raises(errors.GenerationError, match=said) as caught:
        kernels.infer(0, generator, POTENTIAL, PROMPT, num_particles=4)
    assert url in str(caught.value)
    assert caught.value.result.texts == [""] * 4
    with pytest.raises(errors.GenerationError, match="start it"):
        asyncio.run(generator.probe())


def test_a_server_that_goes_away_can_come_back(tmp_path):
    path = tmp_path / "run.json"
    with serve(faults=[None, *[500] * 50]) as server:
        generator = generator_at(server.url, max_retries=0, timeout=30.0)
        no_end = Potential(lambda prompt, texts: [0.0 if END in text else 0.5 for text in texts], kind="step")
        with pytest.raises(errors.GenerationError, match="500"):
            kernels.infer(0, generator, no_end, PROMPT, num_particles=4, save=path)
    with serve() as server:
        generator = generator_at(server.url, timeout=30.0)
        result = kernels.infer(0, generator, POTENTIAL, PROMPT, num_particles=4, resume=path)
        assert all(len(body["prompt"]) > len(PROMPT) for body in server.requests)
    assert result.is_done.all()


def test_what_is_sent():
    with serve() as server:
        steps_at(server, api_key="secret", top_p=0.9, temperature=0.7, extra={"min_p": 0.0, "top_k": 0})
        (body,) = server.requests
        assert body["authorization"] == "Bearer secret"
        assert (body["top_p"], body["temperature"], body["stop"], body["max_tokens"]) == (0.9, 0.7, ["|"], 2)
        assert (body["min_p"], body["top_k"], body["seed"], body["logprobs"]) == (0.0, 0, 3, 1)
    with serve(style="vllm") as server:
        (step,) = steps_at(server, mode="chat")
        steps_at(server, mode="chat", prefix=(step._replace(text="a|"),))
        first, second = server.requests
        assert first["path"].endswith("/v1/chat/completions")
        assert first["messages"] == [{"role": "user", "content": PROMPT}]
        assert "continue_final_message" not in first
        assert second["messages"][-1] == {"role": "assistant", "content": "a|"}
        assert second["continue_final_message"] is True
        assert second["add_generation_prompt"] is False


def test_tokens_are_counted():
    for style, per_step in (("vllm", 2), ("keeps", 2)):
        with serve(style=style) as server:
            assert [step.num_tokens for step in steps_at(server, num_samples=4)] == [per_step] * 4
    # llama.cpp counts one sample alone; the log probabilities count each
    with serve(style="llama") as server:
        steps = steps_at(server, num_samples=8)
        assert [step.num_tokens for step in steps] == [2 if step.is_done else 1 for step in steps]
        assert [round(step.log_prob, 3) for step in steps] == [-0.6 if step.is_done else -0.5 for step in steps]
    with serve(style="plain") as server:
        assert all(step.num_tokens == 1 for step in steps_at(server, num_samples=4))


def test_the_end_is_told_from_a_separator():
    for style in ("vllm", "llama", "keeps"):
        with serve(style=style) as server:
            steps = steps_at(server, num_samples=64)
            assert {step.text for step in steps} == {"a|", "b|", "c"}
            assert all(step.is_done == (step.text == END) for step in steps)
    with serve(style="plain") as server:
        # nothing tells: only an end marker does
        steps = steps_at(server, num_samples=64, end_markers=[END])
        assert all(step.is_done == (END in step.text) for step in steps)


@pytest.mark.parametrize(
    ("field", "capability"),
    [
        ("include_stop_str_in_output", "keeps_stop"),
        ("logprobs", "has_log_probs"),
        ("seed", "has_seed"),
        ("n", "has_many"),
    ],
)
def test_a_field_that_is_refused_is_left_out(field, capability):
    with serve(style="keeps", refuses=[field]) as server:
        generator = generator_at(server.url, end_markers=[END], timeout=30.0)

        async def body():
            async with generator.session():
                return [await generator.step(PROMPT, (), num, 3) for num in (16, 1, 16)]

        steps = [step for some in asyncio.run(body()) for step in some]
        # a separator that the server leaves out is put there; a step that is cut off by it is no end
        assert {step.text for step in steps if not step.is_done} == {"a|", "b|"}
        assert {plain(step.text) for step in steps if step.is_done} == {END}
        assert all(step.failure is None and step.finish_reason in ("stop", "end") for step in steps)
        assert sum(field in request for request in server.requests) == 1
    assert getattr(generator.capabilities, capability) is False
    others = {"has_many", "has_log_probs", "has_seed"} - {capability}
    assert all(getattr(generator.capabilities, name) is None for name in others)


def test_a_field_is_not_left_out_where_the_user_asks_for_it():
    with serve(refuses=["seed"]) as server:
        (step,) = steps_at(server, extra={"seed": 5})
        assert "Unrecognized request argument supplied: seed" in step.failure
        assert len(server.requests) == 1


def test_a_refusal_that_is_not_of_the_number_leaves_the_number():
    # such as of a prompt that is too long
    with serve(faults=[400] * 5) as server:
        generator = generator_at(server.url, timeout=30.0)

        async def body():
            async with generator.session():
                return [await generator.step(PROMPT, (), 4, 3) for _ in range(2)]

        refused, answered = asyncio.run(body())
        assert all("by order" in step.failure for step in refused)
        assert all(step.failure is None for step in answered)
        assert [request.get("n", 1) for request in server.requests] == [4, 1, 1, 1, 1, 4]
    assert generator.capabilities == Capabilities(keeps_stop=generator.capabilities.keeps_stop)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("n must be at most 4", "n"),
        ("'n' is not supported", "n"),
        ("Extra inputs: ('body', 'logprobs'), ('body', 'seed')", "logprobs"),
        ("the context has no room\\nfor a longer prompt", None),
        ("seeds and n-grams", None),
    ],
)
def test_a_refusal_names_a_field(said, field):
    error = RequestError(f"http://localhost/v1/completions: status 400, {said}", 400)
    assert refused_field(error, ["n", "seed", "logprobs"]) == field
    assert refused_field(RequestError(said, 500), ["n", "seed", "logprobs"]) is None


def test_without_many_every_sample_has_a_seed():
    with serve() as server:
        steps_at(server, num_samples=5, has_many=False)
        assert all("n" not in request for request in server.requests)
        assert len({request["seed"] for request in server.requests}) == 5
    with serve() as server:
        steps_at(server, num_samples=5)
        (request,) = server.requests
        # servers differ in what several samples of one seed are
        assert request["n"] == 5
        assert "seed" not in request


def test_probe():
    found = {}
    for name, options in {
        "vllm": {},
        "keeps": {"style": "keeps"},
        "one": {"style": "one", "refuses": ["seed"]},
        "plain": {"style": "plain", "refuses": ["include_stop_str_in_output"]},
    }.items():
        with serve(**options) as server:
            generator = generator_at(server.url)
            found[name] = asyncio.run(probe_with_prompt(generator))
            assert generator.capabilities == found[name]
            assert generator.max_tokens_per_step == 2
    assert found["vllm"].has_many
    assert found["vllm"].has_log_probs
    assert found["vllm"].has_seed
    assert found["vllm"].tells_end
    assert found["one"].has_many is False
    assert found["one"].has_seed is False
    assert not found["keeps"].has_log_probs
    assert found["plain"].tells_end is False
    assert Capabilities() == (None,) * 5
    # whose last step would be taken for any other
    with pytest.raises(ValueError, match="end_markers must say what ends an answer"):
        kernels.infer(0, generator, POTENTIAL, PROMPT)


async def probe_with_prompt(generator):
    return await generator.probe(PROMPT)


def test_bad_arguments_are_named(monkeypatch):
    for options, said in [
        ({"stop": ""}, "stop must be the text that separates steps"),
        ({"mode": "edit"}, "mode must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"timeout": 0.0}, "timeout"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            generator_at("http://localhost/v1", **options)
    with pytest.raises(ValueError, match="base_url must begin with http"):
        generator_at("localhost:8000")
    for prompt, mode, said in [
        ("", "completions", "prompt must be a text that is not empty"),
        (" \n", "chat", "prompt must be a text that is not empty"),
        ([], "chat", "prompt must be a text or a list of messages"),
        ([{"role": "user", "content": "go"}], "completions", "prompt must be a text for mode='completions'"),
    ]:
        with pytest.raises(ValueError, match=said):
            kernels.infer(0, generator_at("http://localhost/v1", mode=mode), POTENTIAL, prompt)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"bayesinf\[http\]"):
        kernels.infer(0, generator_at("http://localhost/v1"), POTENTIAL, PROMPT)
