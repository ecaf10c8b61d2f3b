"""The experiments of the documents: what each trains, runs as processes, and what the results say about the claims."""
