"""The machinery of a run: files, ranks, one step, time and memory. Imports only `kernels` of the project."""
