"""Storage: locations of files, and reading and writing them safely."""
