"""What a server that speaks OpenAI's protocol answers, in the forms that servers give it."""

from typing import Any

__all__ = ["content", "count_tokens", "log_probs"]


def content(choice: dict[str, Any]) -> str:
    """The text of a choice."""
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}")
    return text


def log_probs(choice: dict[str, Any]) -> list[tuple[str, float]] | None:
    """The tokens and their log probabilities, in either of the two forms; None if there are none."""
    found = choice.get("logprobs") or {}
    if found.get("content"):
        return [(entry["token"], float(entry["logprob"])) for entry in found["content"]]
    if found.get("tokens"):
        pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
        return [(token, 0.0 if log_prob is None else float(log_prob)) for token, log_prob in pairs]
    return None


def count_tokens(choices: list[dict[str, Any]], texts: list[str], total: int | None) -> list[int]:
    """How many tokens each choice has: as the server says, or as its log probabilities, or about one in four letters.

    Of several samples some servers count one alone, and others all of them.
    """
    if len(choices) == 1 and total is not None:
        return [int(total)]
    known = [log_probs(choice) for choice in choices]
    if all(tokens is not None for tokens in known):
        return [len(tokens or []) for tokens in known]
    if total is None:
        return [max(1, round(len(text) / 4)) for text in texts]
    letters = [max(len(text), 1) for text in texts]
    ends = [round(total * sum(letters[: i + 1]) / sum(letters)) for i in range(len(letters))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
