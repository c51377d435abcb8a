"""One file per verb: its flags, what it prints, its exit code."""
