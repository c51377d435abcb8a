"""The cascade as a value: its bundle on disk, its runs, its draws."""
