"""From rows as files have them to token ids and numbers, and the data set that holds them."""
