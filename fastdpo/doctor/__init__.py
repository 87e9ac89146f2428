"""What is installed, what will run here, and why the rest will not."""
