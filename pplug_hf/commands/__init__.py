"""One file per command of the command line; each is a settings dataclass and a function that takes it."""
