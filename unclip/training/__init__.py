"""What a config stands for, and the loop that trains it."""
