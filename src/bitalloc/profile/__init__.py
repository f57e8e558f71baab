"""Measurements of a model at each precision, and the records of them; `bench` times, `run` works by hand."""
