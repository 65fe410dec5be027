"""What a server that speaks OpenAI's protocol can do, and how it says that it cannot."""

import re
from typing import NamedTuple

from bayesinf.kernels.inference_scaling.http_request import RequestError

__all__ = ["Capabilities", "refused_field"]


class Capabilities(NamedTuple):
    """What a server can do; None where it was not asked.

    Attributes:
        has_many: several samples in one request.
        has_log_probs: log probabilities of the tokens.
        has_seed: a seed of a request.
        keeps_stop: the separator is left in the text if asked.
        tells_end: it can be told whether an answer has ended.
    """

    has_many: bool | None = None
    has_log_probs: bool | None = None
    has_seed: bool | None = None
    keeps_stop: bool | None = None
    tells_end: bool | None = None


# fields of a request that a server may refuse, and what it cannot do then
OPTIONAL = {
    "n": "has_many",
    "logprobs": "has_log_probs",
    "seed": "has_seed",
    "include_stop_str_in_output": "keeps_stop",
}
# status codes: who may not ask for many may not ask for one; who asks for too many may
DENIED = (401, 403, 404)
REFUSED = (400, 422)


def refused_field(error: RequestError, fields: list[str]) -> str | None:
    """The field that a refusal names first; None if it names none."""
    if error.status not in REFUSED:
        return None
    # not as a part of a word, nor of what stands for a new line
    places = {field: re.search(rf"(?<![\\\w-]){field}(?![\w-])", str(error)) for field in fields}
    found = {field: place.start() for field, place in places.items() if place is not None}
    return min(found, key=found.__getitem__) if found else None
