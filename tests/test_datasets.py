"""The data sets that ship with the package are what their docstrings say."""

import numpy as np

from bayesinf import datasets


def test_wti_crude_oil_is_as_published():
    oil = datasets.wti_crude_oil()
    quoted = dict(zip(oil.dates.astype(str), oil.prices, strict=True))
    assert oil.dates.dtype == np.dtype("datetime64[D]")
    assert oil.dates.shape == oil.prices.shape == (1006,)
    assert (oil.dates[0], oil.dates[-1]) == (np.datetime64("2014-01-02"), np.datetime64("2017-12-29"))
    assert (quoted["2014-01-02"], quoted["2017-12-29"]) == (95.14, 60.46)
    # the highest and the lowest quotation of these four years
    assert (quoted["2014-06-20"], oil.prices.max()) == (107.95, 107.95)
    assert (quoted["2016-02-11"], oil.prices.min()) == (26.19, 26.19)
    assert np.round(oil.prices.sum(), 2) == 59350.97


def test_wti_crude_oil_is_a_clean_daily_series():
    oil = datasets.wti_crude_oil()
    gaps = np.diff(oil.dates).astype(int)
    assert np.all(gaps >= 1)
    assert gaps.max() <= 5  # a weekend with a holiday on either side
    assert np.all(np.is_busday(oil.dates))
    assert np.all(np.isfinite(oil.prices) & (oil.prices > 0))


def test_returns_give_the_prices_back():
    oil = datasets.wti_crude_oil()
    assert oil.returns.shape == (1005,)
    rebuilt = oil.prices[0] * np.exp(np.cumsum(oil.returns) / 100)
    np.testing.assert_allclose(rebuilt, oil.prices[1:], rtol=1e-12)
