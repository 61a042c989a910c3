"""LaMP's seven tasks, each in a file with its recipes: the paper's, and those of its authors' code and ours as the differences."""

from . import lamp_1, lamp_2, lamp_3, lamp_4, lamp_5, lamp_6, lamp_7

MODULES = (lamp_1, lamp_2, lamp_3, lamp_4, lamp_5, lamp_6, lamp_7)
