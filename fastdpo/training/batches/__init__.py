"""From items of a data set to a batch: layouts, token budgets, and what a model was probed for."""
