"""What a run will need: memory of every rank, time of an iteration, the best layout. Computed from sizes alone,
without torch or a GPU."""
