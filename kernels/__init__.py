"""Kernels, one family per file; a regular package so that a package of the same name elsewhere cannot hide it."""
