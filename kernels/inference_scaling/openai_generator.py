r"""Texts of any server that speaks OpenAI's protocol, such as vLLM and llama.cpp: one request a step.

A step is what the model writes up to a separator, a blank line by default. Every request carries the prompt and the
whole unfinished answer, which servers with a cache of prefixes read once:

    completions     /completions, whose prompt is sent as it is, with its chat template already applied
    chat            /chat/completions, where the unfinished answer is the assistant's message that the model continues

A server says "stop" both at a separator and at the end of an answer. Which of the two it was is told by `stop_reason`
(vLLM), by a separator that was left in the text, or by the last token of the log probabilities (llama.cpp); where
nothing tells, a step counts as unfinished unless it is empty. `probe` asks a server what it can do.

Sampled is the law of the server's settings (temperature, top_p, and what else it applies), and that law is p; see
`extra` to switch off what a server applies by itself.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bayesinf import errors
from bayesinf.kernels.inference_scaling.http_request import RequestError, post
from bayesinf.kernels.inference_scaling.openai_capabilities import (
    DENIED,
    OPTIONAL,
    REFUSED,
    Capabilities,
    refused_field,
)
from bayesinf.kernels.inference_scaling.openai_reply import content, count_tokens, log_probs
from bayesinf.kernels.inference_scaling.text_generator import Prefix, TextGenerator, TextStep, failed_step

__all__ = ["OpenAIGenerator"]


class OpenAIGenerator(TextGenerator):
    r"""Steps of a model behind an HTTP server.

    Args:
        base_url: as of OpenAI's clients, with the version: "http://localhost:8000/v1".
        model: its name, as the server knows it.
        api_key: sent as a bearer token.
        stop: what separates steps.
        end_markers: a step with one of them is the last of its answer.
        max_steps: after which an answer counts as finished.
        max_tokens_per_step: at which a step is cut off.
        temperature, top_p: of sampling.
        mode: "completions" or "chat".
        max_concurrency: requests under way at once, of all runs in one event loop.
        timeout: seconds for one attempt.
        max_retries: further attempts after a timeout, a broken connection or reply, status 408, 429 or 5xx; waits
            grow exponentially with full jitter, and are at least what Retry-After says.
        backoff: seconds, the longest wait before the first retry.
        has_log_probs: ask for log probabilities, which also tell the end of an answer and count tokens.
        has_many: ask for several samples in one request; if it fails, they are asked for one by one, and if that
            happens twice in a row, they are from then on. Such a request has no seed: of one seed, some servers would
            make the same text several times. Without, every sample is a request with a seed of its own, and a run can
            be repeated where the server's seeds decide.
        extra: further fields of every request, such as {"top_k": 0, "min_p": 0.0} for llama.cpp.

    Raises:
        ValueError: an argument out of its range, or no separator.
        ImportError: httpx is not installed.

    Example:
        >>> import bayesinf as bi
        >>> from bayesinf.kernels.inference_scaling import OpenAIGenerator, Potential
        >>> generator = OpenAIGenerator("http://localhost:8000/v1", "my-model", max_steps=8, max_tokens_per_step=256)
        >>> verifier = Potential(lambda prompt, texts: [0.9 for text in texts], kind="odds")
        >>> # with a server there: bi.kernels.infer(0, generator, verifier, "Q: 2 + 2?\nA:", num_particles=8)
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        stop: str = "\n\n",
        end_markers: Sequence[str] = (),
        max_steps: int = 40,
        max_tokens_per_step: int = 1024,
        temperature: float = 0.8,
        top_p: float = 1.0,
        mode: str = "completions",
        max_concurrency: int = 32,
        timeout: float = 120.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        has_log_probs: bool = True,
        has_many: bool = True,
        extra: Mapping[str, Any] | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if not stop:
            raise ValueError("stop must be the text that separates steps, got none; take '\\n\\n', or '\\n' for lines")
        errors.check_choice("mode", mode, ("completions", "chat"))
        for name, count, least in (
            ("max_steps", max_steps, 1),
            ("max_tokens_per_step", max_tokens_per_step, 1),
            ("max_concurrency", max_concurrency, 1),
            ("max_retries", max_retries, 0),
        ):
            errors.check_count(name, count, minimum=least)
        errors.check_positive_scalar("timeout", timeout)
        errors.check_nonnegative("backoff", backoff)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}: all particles would write the same")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        self.base_url, self.model, self.api_key, self.mode = base_url.rstrip("/"), model, api_key, mode
        self.stop, self.end_markers = stop, tuple(end_markers)
        self.max_steps, self.max_tokens_per_step = max_steps, max_tokens_per_step
        self.temperature, self.top_p, self.extra = temperature, top_p, dict(extra or {})
        self.max_concurrency, self.timeout = max_concurrency, timeout
        self.max_retries, self.backoff = max_retries, backoff
        self.has_log_probs, self.has_many = has_log_probs, has_many
        self.capabilities = Capabilities()
        self._echoes = True  # until a reply shows the contrary
        self._num_failed = 0  # requests for many, in a row, whose samples could be had one by one
        # of every event loop: the client, what bounds its requests, and how many use it
        self._open: dict[asyncio.AbstractEventLoop, tuple[Any, asyncio.Semaphore, int]] = {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        httpx = _import_httpx()
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency)
            client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)
            self._open[loop] = (client, asyncio.Semaphore(self.max_concurrency), 0)
        client, semaphore, users = self._open[loop]
        self._open[loop] = (client, semaphore, users + 1)
        try:
            yield
        finally:
            users = self._open[loop][2] - 1
            self._open[loop] = (client, semaphore, users)
            if users == 0:
                del self._open[loop]
                await client.aclose()

    async def step(self, prompt: Any, prefix: Prefix, num_samples: int, seed: int) -> list[TextStep]:
        steps: list[TextStep] = []
        failure: RequestError | None = None
        has_asked = num_samples > 1 and self.has_many and self.capabilities.has_many is not False
        if has_asked:
            try:
                steps = await self._request(prompt, prefix, num_samples, None)
                self._num_failed = 0
            except RequestError as error:
                if error.status in DENIED:
                    return [failed_step(str(error))] * num_samples
                # one request must not cost all its particles: each is asked for by itself
                failure = error
        more = await self._singly(prompt, prefix, [(seed + i) % 2**31 for i in range(len(steps), num_samples)], failure)
        if has_asked and len(steps) <= 1 and any(step.failure is None for step in more):
            # what passes for one sample is refused for many; once, the server may have been busy
            self._num_failed += failure is not None
            if failure is None or failure.status in REFUSED or self._num_failed > 1:
                self._learn(has_many=False)
        return [*steps, *more]

    async def probe(self, prompt: Any = "1, 2, 3,") -> Capabilities:
        """Asks the server what it can do, with a few short requests; what it cannot is not asked for afterwards.

        Args:
            prompt: what to continue.

        Raises:
            GenerationError: it does not answer.
        """
        async with self.session():
            found, self.capabilities = self.capabilities, Capabilities()
            try:
                (first,) = await self._request(prompt, (), 1, 7, max_tokens=8)
                has_seed = self.capabilities.has_seed is not False
                reply = await self._reply(prompt, (), 1, 7, stop=[","], max_tokens=4)
                choice = reply["choices"][0]
                keeps_stop = content(choice).endswith(",")
                has_log_probs = first.log_prob is not None
                tells_end = keeps_stop or "stop_reason" in choice or has_log_probs
                try:
                    has_many = len(await self._request(prompt, (), 2, None, max_tokens=8)) == 2
                except RequestError:
                    has_many = False
                found = Capabilities(has_many, has_log_probs, has_seed, keeps_stop, tells_end)
            except RequestError as error:
                raise errors.GenerationError(str(error)) from error
            finally:
                self.capabilities = found
        return found

    def fingerprint(self) -> dict[str, Any]:
        law = ("model", "mode", "stop", "end_markers", "temperature", "top_p", "extra")
        return super().fingerprint() | {name: getattr(self, name) for name in law}

    def _learn(self, **found: bool) -> None:
        self.capabilities = self.capabilities._replace(**found)

    async def _singly(
        self, prompt: Any, prefix: Prefix, seeds: Sequence[int], before: RequestError | None
    ) -> list[TextStep]:
        """A request for every sample.

        Where one for all of them was given up `before`, each is sent once, and again only if some were answered: a
        server that is gone is not waited for twice.
        """
        given_up = None if before is None or before.is_final else before

        async def ask(seed: int, max_retries: int | None) -> TextStep | RequestError:
            try:
                return (await self._request(prompt, prefix, 1, seed, max_retries))[0]
            except RequestError as error:
                return error

        found = await asyncio.gather(*[ask(seed, None if given_up is None else 0) for seed in seeds])
        if given_up is not None and any(isinstance(one, TextStep) for one in found):
            lost = [i for i, one in enumerate(found) if isinstance(one, RequestError) and not one.is_final]
            for i, one in zip(lost, await asyncio.gather(*[ask(seeds[i], None) for i in lost]), strict=True):
                found[i] = one
        elif given_up is not None:
            # the same reason, with how often it was tried
            same = given_up.status
            found = [given_up if isinstance(one, RequestError) and one.status == same else one for one in found]
        return [one if isinstance(one, TextStep) else failed_step(str(one)) for one in found]

    async def _request(
        self,
        prompt: Any,
        prefix: Prefix,
        num_samples: int,
        seed: int | None,
        max_retries: int | None = None,
        **changes: Any,
    ) -> list[TextStep]:
        reply = await self._reply(prompt, prefix, num_samples, seed, max_retries, **changes)
        try:
            return self._read(reply, self.text(prefix))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            shown = json.dumps(reply)[:200]
            raise RequestError(f"{self.url} sent JSON that is no completion ({error!r}): {shown}") from error

    async def _reply(
        self,
        prompt: Any,
        prefix: Prefix,
        num_samples: int,
        seed: int | None,
        max_retries: int | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """What the server answers; a field that it refuses by name is left out, in this request and all later ones."""
        while True:
            body = self._body(prompt, prefix, num_samples, seed) | changes
            try:
                return await self._ask(body, self.max_retries if max_retries is None else max_retries)
            except RequestError as error:
                field = refused_field(error, [name for name in OPTIONAL if name in body and name not in self.extra])
                if field is None:
                    raise
                self._learn(**{OPTIONAL[field]: False})
                if field == "n":
                    raise

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url + ("/completions" if self.mode == "completions" else "/chat/completions")

    async def _ask(self, body: dict[str, Any], max_retries: int) -> dict[str, Any]:
        client, semaphore, _ = self._open[asyncio.get_running_loop()]
        return await post(
            client,
            self.url,
            body,
            semaphore=semaphore,
            timeout=self.timeout,
            max_retries=max_retries,
            backoff=self.backoff,
            jitter=random.random,
        )

    def check(self, prompt: Any) -> None:
        super().check(prompt)
        if self.mode == "completions" and not isinstance(prompt, str):
            raise ValueError(f"prompt must be a text for mode='completions', got {type(prompt).__name__}")
        if self.mode == "chat" and not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
            raise ValueError(
                f"prompt must be a text or a list of messages, at least one, for mode='chat', got {prompt!r}"
            )
        if self.capabilities.tells_end is False and not self.end_markers:
            raise ValueError(
                "end_markers must say what ends an answer, got none: this server does not tell an end from a separator"
            )

    def _body(self, prompt: Any, prefix: Prefix, num_samples: int, seed: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens_per_step,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": [self.stop],
        }
        if self.capabilities.keeps_stop is not False:
            body["include_stop_str_in_output"] = True
        if num_samples > 1:
            body["n"] = num_samples
        if seed is not None and self.capabilities.has_seed is not False:
            body["seed"] = seed
        has_log_probs = self.has_log_probs and self.capabilities.has_log_probs is not False
        written = self.text(prefix)
        if self.mode == "completions":
            body["prompt"] = prompt + written
            body |= {"logprobs": 1} if has_log_probs else {}
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if written:
                messages.append({"role": "assistant", "content": written})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            body["messages"] = messages
            body |= {"logprobs": True} if has_log_probs else {}
        return body | self.extra

    def _read(self, reply: dict[str, Any], written: str) -> list[TextStep]:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        if not choices:
            raise ValueError("no choices")
        usage = reply.get("usage") or {}
        num_prompt = int(usage.get("prompt_tokens") or 0)
        num_cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        texts = [content(choice) for choice in choices]
        if self.mode == "chat" and written and self._echoes_back(choices, texts, written):
            texts = [text.removeprefix(written) for text in texts]
        if any(text.endswith(self.stop) for text in texts):
            self._learn(keeps_stop=True)
        counts = count_tokens(choices, texts, usage.get("completion_tokens"))
        steps = []
        for i, (choice, text, num_tokens) in enumerate(zip(choices, texts, counts, strict=True)):
            reason, tokens = choice.get("finish_reason") or "stop", log_probs(choice)
            has_ended = reason == "stop" and self._is_end(choice, text, tokens)
            if reason == "stop" and not has_ended and not text.endswith(self.stop):
                text += self.stop
            is_done = has_ended or any(marker in text for marker in self.end_markers)
            steps.append(
                TextStep(
                    text,
                    num_tokens,
                    None if tokens is None else sum(log_prob for _, log_prob in tokens),
                    is_done=is_done,
                    finish_reason="end" if has_ended else reason,
                    # the samples of a request share one reading of the prompt
                    num_prompt_tokens=num_prompt - num_cached if i == 0 else 0,
                    num_cached_tokens=num_cached if i == 0 else num_prompt,
                )
            )
        return steps

    def _echoes_back(self, choices: list[dict[str, Any]], texts: list[str], written: str) -> bool:
        """Whether the server sends the unfinished answer back with what it adds, as llama.cpp does.

        A step may begin as the answer does: one reply that does not is proof that it never is sent back.
        """
        if "stop_reason" in choices[0] or not all(text.startswith(written) for text in texts):
            self._echoes = False
        return self._echoes

    def _is_end(self, choice: dict[str, Any], text: str, tokens: list[tuple[str, float]] | None) -> bool:
        """Whether the answer has ended, and not only the step."""
        if text.endswith(self.stop):
            return False
        if "stop_reason" in choice:
            return choice["stop_reason"] != self.stop
        if tokens:
            # tokens of a separator are cut off, the token that ends an answer is there, and has no text of its own
            return tokens[-1][0] == "" or not text.endswith(tokens[-1][0])
        return self.capabilities.keeps_stop is True or not text


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("OpenAIGenerator needs httpx: pip install 'bayesinf[http]'") from error
    return httpx
