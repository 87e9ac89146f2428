"""How a call of the head will run: mode, chunks, groups, memory, and why: arithmetic, no tensor in sight."""
