"""From a batch to a step of the optimiser: the trainer, its steps, evaluations and checkpoints."""
