"""Kernels with one bug each, of kinds that were found in published code; the conformance suite must reject them all."""
