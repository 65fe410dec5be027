"""How replicates are divided into what is run at once."""

__all__ = ["batch_size"]


def batch_size(num: int, largest: int) -> int:
    """The size of equal batches of at most `largest`, where there are such: what remains would be a second program."""
    fewest = -(-num // largest)
    return next((num // count for count in range(fewest, 4 * fewest) if num % count == 0), min(num, largest))
