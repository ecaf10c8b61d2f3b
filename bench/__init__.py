"""Microbenchmarks (make bench) and their ledger, LOG.md."""
