"""Commands: parse the line, call, print, exit with a status."""
