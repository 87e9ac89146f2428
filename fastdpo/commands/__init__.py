"""What the commands of ``fastdpo`` do; ``fastdpo/cli.py`` chooses among them."""
