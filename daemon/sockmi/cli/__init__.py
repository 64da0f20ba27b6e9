"""The command line, `sockmi`."""
