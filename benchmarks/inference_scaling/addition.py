"""A small transformer that adds two numbers in steps, and a noisy verifier: the filter beside weighted best of n.

    4821+3907=      17080; 20120; 89071; 43180;      08728

Each step has the two digits of a column, the lowest first, what was carried, the digit of the sum and what is carried
on; the last line is the answer. The model is trained here, a minute or two, and drawn from at the temperature, of a
few, at which nearest to one answer in ten is right. The verifier's logit is +2 for a prefix without error and -2 for
others, with noise of 1.5 that is frozen by the prefix.

    python -m benchmarks.inference_scaling.addition
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from bayesinf.kernels.inference_scaling import Independent, Potential, Resample, Selection, TokenGenerator, TokenState
from bayesinf.kernels.inference_scaling.infer import NO_BUDGET
from bayesinf.kernels.inference_scaling.sweep import run_sweep
from bayesinf.models.language import CharTokenizer, Transformer
from benchmarks.inference_scaling.budget import RESULTS, half_width, save

TOKENIZER = CharTokenizer("0123456789+=;")
NUM_DIGITS = 4
PROMPT_LENGTH = 2 * NUM_DIGITS + 2
SOLUTION_LENGTH = 6 * NUM_DIGITS + NUM_DIGITS + 2


def write(key: Key[Array, ""], num: int) -> Int[Array, "n l"]:
    """Problems with their solutions, as tokens."""
    a, b = jax.random.randint(key, (2, num, NUM_DIGITS), 0, 10)  # the lowest digits first
    semicolon, plus, equals = (TOKENIZER.encode(c)[0] for c in ";+=")

    def constant(token: int) -> Array:
        return jnp.full((num, 1), token)

    def column(carry: Array, digits: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        total = digits[0] + digits[1] + carry
        return total // 10, (*digits, carry, total % 10, total // 10)

    last, columns = jax.lax.scan(column, jnp.zeros(num, int), (a.T, b.T))
    steps = [part for row in zip(*columns, strict=True) for part in (*(x[:, None] for x in row), constant(semicolon))]
    digits = columns[3]
    answer = [last[:, None], digits.T[:, ::-1], constant(TOKENIZER.end_token)]
    prompt = [a[:, ::-1], constant(plus), b[:, ::-1], constant(equals)]
    return jnp.concatenate([*prompt, *steps, *answer], axis=1).astype(jnp.int32)


def train(key: Key[Array, ""], num_iterations: int = 600, batch_size: int = 64) -> Transformer:
    """Maximum likelihood of the solutions, by Adam."""
    key_model, key_data = jax.random.split(key)
    sizes = {"vocab_size": TOKENIZER.vocab_size, "width": 64, "num_layers": 2, "num_heads": 4}
    model = Transformer.random(key_model, **sizes)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_iterations))

    def loss(model: Transformer, texts: Array) -> Array:
        log_probs = jax.nn.log_softmax(jax.vmap(model)(texts[:, :-1])[:, PROMPT_LENGTH - 1 :])
        return -jnp.mean(jnp.take_along_axis(log_probs, texts[:, PROMPT_LENGTH:, None], axis=2))

    @jax.jit
    def fit(model: Transformer) -> tuple[Transformer, Array]:
        def update(carry: Any, key: Array) -> tuple[Any, Array]:
            model, state = carry
            value, grads = jax.value_and_grad(loss)(model, write(key, batch_size))
            updates, state = optimizer.update(grads, state)
            return (eqx.apply_updates(model, updates), state), value

        (model, _), values = jax.lax.scan(
            update, (model, optimizer.init(model)), jax.random.split(key_data, num_iterations)
        )
        return model, values

    return fit(model)[0]


class NoisyVerifier(eqx.Module):
    """P(no error yet), with logits of +-2 and noise of 1.5 that depends on the prefix alone.

    Attributes:
        solution: the tokens of the right answer.
        key: of the noise.
    """

    solution: Int[Array, " l"]
    key: Key[Array, ""]

    def __call__(self, state: TokenState) -> Float[Array, " n"]:
        is_written = state.tokens >= 0
        is_right = jnp.all(~is_written | (state.tokens == self.solution), axis=1)
        powers = jnp.uint32(31) ** jnp.arange(self.solution.shape[0], dtype=jnp.uint32)
        prefix = jnp.sum((state.tokens + 2).astype(jnp.uint32) * powers, axis=1, dtype=jnp.uint32)
        noise = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(self.key, number)))(prefix)
        return jax.nn.sigmoid(jnp.where(is_right, 2.0, -2.0) + 1.5 * noise)


def generator_of(model: Transformer, temperature: float) -> TokenGenerator:
    """A step is a line."""
    return TokenGenerator(
        model,
        max_steps=NUM_DIGITS + 1,
        max_tokens_per_step=NUM_DIGITS + 2,
        max_tokens=SOLUTION_LENGTH,
        stop_tokens=TOKENIZER.tokens_with(";"),
        end_tokens=[TOKENIZER.end_token],
        temperature=temperature,
        tokenizer=TOKENIZER,
        pad_prompt_to=PROMPT_LENGTH,
    )


@eqx.filter_jit
def solve(
    keys: Array, texts: Array, generator: TokenGenerator, selection: Selection, num_particles: int
) -> dict[str, Array]:
    """Whether each rule finds the sum, for every problem, and how many tokens it took."""

    def one(row: tuple[Array, Array]) -> dict[str, Array]:
        key_noise, key_run = jax.random.split(row[0])
        prompt, solution = row[1][:PROMPT_LENGTH], row[1][PROMPT_LENGTH:]
        potential = Potential(NoisyVerifier(solution, key_noise), kind="odds")
        done = run_sweep(
            key_run, generator, potential, selection, prompt, num_particles, jnp.asarray(NO_BUDGET, jnp.int32)
        )
        # the answer is the last line, behind the last semicolon
        state, at = done.state, jnp.arange(NUM_DIGITS + 2)
        starts = jnp.take_along_axis(state.step_ends, jnp.maximum(state.num_steps - 2, 0)[:, None], axis=1)
        places = starts + at
        answers = jnp.take_along_axis(state.tokens, jnp.minimum(places, SOLUTION_LENGTH - 1), axis=1)
        answers = jnp.where(places < state.lengths[:, None], answers, -1)
        is_right = jnp.all(answers == solution[-NUM_DIGITS - 2 :], axis=1)
        log_votes = jnp.where(done.population.is_done, selection.log_votes(done.population), -jnp.inf)
        is_same = jnp.all(answers[:, None] == answers[None], axis=2)
        totals = jnp.sum(jnp.where(is_same, jnp.exp(log_votes), 0.0), axis=1)
        return {
            "weighted_majority": is_right[jnp.argmax(totals)],
            "argmax": is_right[jnp.argmax(done.population.log_reward)],
            "one_answer": jnp.mean(is_right),
            "tokens": jnp.sum(done.records.num_tokens),
        }

    return jax.lax.map(one, (keys, texts))


def main(
    folder: Path = RESULTS,
    num_particles: Sequence[int] = (4, 8, 16, 64),
    num_problems: int = 200,
    temperatures: Sequence[float] = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5),
    num_iterations: int = 600,
) -> list[dict]:
    """Trains, runs, writes addition.png and addition.csv, and returns the rows of the table."""
    began = time.perf_counter()
    key_train, key_texts, key_runs = jax.random.split(jax.random.key(2025), 3)
    model = jax.block_until_ready(train(key_train, num_iterations))
    print(f"trained in {time.perf_counter() - began:.0f} s")
    texts, keys = write(key_texts, num_problems), jax.random.split(key_runs, num_problems)
    shares = {
        t: float(jnp.mean(solve(keys, texts, generator_of(model, t), Independent("reward"), 16)["one_answer"]))
        for t in temperatures
    }
    print("right at each temperature:", {t: round(share, 3) for t, share in shares.items()}, flush=True)
    temperature = min(shares, key=lambda t: abs(shares[t] - 0.1))
    generator = generator_of(model, temperature)
    rows: list[dict] = []
    for name, selection in {"particle_filter": Resample(), "best_of_n": Independent("reward")}.items():
        for num in num_particles:
            found = jax.tree.map(np.asarray, solve(keys, texts, generator, selection, num))
            for rule in ("weighted_majority", "argmax"):
                share = float(np.mean(found[rule]))
                about = {"method": name, "rule": rule, "num_particles": num, "temperature": temperature}
                about["num_problems"] = num_problems
                more = {"num_tokens": float(np.mean(found["tokens"])), "accuracy": share}
                rows.append(about | more | {"half_width": half_width(share, num_problems)})
            print(name, num, *(f"{k} {np.mean(v):.3f}" for k, v in found.items()), flush=True)
    save(folder, "addition", draw(rows), rows)
    print(markdown(rows))
    return rows


LABELS = {
    ("particle_filter", "weighted_majority"): ("particle filter, weighted majority", "#0072B2", "-", "o"),
    ("particle_filter", "argmax"): ("particle filter, highest score", "#56B4E9", "-", "v"),
    ("best_of_n", "weighted_majority"): ("weighted best of n", "#D55E00", ":", "s"),
    ("best_of_n", "argmax"): ("best of n", "#E69F00", ":", "D"),
}


def markdown(rows: list[dict]) -> str:
    """The table of README.md."""
    numbers = sorted({row["num_particles"] for row in rows})
    lines = [f"| rollouts | {' | '.join(map(str, numbers))} |", "|---" * (1 + len(numbers)) + "|"]
    for (method, rule), (label, *_) in LABELS.items():
        found = {r["num_particles"]: r["accuracy"] for r in rows if (r["method"], r["rule"]) == (method, rule)}
        lines.append(f"| {label} | {' | '.join(f'{found[n]:.3f}'.lstrip('0') for n in numbers)} |")
    return "\n".join(lines)


def draw(rows: list[dict]):
    """Accuracy against the number of rollouts."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (method, rule), (label, color, line, marker) in LABELS.items():
        mine = [r for r in rows if (r["method"], r["rule"]) == (method, rule)]
        xs, ys, halves = ([r[k] for r in mine] for k in ("num_particles", "accuracy", "half_width"))
        axis.errorbar(xs, ys, halves, color=color, ls=line, marker=marker, ms=5, capsize=2, label=label)
    ticks = sorted({r["num_particles"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set(xlabel="rollouts", ylabel="accuracy")
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    main(parser.parse_args().results)
