"""The drop-in training loop: data, reference, trainer, and the settings of all three."""
