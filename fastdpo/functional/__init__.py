"""From hidden states to a loss: labelled tokens, sums, objective, for every kind of row."""
