"""What a run stands on: files, ranks, one step, time and memory. Imports `kernels` and nothing else of the project."""
