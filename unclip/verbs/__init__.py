"""One file a verb: its flags, what it prints, its exit code."""
