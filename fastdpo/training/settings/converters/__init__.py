"""Other libraries' run files in our words: ``fastdpo convert-config``."""
