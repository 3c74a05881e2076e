"""The command line: `llmloss train`, `llmloss info`, `llmloss verify`."""
