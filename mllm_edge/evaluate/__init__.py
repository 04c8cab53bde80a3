"""Quality of a bundle on a data set: `run.evaluate` asks, `scores` computes the metrics."""
