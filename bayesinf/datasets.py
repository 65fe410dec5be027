"""Small real data sets that ship with the package."""

from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

__all__ = ["CountSeries", "PriceSeries", "earthquakes", "wti_crude_oil"]


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


class CountSeries(NamedTuple):
    """How often something happened, year by year.

    Attributes:
        years: successive.
        counts: of each year.
    """

    years: Int[np.ndarray, " t"]
    counts: Int[np.ndarray, " t"]


def earthquakes() -> CountSeries:
    """Major earthquakes in the world, of magnitude 7 and above, in every year from 1900 to 2006.

    107 counts, more dispersed than a Poisson law and correlated from year to year: the standard example of a hidden
    Markov model of counts.

    Source: US Geological Survey, in the public domain in the United States (17 U.S.C. 105); as used by Zucchini,
    MacDonald and Langrock (2016), Hidden Markov Models for Time Series, doi:10.1201/b20790.

    Example:
        >>> import bayesinf.datasets
        >>> quakes = bayesinf.datasets.earthquakes()
        >>> len(quakes.counts), int(quakes.years[quakes.counts.argmax()])
        (107, 1943)
    """
    rows = _rows("earthquakes.csv")
    return CountSeries(*(np.array(column, int) for column in zip(*rows, strict=True)))


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
    rows = _rows("wti_crude_oil.csv")
    dates = np.array([date for date, _ in rows], "datetime64[D]")
    prices = np.array([price for _, price in rows], np.float64)
    return PriceSeries(dates, prices, 100.0 * np.diff(np.log(prices)))


def _rows(file: str) -> list[list[str]]:
    text = resources.files("bayesinf").joinpath("data", file).read_text(encoding="utf-8")
    return [line.split(",") for line in text.splitlines()[1:]]
