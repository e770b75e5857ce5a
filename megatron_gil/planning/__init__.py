"""What a run needs, before it runs: memory of every rank, time of an iteration, the best way to cut a model. Arithmetic
alone: neither torch nor a GPU."""
