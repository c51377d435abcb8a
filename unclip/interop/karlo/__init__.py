"""Karlo and Kandinsky 2.2 folders, both ways."""
