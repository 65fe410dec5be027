"""Small real data sets that ship with the package."""

from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

__all__ = ["PriceSeries", "wti_crude_oil"]


class PriceSeries(NamedTuple):
    """Prices of one asset on successive trading days.

    Attributes:
        dates: day of each price, datetime64[D], increasing.
        prices: positive, float64.
        returns: log returns in percent, r_t = 100 (log p_{t+1} - log p_t); one row fewer than `prices`, and dated by
            `dates[1:]`.
    """

    dates: Shaped[np.ndarray, " t"]
    prices: Float[np.ndarray, " t"]
    returns: Float[np.ndarray, " t-1"]


def wti_crude_oil() -> PriceSeries:
    """Spot price of West Texas Intermediate crude oil at Cushing, US dollars a barrel, daily, 2014 to 2017.

    1,006 prices from 2014-01-02 to 2017-12-29: the fall from 108 to 26 dollars and the calm on either side of it, so
    that the volatility of the returns moves by a factor of six. Holidays are left out, not filled in; a return spans
    the time between two quotations. The price is never negative here (it was in April 2020).

    Source: US Energy Information Administration, Spot Prices, as distributed by the Federal Reserve Bank of St. Louis
    (FRED, series DCOILWTICO). Published by the US government and so in the public domain in the United States
    (17 U.S.C. 105); the agency asks to be acknowledged. The figures are as published, to the cent.

    Example:
        >>> import bayesinf.datasets
        >>> oil = bayesinf.datasets.wti_crude_oil()
        >>> len(oil.prices), len(oil.returns)
        (1006, 1005)
        >>> str(oil.dates[oil.prices.argmin()])
        '2016-02-11'
    """
    text = resources.files("bayesinf").joinpath("data", "wti_crude_oil.csv").read_text(encoding="utf-8")
    rows = [line.split(",") for line in text.splitlines()[1:]]
    dates = np.array([date for date, _ in rows], "datetime64[D]")
    prices = np.array([price for _, price in rows], np.float64)
    return PriceSeries(dates, prices, 100.0 * np.diff(np.log(prices)))
