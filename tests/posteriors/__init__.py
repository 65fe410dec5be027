"""Eight posteriors, their data, and the moments of their parameters by long runs of NumPyro's NUTS."""
