"""Quality of a bundle on a data set: `evaluate(model, cases, ...)` asks, `scores` counts."""
