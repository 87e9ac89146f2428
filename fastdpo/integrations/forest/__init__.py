"""Forests: rows in which sequences that begin alike share the tokens of their common beginning."""
