"""Other libraries' run files in our words: ``fastdpo convert-config``."""

SOURCES = ("llama-factory", "axolotl", "trl", "alignment-handbook")
TRAINERS = ("dpo", "kto", "cpo", "orpo")  # of TRL's and alignment-handbook's files
