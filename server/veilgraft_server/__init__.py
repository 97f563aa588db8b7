"""The coordinator: rounds, aggregation, checkpoints, reports."""
