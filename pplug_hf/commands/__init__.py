"""One file per command of the command line; each is a function that takes the settings of options.py."""
