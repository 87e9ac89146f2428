"""The definitions in plain torch: the oracle of every test, and the backend that runs anywhere."""
