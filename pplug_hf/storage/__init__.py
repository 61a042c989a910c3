"""Files: where they are, how they are written, and what is said when one cannot be had."""
